"""Which experts a token uses, and how much of each. T tokens, D in-features, E experts, K of them used by a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dsmoelora import AdapterConfig
from dsmoelora.adapters.context import AdapterContext, BatchTokens
from dsmoelora.adapters.keyed.draws import keyed_normal
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.adapters.layer import RoutedLinear
from dsmoelora.adapters.routers import BUILDERS, RouterPlace, build_router
from dsmoelora.adapters.routers.bias import move_biases
from dsmoelora.adapters.shared_input import Siblings
from dsmoelora.config.adapter_options import Pooling, RouterName
from dsmoelora.errors import ConfigError
from dsmoelora.seeds import derive_seed

NUM_FEATURES, NUM_TOKENS = 16, 48


def make_router(router: str = "softmax_topk", num_experts: int = 6, **options: Any) -> nn.Module:
    """A router in training, with larger random parameters than it starts with, so that its gates differ."""
    mask_BS = torch.ones(4, NUM_TOKENS // 4, dtype=torch.int64)
    prompt_BS = torch.arange(NUM_TOKENS // 4) < torch.tensor([[1], [5], [7], [12]])
    context = AdapterContext(tokens=BatchTokens(token_keys(3, torch.arange(4), mask_BS), prompt_BS=prompt_BS))
    place = RouterPlace("layer", NUM_FEATURES, num_experts, torch.empty(0), 0, context)
    module = build_router(place, AdapterConfig(num_experts=num_experts, router=router, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(number))
        for buffer in module.buffers():
            buffer.copy_(torch.arange(num_experts) % 5 - 2)
    return module


def tokens(num_tokens: int = NUM_TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))


def renormalised(share_TE: Tensor, keep_TE: Tensor) -> Tensor:
    kept_TE = torch.where(keep_TE, share_TE, 0.0)
    return kept_TE / kept_TE.sum(-1, keepdim=True)


def best(share_TE: Tensor, top_k: int) -> Tensor:
    return share_TE >= share_TE.sort(-1, descending=True).values[:, top_k - 1 : top_k]


def share_of(x_TD: Tensor, router: Any) -> Tensor:
    return (x_TD.double() @ router.weight.double().T).softmax(-1)


def softmax_topk(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    """The softmax over all experts, cut down to its K largest entries and divided by their sum."""
    share_TE = share_of(x_TD, router)
    return renormalised(share_TE, best(share_TE, config["top_k"]))


def softmax(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    return share_of(x_TD, router)


def noisy_topk(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    noise_TE = keyed_normal(router._context.tokens.keys_BS.flatten(), derive_seed("router noise", "layer"), 6).double()
    spread_TE = softplus(x_TD.double() @ router.noise_weight.double().T)
    share_TE = (x_TD.double() @ router.weight.double().T + noise_TE * spread_TE).softmax(-1)
    return renormalised(share_TE, best(share_TE, config["top_k"]))


def top_p(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    """Token by token: take the best expert left until they reach `top_p` together."""
    share_TE = share_of(x_TD, router)
    decided_TE = share_TE.detach()
    keep_TE = torch.zeros_like(share_TE, dtype=torch.bool)
    for share_E, keep_E in zip(decided_TE, keep_TE, strict=True):
        for expert in sorted(range(len(share_E)), key=lambda e: -float(share_E[e])):
            if float(share_E[keep_E].sum()) < config["top_p"]:
                keep_E[expert] = True
    return renormalised(share_TE, keep_TE)


def threshold(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    share_TE = share_of(x_TD, router)
    raw_T = x_TD.double() @ router.threshold_weight.double()[0] + router.threshold_bias.double()
    above_TE = share_TE - torch.sigmoid(raw_T)[:, None] / share_TE.shape[-1]
    return renormalised(above_TE, above_TE > 0)


def sigmoid_bias(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    score_TE = (x_TD.double() @ router.weight.double().T).sigmoid()
    return renormalised(score_TE, best(score_TE + 0.05 * router.bias_steps, config["top_k"]))


def pooled(x_SD: Tensor, router: Any, pooling: str) -> Tensor:
    """(1, D) of a prompt: its mean, its last state, or its mean weighed by a softmax."""
    if pooling == "attention":
        return (x_SD @ router.pooling_weight.double().T).softmax(0).T @ x_SD
    return x_SD[-1:] if pooling == "last" else x_SD.mean(0, keepdim=True)


def prompt(x_TD: Tensor, router: Any, config: dict[str, Any]) -> Tensor:
    """Sequence by sequence: the pooled prompt decides for all its tokens."""
    prompts_BS = router._context.tokens.prompt_BS
    gates = []
    for x_SD, prompt_S in zip(x_TD.double().view(*prompts_BS.shape, -1), prompts_BS, strict=True):
        pooled_1D = pooled(x_SD[prompt_S], router, config.get("pooling", "mean"))
        share_1E = (pooled_1D @ router.weight.double().T).softmax(-1)
        gates.append(renormalised(share_1E, best(share_1E, config["top_k"])).expand(len(x_SD), -1))
    return torch.cat(gates)


CASES: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (softmax_topk, {"top_k": 1}),
    (softmax_topk, {"top_k": 2}),
    (softmax_topk, {"top_k": 6}),
    (softmax_topk, {"top_k": 10, "num_experts": 20}),
    (softmax, {}),
    (noisy_topk, {"top_k": 2}),
    (top_p, {"top_p": 0.2}),
    (top_p, {"top_p": 0.8}),
    (threshold, {}),
    (sigmoid_bias, {"top_k": 2, "bias_rate": 0.05}),
    (prompt, {"top_k": 2}),
    (prompt, {"top_k": 2, "pooling": "last"}),
    (prompt, {"top_k": 2, "pooling": "attention"}),
]


@pytest.mark.parametrize(("reference", "config"), CASES)
def test_gates_are_those_of_the_formula_and_so_are_their_gradients(
    reference: Callable[..., Tensor], config: dict[str, Any]
) -> None:
    router, x_TD = make_router(reference.__name__, **config), tokens().requires_grad_()
    gate_TE = router(x_TD)
    expected_TE = reference(x_TD, router, config)
    assert gate_TE.dtype is torch.float32
    torch.testing.assert_close(gate_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(gate_TE != 0, expected_TE > 0)
    torch.testing.assert_close(gate_TE.sum(-1), torch.ones(NUM_TOKENS))

    above_TE = torch.randn(gate_TE.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x_TD, *router.parameters()]
    found = torch.autograd.grad(gate_TE, leaves, above_TE)
    expected = torch.autograd.grad(expected_TE, leaves, above_TE.double())
    for value, like in zip(found, expected, strict=True):
        torch.testing.assert_close(value, like, rtol=1e-4, atol=1e-5)


def test_every_router_has_a_builder_and_knows_its_parameters() -> None:
    assert set(BUILDERS) == set(get_args(RouterName))
    for router in (*map(make_router, BUILDERS), make_router("prompt", pooling="attention")):
        assert {key: tuple(value.shape) for key, value in router.named_parameters()} == router.shapes


def test_unselected_experts_have_a_gate_of_exactly_zero_and_no_gradient() -> None:
    router = make_router(top_k=2)
    gate_TE = router(tokens(1))
    gate_TE.square().sum().backward()
    (unselected,) = (gate_TE == 0).nonzero(as_tuple=True)[1:]
    assert len(unselected) == 4
    assert router.weight.grad is not None
    assert torch.equal(router.weight.grad[unselected], torch.zeros(4, 16))  # type: ignore[index]
    assert router.weight.grad[gate_TE[0] > 0].any()  # type: ignore[index, operator]


def test_equal_logits_still_select_k_experts() -> None:
    gate_TE = make_router(top_k=3)(torch.zeros(5, 16))
    assert (gate_TE > 0).sum(-1).tolist() == [3] * 5
    torch.testing.assert_close(gate_TE[gate_TE > 0], torch.full((15,), 1 / 3))


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_top_p_takes_one_expert_of_a_sure_token_and_many_of_an_unsure_one(p: float) -> None:
    router = make_router("top_p", top_p=p)
    sure_TD = 100 * tokens(5)
    assert (router(sure_TD) > 0).sum(-1).tolist() == [1] * 5
    assert (router(torch.zeros(5, 16)) > 0).sum(-1).tolist() == [-(-p * 6 // 1)] * 5, (
        "of equal ones as many as it takes"
    )


def test_a_threshold_that_nobody_passes_gives_no_expert_and_no_nan() -> None:
    router = make_router("threshold")
    with torch.no_grad():
        router.threshold_bias.fill_(100.0)  # type: ignore[operator, union-attr]
    x_TD = torch.zeros(3, 16, requires_grad=True)
    gate_TE = router(x_TD)
    gate_TE.sum().backward()
    assert not gate_TE.any()
    assert x_TD.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x_TD, *router.parameters()])


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_a_row_without_a_prompt_gets_gates_and_no_nan(pooling: str) -> None:
    """Rows that fill up a batch have no real token."""
    router, x_TD = make_router("prompt", pooling=pooling), tokens().requires_grad_()
    router._context.tokens.prompt_BS[0] = False  # type: ignore[index, operator, union-attr]
    gate_TE = router(x_TD)
    torch.testing.assert_close(gate_TE[0], torch.zeros(6).masked_fill(gate_TE[0] > 0, 1 / 3))
    gate_TE.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x_TD, *router.parameters()])


def test_noise_is_off_in_evaluation() -> None:
    router, x_TD = make_router("noisy_topk", top_k=2).eval(), tokens()
    torch.testing.assert_close(router(x_TD).double(), softmax_topk(x_TD, router, {"top_k": 2}), rtol=1e-5, atol=1e-6)


IN_BF16: dict[str, dict[str, Any]] = {
    "softmax_topk": {},
    "threshold": {},
    "noisy_topk": {},
    "sigmoid_bias": {"bias_rate": 0.05},
    "prompt": {"pooling": "attention"},
}


@pytest.mark.parametrize("name", IN_BF16)
def test_a_bf16_router_computes_in_fp32(name: str) -> None:
    router, x_TD = make_router(name, **IN_BF16[name]).bfloat16(), tokens().bfloat16()
    reference: Callable[..., Tensor] = globals()[name]
    expected_TE = reference(x_TD, router, {"top_k": 3, **IN_BF16[name]})
    torch.testing.assert_close(router(x_TD).double(), expected_TE, rtol=1e-4, atol=1e-5)  # bf16: 4e-3


def test_one_expert_needs_no_router() -> None:
    router = make_router(num_experts=1)
    assert torch.equal(router(tokens(3).bfloat16()), torch.ones(3, 1))
    assert not list(router.parameters())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"router": "top_p", "top_p": 0.5}])
def test_every_parameter_gets_a_gradient_when_all_tokens_go_to_the_same_experts(options: dict[str, Any]) -> None:
    """A parameter without a gradient would make some rank wait for ever."""
    config = AdapterConfig(r=2, num_experts=4, **options)
    layer = RoutedLinear(
        nn.Linear(16, 8).requires_grad_(False), config, "layer", AdapterContext(), range(config.num_experts), Siblings()
    )
    with torch.no_grad():
        layer.experts.b.normal_(generator=torch.Generator().manual_seed(2))
    same_TD = tokens(1).expand(12, 16)
    gate_TE = layer.router(same_TD)
    layer(same_TD).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    used = gate_TE[0] > 0
    assert config.top_k is None or int(used.sum()) == config.top_k
    for factor in (layer.experts.a, layer.experts.b):
        assert factor.grad is not None
        assert torch.equal(factor.grad.flatten(1).any(-1), used), "used experts learn, the others get zeros"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "softmax", "top_k": 2}, ("adapter.top_k is 2", "null", "adapter.router = softmax", "softmax_topk")),
        ({"router": "top_p", "top_k": 2}, ("adapter.top_k is 2", "adapter.router = top_p")),
        ({"router": "threshold", "top_k": 2}, ("adapter.top_k is 2", "adapter.router = threshold")),
        (
            {"top_p": 0.5},
            ("adapter.top_p is 0.5", "adapter.router = softmax_topk", "set adapter.router to one that does: top_p"),
        ),
        ({"bias_rate": 0.5}, ("adapter.bias_rate is 0.5", "one that does: sigmoid_bias")),
        ({"router": "top_p", "top_p": 1.0}, ("adapter.top_p is 1.0", "below 1", "softmax")),
        ({"router": "sigmoid_bias", "bias_rate": 0.0}, ("adapter.bias_rate is 0.0", "above 0", "0.001")),
        (
            {"router": "sigmoid_bias", "top_k": 4},
            ("adapter.top_k is 4", "below adapter.num_experts = 4", "only selects"),
        ),
        ({"router": "noisy_topk", "top_k": 5}, ("adapter.top_k is 5", "at most adapter.num_experts = 4")),
        ({"router": "noisy_topk", "num_experts": 1}, ("adapter.router is 'noisy_topk'", "one expert needs no router")),
    ],
)
def test_what_a_router_cannot_do_is_refused_by_name(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(**{"num_experts": 4, **options})
    for word in words:
        assert word in str(caught.value)


def test_options_left_open_take_their_defaults_where_the_router_has_them() -> None:
    def options(**settings: Any) -> tuple[Any, ...]:
        config = AdapterConfig(**settings)
        return config.top_k, config.top_p, config.bias_rate

    assert options() == (10, None, None)
    assert options(num_experts=1) == (1, None, None)
    assert options(router="softmax") == (None, None, None)
    assert options(router="top_p") == (None, 0.8, None)
    assert options(router="sigmoid_bias", num_experts=8) == (4, None, 1e-3)


def test_the_bias_selects_and_never_enters_the_gate() -> None:
    router, x_TD = make_router("sigmoid_bias", top_k=2), tokens()
    with torch.no_grad():
        router.bias_steps.zero_()  # type: ignore[operator, union-attr]
        before_TE = router(x_TD)
        router.bias_steps.fill_(-7)  # type: ignore[operator, union-attr]
    assert torch.equal(router(x_TD), before_TE), "a bias of all experts alike changes nothing"
    with torch.no_grad():
        router.bias_steps[3] = 10**6  # type: ignore[operator, index]
    gate_TE = router(x_TD)
    assert gate_TE[:, 3].all()
    score_TE = (x_TD @ router.weight.T).sigmoid()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(gate_TE, renormalised(score_TE, gate_TE > 0))


def test_biases_move_one_step_towards_balance() -> None:
    routers: list[Any] = [make_router("sigmoid_bias", num_experts=num) for num in (6, 4)]
    for router in routers:
        router.bias_steps.zero_()
    move_biases(routers, [torch.tensor([9.0, 0.0, 3.0, 3.0, 0.0, 3.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])])
    assert routers[0].bias_steps.tolist() == [-1, 1, 0, 0, 1, 0]
    assert routers[1].bias_steps.tolist() == [0, 0, 0, 0]


def test_the_bias_balances_tokens_that_all_want_the_same_experts() -> None:
    router: Any = make_router("sigmoid_bias", top_k=2, bias_rate=0.01)
    router.bias_steps.zero_()
    x_TD = tokens(512) + 1.5
    first_E = (router(x_TD) > 0).float().mean(0)
    for _ in range(200):
        move_biases([router], [(router(x_TD) > 0).float().sum(0)])
    assert first_E.max() > 0.7, "two of six experts would be 1/3"
    assert ((router(x_TD) > 0).float().mean(0) - 1 / 3).abs().max() < 0.05

"""The routers' losses: values and gradients, which neither splitting a batch nor computing a layer twice changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoelora import AdapterConfig
from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.routing import RoutingLog, sums
from dsmoelora.adapters.routing.losses import LossesOfTokens
from dsmoelora.config import LossesConfig, Recipe
from dsmoelora.errors import ConfigError
from tests.two_layers import NUM_EXPERTS, WIDTH, TwoLayers

LENGTH = 6
BALANCE, Z = 0.7, 0.3


def batch(num_sequences: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_sequences, LENGTH, WIDTH, generator=generator)
    real_BS = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (num_sequences, 1), generator=generator)
    return x, real_BS


def reference(network: TwoLayers, shares: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Balance with the given shares, z, and the shares of this batch, in fp64 as in the formulas."""
    logits: list[Tensor] = []
    selected: list[Tensor] = []
    x, real_BS = batch()
    handles = []
    adapter_context(network).log, network.recompute = None, False
    for _, layer in adapted_layers(network):
        handles.append(layer.router.register_forward_hook(lambda _, __, output: selected.append(output != 0)))
        handles.append(layer.router.register_forward_pre_hook(
            lambda router, inputs: logits.append(inputs[0].double() @ router.weight.double().T)))  # fmt: skip
    with adapter_context(network).hooks(handles):
        network(x)
    real_T = real_BS.flatten()
    probabilities = [one[real_T].softmax(-1).mean(0) for one in logits]
    of_layers = [NUM_EXPERTS * (share * p).sum() for share, p in zip(shares, probabilities, strict=True)]
    balance = torch.stack(of_layers).mean()
    z = torch.stack([one[real_T].logsumexp(-1).square().mean() for one in logits]).mean()
    counts = [one[real_T].double().sum(0) for one in selected]
    return balance, z, [count / count.sum() for count in counts]


def run_step(network: TwoLayers, log: RoutingLog, num_parts: int, world_size: int = 1) -> dict[str, Tensor]:
    """A step in several micro-batches, each as on a rank of its own: the averaged gradient of the routers' losses."""
    x, real_BS = batch()
    network.zero_grad()
    context = adapter_context(network)
    context.log = log
    log.begin_step(int(real_BS.sum()), scale=world_size)
    for part, real in zip(x.chunk(num_parts), real_BS.chunk(num_parts), strict=True):
        context.tokens = BatchTokens(real_BS=real)
        with log.listening():
            y = network(part)
        (0.0 * y.sum()).backward()
    return {name: p.grad / world_size for name, p in network.named_parameters() if p.grad is not None}


def test_what_sees_neither_all_tokens_nor_each_sequence_once_is_not_counted() -> None:
    tokens = BatchTokens(real_BS=batch()[1])
    assert tokens.counts(torch.empty(8 * LENGTH, 1)).sum() == tokens.counts(torch.empty(8, 1)).sum() > 8
    with pytest.raises(AssertionError, match="all tokens, or each sequence once"):
        tokens.counts(torch.empty(8 * 2, 1))


def test_much_that_routers_say_is_summed_before_the_forward_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (sums._MOST_KEPT, 1):
        monkeypatch.setattr(sums, "_MOST_KEPT", most)
        network = TwoLayers()
        log = RoutingLog(network, LossesConfig(BALANCE, Z), torch.device("cpu"))
        run_step(network, log, 1)
        found.append(log.sums)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("num_parts", "world_size"), [(1, 1), (4, 1), (8, 2)])
def test_values_and_gradients_are_those_of_the_formulas_over_two_steps(
    num_parts: int, world_size: int, recompute: bool
) -> None:
    network = TwoLayers(recompute, top_k=2)
    log = RoutingLog(network, LossesConfig(BALANCE, Z), torch.device("cpu"))
    shares = [torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS, dtype=torch.float64)] * 2
    for _ in range(2):
        network.recompute = recompute
        found = run_step(network, log, num_parts, world_size)
        values = dict(zip(log.loss_names, log.loss_values(log.sums).tolist(), strict=True))
        log.finish_step(log.sums)
        balance, z, new_shares = reference(network, shares)
        routers = {name: p for name, p in network.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(BALANCE * balance + Z * z, list(routers.values()), allow_unused=True)
        for name, grad in zip(routers, grads, strict=True):
            if grad is not None:
                torch.testing.assert_close(found[name], grad.float(), rtol=1e-4, atol=1e-6, msg=name)
        assert any(grad is not None and grad.abs().max() > 1e-3 for grad in grads)
        true_balance, _, _ = reference(network, new_shares)
        assert values["balance"] == pytest.approx(float(true_balance), rel=1e-6), "with the counts of this very step"
        assert values["z"] == pytest.approx(float(z), rel=1e-6)
        shares = new_shares
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.3)


def test_losses_summed_over_layers_and_chosen_experts_are_as_many_times_ours() -> None:
    """`num_experts sum_e (count_e / num_inputs) mean(p_e)` for each layer, as GOAT and AdaMoLE have it."""
    network, (x, real_BS) = TwoLayers(top_k=2), batch()
    log, theirs = RoutingLog(network, LossesConfig(BALANCE), torch.device("cpu")), []

    def add(router: Any, inputs: tuple[Tensor], gate_TE: Tensor) -> None:
        share_TE = (inputs[0] @ router.weight.T).softmax(-1)
        theirs.append(NUM_EXPERTS * ((gate_TE != 0).sum(0) / len(share_TE) * share_TE.mean(0)).sum().item())

    for _, layer in adapted_layers(network):
        layer.router.register_forward_hook(add)
    context = adapter_context(network)
    context.log, context.tokens, context.hooked = log, BatchTokens(real_BS=torch.ones_like(real_BS)), True
    log.begin_step(real_BS.numel(), scale=1)
    with log.listening():
        network(x)
    num_layers, top_k = 2, 2
    assert sum(theirs) == pytest.approx(num_layers * top_k * log.loss_values(log.sums).item(), rel=1e-5)


def test_the_gradient_is_the_derivative_of_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(7, 4, dtype=torch.float64, generator=generator).requires_grad_()
    num_tokens_N = torch.tensor([1.0, 0, 1, 3, 1, 1, 2], dtype=torch.float64)
    shares_E = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    above = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    passed = LossesOfTokens(num_tokens_N, shares_E, balance=0.7, z=0.3).attach(logits_NE)
    (found,) = torch.autograd.grad(passed, logits_NE, above)
    balance_N = (shares_E * logits_NE.softmax(-1)).sum(-1)
    total = (num_tokens_N * (0.7 * balance_N + 0.3 * logits_NE.logsumexp(-1).square())).sum()
    (expected,) = torch.autograd.grad(total, logits_NE)
    torch.testing.assert_close(found, above + expected)


@pytest.mark.parametrize("router", ["softmax_topk", "noisy_topk", "top_p", "threshold", "prompt"])
def test_the_balance_loss_evens_out_what_experts_get(router: Any) -> None:
    """Tokens that all prefer the same experts, and nothing but the loss to learn from."""
    network = TwoLayers(router=router)
    context = adapter_context(network)
    context.tokens = replace(context.tokens, prompt_BS=batch()[1])
    with torch.no_grad():
        for _, layer in adapted_layers(network):
            layer.router.weight[0] += 0.5
        network.up.base.bias.add_(1.0)
    log = RoutingLog(network, LossesConfig(balance=1.0), torch.device("cpu"))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    values = []
    for _ in range(60):
        run_step(network, log, 1)
        optimizer.step()
        values.append(float(log.loss_values(log.sums)))
        log.finish_step(log.sums)
    assert values[0] > 1.05
    assert values[-1] - 1 < 0.5 * (values[0] - 1)


def test_evaluation_is_not_counted_and_gets_no_loss() -> None:
    network = TwoLayers(top_k=2).eval()
    log = RoutingLog(network, LossesConfig(BALANCE, Z), torch.device("cpu"))
    run_step(network, log, 1)
    assert not log.sums.any()


def test_counts_are_exact_and_leave_padding_out() -> None:
    network = TwoLayers(top_k=2)
    log = RoutingLog(network, LossesConfig(), torch.device("cpu"))
    run_step(network, log, 4)
    log.finish_step(log.sums)
    *_, shares = reference(network, [torch.ones(NUM_EXPERTS)] * 2)
    routing = log.take_window()
    num_tokens = int(batch()[1].sum())
    assert routing.num_tokens == num_tokens
    for tokens, gates, share in zip(routing.tokens, routing.gates, shares, strict=True):
        assert sum(tokens) == 2 * num_tokens
        assert tokens == [round(float(one) * 2 * num_tokens) for one in share]
        assert sum(gates) == pytest.approx(num_tokens)
    assert log.take_window().num_tokens == 0, "a window begins anew"


def test_a_state_comes_back_as_it_was() -> None:
    network = TwoLayers(router="sigmoid_bias", top_k=2)
    log = RoutingLog(network, LossesConfig(z=Z), torch.device("cpu"))
    run_step(network, log, 1)
    log.finish_step(log.sums)
    other_network = TwoLayers(router="sigmoid_bias", top_k=2)
    other = RoutingLog(other_network, LossesConfig(z=Z), torch.device("cpu"))
    other.load_state(log.state())
    assert other.state() == log.state()
    for (_, one), (_, two) in zip(adapted_layers(network), adapted_layers(other_network), strict=True):
        assert one.router.bias_steps.any()
        assert torch.equal(one.router.bias_steps, two.router.bias_steps)
    assert other.take_window() == log.take_window()


@pytest.mark.parametrize(
    ("adapter", "losses", "words"),
    [
        ({"num_experts": 1}, {"balance": 0.1}, ("losses.balance is 0.1", "no routers")),
        ({"num_experts": 1}, {"z": 0.1}, ("losses.z is 0.1", "no routers")),
        ({"router": "softmax"}, {"balance": 0.1}, ("losses.balance", "router = softmax", "every token uses every")),
        ({"num_experts": 4, "top_k": 4}, {"balance": 0.1}, ("losses.balance", "adapter.top_k is adapter.num_experts")),
        ({"router": "sigmoid_bias"}, {"balance": 0.1}, ("losses.balance", "selection bias balances")),
        ({}, {"balance": -0.1}, ("losses.balance is -0.1", "0 or more")),
    ],
)
def test_losses_that_would_do_nothing_are_refused(
    adapter: dict[str, Any], losses: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(adapter=AdapterConfig(**adapter), losses=LossesConfig(**losses))
    for word in words:
        assert word in str(caught.value)

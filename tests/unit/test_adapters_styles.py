"""Where routers stand: one for a feed-forward block, none for layers with plain LoRA, and both beside one another.

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `K` of them used by a token, `R` rank.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from torch.utils.checkpoint import checkpoint

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers, adapter_context, eject
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.adapters.targets.blocks import linears_of_block
from dsmoelora.config import LossesConfig
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.optim import trainables
from tests.architectures import ARCHITECTURES, adapt, make_model, token_ids

SCALE = 2.0  # of the adapters below
# By architecture: the layers of its feed-forward blocks, plain LoRA beside them, and how many blocks there are.
LLAMA = (["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"])
BLOCKS: dict[str, tuple[list[str], list[str], int]] = {
    "llama": (*LLAMA, 2),
    "mistral": (*LLAMA, 2),
    "qwen2": (*LLAMA, 2),
    "qwen3": (*LLAMA, 2),
    "gemma2": (*LLAMA, 2),
    "gemma3": (*LLAMA, 2),
    "gemma3-vision": (*LLAMA, 2),
    "phi3": (["gate_up_proj", "down_proj"], ["qkv_proj"], 2),
    "glm4": (["gate_up_proj", "down_proj"], ["q_proj"], 2),
    "gpt-neox": (["dense_h_to_4h", "dense_4h_to_h"], ["query_key_value"], 2),
    "gpt2": (["c_fc", "mlp.c_proj"], ["c_attn", "attn.c_proj"], 2),
    "qwen2-moe": (*LLAMA, 2),  # the shared experts
    "qwen3-moe": (*LLAMA, 1),  # the block without routed experts
}


class Mlp(nn.Module):
    """A feed-forward block as Llama has it, with D = 7 and a width of 9, and attention's names beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(7, 9, bias=False), nn.Linear(7, 9, bias=False)
        self.down_proj = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Net(nn.Module):
    """Two blocks with a plain layer between; `recompute` computes the blocks again in the backward pass."""

    def __init__(self, recompute: bool = False, **adapter: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.between, self.second = Mlp(), nn.Linear(7, 7), Mlp()
        self.recompute = recompute
        settings: dict[str, Any] = {"r": 3, "lora_alpha": 3 * SCALE, "num_experts": 5, "top_k": 2, "style": "ffn_block"}
        settings |= {"target_modules": LLAMA[0], "lora_modules": ["between"]} | adapter
        inject(self, AdapterConfig(**settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, layer in adapted_layers(self):
                layer.experts.b.normal_(std=0.3, generator=generator)
            for _, router in routers(self):
                router.weight.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.between, self.second):
            x = checkpoint(part, x, use_reentrant=False) if self.recompute else part(x)
        return x


def tokens(num_tokens: int = 11) -> Tensor:
    return torch.randn(num_tokens, 7, generator=torch.Generator().manual_seed(2))


def formula(net: Net, values: dict[str, Tensor], x_TD: Tensor, top_k: int = 2) -> Tensor:
    """The whole network in fp64 from its tensors by name, one expert after the other."""

    def gates(block: str, x: Tensor) -> Tensor:
        logits = x @ values[f"{block}.router.weight"].T
        border = logits.topk(top_k).values[:, -1:]
        return logits.where(logits >= border, -torch.inf).softmax(-1)

    def layer(name: str, x: Tensor, gate_TE: Tensor) -> Tensor:
        y = x @ values[f"{name}.base.weight"].T + values.get(f"{name}.base.bias", 0)
        for e, (a, b) in enumerate(zip(values[f"{name}.experts.a"], values[f"{name}.experts.b"], strict=True)):
            y = y + SCALE * gate_TE[:, e, None] * (x @ a @ b.T)
        return y

    def mlp(block: str, x: Tensor) -> Tensor:
        g = gates(block, x)
        hidden = silu(layer(f"{block}.gate_proj", x, g)) * layer(f"{block}.up_proj", x, g)
        return layer(f"{block}.down_proj", hidden, g)

    return mlp("second", layer("between", mlp("first", x_TD), torch.ones(len(x_TD), 1)))


def in_fp64(net: Net) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in net.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_has_one_gate_for_its_three_layers_and_plain_layers_have_none(recompute: bool) -> None:
    """Output and all gradients; the gate's comes from gate, up and down together."""
    net, x_TD = Net(recompute), tokens().requires_grad_()
    values, x64_TD = in_fp64(net), tokens().double().requires_grad_()
    above_TD = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))
    y_TD, expected_TD = net(x_TD), formula(net, values, x64_TD)
    torch.testing.assert_close(y_TD, expected_TD.float(), rtol=1e-5, atol=1e-5)
    y_TD.backward(above_TD)
    expected_TD.backward(above_TD.double())
    torch.testing.assert_close(x_TD.grad, x64_TD.grad.float(), rtol=1e-4, atol=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, values[name].grad.float(), rtol=1e-4, atol=1e-5, msg=name)
            assert parameter.grad.any(), name


def test_the_gradients_are_derivatives_of_the_output() -> None:
    """Central differences of the formula, with all experts chosen so that no choice can turn."""
    net, x_TD = Net(top_k=5), tokens(3)
    weight_TD = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))
    (net(x_TD) * weight_TD).sum().backward()
    values = {name: value.double() for name, value in in_fp64(net).items()}
    for name in ("first.router.weight", "second.router.weight", "second.up_proj.experts.a", "between.experts.b"):
        parameter = net.get_parameter(name)
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                (formula(net, values | {name: values[name] + step * direction}, x_TD.double(), 5) * weight_TD).sum()
                for step in (1e-5, -1e-5)
            )
        assert float((parameter.grad * direction).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-4), name


def test_the_router_is_one_tensor_of_the_block() -> None:
    net = Net()
    names = {of.name: (of.layer, of.factor.value, of.shape) for of, _ in trainables(net)}
    assert {name: about for name, about in names.items() if "router" in name} == {
        "first.router.weight": ("first", "router", (5, 7)),
        "second.router.weight": ("second", "router", (5, 7)),
    }
    assert names["between.experts.a"] == ("between", "a", (1, 7, 3))
    assert names["first.down_proj.experts.b"] == ("first.down_proj", "b", (5, 7, 3))
    assert set(names) == {name for name, parameter in net.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_counts_are_those_of_one_router_a_block(recompute: bool) -> None:
    net, x_TD = Net(recompute).train(), tokens()
    log = RoutingLog(net, LossesConfig(balance=0.7, z=0.3), torch.device("cpu"))
    adapter_context(net).log = log
    log.begin_step(len(x_TD), scale=1.0)
    inputs: dict[str, Tensor] = {}
    hooks = [
        router.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().double()}))
        for name, router in routers(net)
    ]
    with log.listening():
        y_TD = net(x_TD)
    (0.0 * y_TD.sum()).backward()
    for hook in hooks:
        hook.remove()
    weights = {name: router.weight.detach().double().requires_grad_() for name, router in routers(net)}
    logits = {name: inputs[name] @ weights[name].T for name in weights}
    assert list(logits) == ["first", "second"]
    balance = sum(5 * (0.2 * one.softmax(-1).mean(0)).sum() for one in logits.values()) / 2
    z = sum(one.logsumexp(-1).square().mean() for one in logits.values()) / 2
    (0.7 * balance + 0.3 * z).backward()
    grad = net.second.router.weight.grad
    torch.testing.assert_close(grad, weights["second"].grad.float(), rtol=1e-4, atol=1e-6)
    assert dict(zip(log.loss_names, log.loss_values(log.sums), strict=True))["z"].item() == pytest.approx(z.item())
    log.finish_step(log.sums)
    routing = log.take_window()
    assert routing.layers == ["first", "second"]
    assert [sum(used) for used in routing.tokens] == [2 * len(x_TD)] * 2, "K choices a token and block, not 3 K"


def test_gates_do_not_outlive_the_block() -> None:
    net = Net(recompute=True)
    net(tokens().requires_grad_()).sum().backward()  # recomputation ends the block before its end
    for name, layer in adapted_layers(net):
        if name != "between":
            with pytest.raises(ModelError, match=rf"{name} takes its gates from the router of \w+ .*lora_modules"):
                layer(torch.zeros(2, layer.base.in_features))


def test_a_layer_that_sees_other_tokens_than_its_block_is_an_error() -> None:
    class Shortened(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.down_proj(torch.zeros(1, 9))

    net = nn.Sequential(Shortened())
    inject(net, AdapterConfig(num_experts=3, style="ffn_block", target_modules=LLAMA[0]))
    with pytest.raises(ModelError, match=r"0\.down_proj takes its gates .*with other tokens than the block"):
        net(tokens())


def test_a_block_can_be_called_by_keyword_and_with_any_number_of_dims() -> None:
    net, x_TD = Net(), tokens(12)
    expected_TD = net.first(x_TD)
    torch.testing.assert_close(net.first(x=x_TD.view(2, 6, 7)), expected_TD.view(2, 6, 7))


def test_copies_have_routers_of_their_own_and_eject_gives_the_base_back() -> None:
    net = Net()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.first.router.weight.neg_()
        other.second.router.weight.neg_()
    assert not torch.allclose(net(tokens()), other(tokens()))
    torch.testing.assert_close(net(tokens()), formula(net, in_fp64(net), tokens().double()).float())
    eject(net)
    base = nn.Sequential(Mlp(), nn.Linear(7, 7), Mlp())
    assert [name.partition(".")[2] for name in net.state_dict()] == [
        name.partition(".")[2] for name in base.state_dict()
    ]
    plain_TD = net(tokens())
    inject(net, AdapterConfig(num_experts=3, style="ffn_block", target_modules=LLAMA[0]))
    assert torch.equal(net(tokens()), plain_TD), "at step 0, to the last bit"


def routed_blocks(name: str, **config: Any) -> Any:
    """A tiny model with routed blocks and plain attention, whose experts say something."""
    targets, plain, _ = BLOCKS[name]
    return adapt(make_model(name), style="ffn_block", target_modules=targets, lora_modules=plain, **config)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_architecture_with_a_block_learns_in_all_its_tensors(name: str) -> None:
    model = routed_blocks(name, top_k=5).train()
    assert len(dict(routers(model))) == BLOCKS[name][2]
    logits_BSV = model(token_ids(4), attention_mask=torch.ones(4, 9, dtype=torch.int64)).logits
    cross_entropy(logits_BSV[:, :-1].flatten(0, 1), token_ids(4)[:, 1:].flatten()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), parameter_name


def test_every_tested_architecture_but_one_has_blocks() -> None:
    assert set(ARCHITECTURES) - set(BLOCKS) == {"llama-tied", "mixtral"}
    with pytest.raises(ConfigError, match=r"'self_attn\.q_proj'.*no such block: set adapter\.style to per_linear"):
        inject(make_model("mixtral"), AdapterConfig(style="ffn_block", target_modules=["q_proj"]))


@pytest.mark.parametrize("router", ["softmax_topk", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-moe"])
def test_generation_with_a_cache_equals_generation_without(name: str, router: str) -> None:
    model = routed_blocks(name, router=router)
    prompt_BS = token_ids(2, 6)
    prompt_BS[0, :2] = 0  # left padding
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": (prompt_BS != 0).long()}
    cached = model.generate(prompt_BS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt_BS, use_cache=False, **settings))
    assert not torch.equal(cached, make_model(name).generate(prompt_BS, use_cache=True, **settings))


@pytest.mark.parametrize(
    ("targets", "plain", "words"),
    [
        (["c_fc", "c_proj"], [], ("'attn.c_proj'", "ffn_block", "are here: mlp.c_fc, mlp.c_proj.", "lora_modules")),
        (["c_attn"], [], ("adapter.target_modules is 'attn.c_attn'", "set adapter.style to per_linear")),
        (["mlp.c_fc"], ["nose"], ("adapter.lora_modules is 'nose'", "linear layer", "Name some of these.")),
        (["mlp.c_fc"], ["c_fc"], ("adapter.lora_modules is ['c_fc']", "of other layers than", "h.1.mlp.c_fc", "Leave")),
        ("all-linear", [], ("'attn.c_attn, attn.c_proj'", "feed-forward blocks")),
    ],
)
def test_what_cannot_be_placed_is_refused_and_the_model_stays_as_it_was(
    targets: list[str] | str, plain: list[str], words: tuple[str, ...]
) -> None:
    model = make_model("gpt2")
    config = AdapterConfig(num_experts=3, style="ffn_block", target_modules=targets, lora_modules=plain)
    with pytest.raises(ConfigError) as caught:
        inject(model, config)
    for word in words:
        assert word in str(caught.value)
    assert not list(adapted_layers(model)) and not list(routers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"style": "ffn_block"}, ("adapter.num_experts is 1", "2 or more where adapter.style is ffn_block", "Drop")),
        ({"lora_modules": ["q_proj"]}, ("adapter.num_experts is 1", "adapter.lora_modules names", "target_modules")),
    ],
)
def test_one_expert_needs_no_style(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(num_experts=1, **settings)
    for word in words:
        assert word in str(caught.value)


class Twice(nn.Module):
    """Two layers that come back to their width, but look at more than one token."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.o(self.q(x)) * attention_mask


class Narrowing(nn.Module):
    """Two layers that do not come back to the width of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_a_block_comes_back_to_its_width_and_sees_a_token_alone() -> None:
    assert linears_of_block(block := Mlp()) == [block.gate_proj, block.up_proj, block.down_proj]
    for module in (Twice(), Narrowing(), nn.Linear(7, 7), nn.Sequential(Mlp())):
        assert not linears_of_block(module)


def test_a_block_whose_first_layer_reads_something_else_is_an_error() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(9, 7), nn.Linear(7, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    net = nn.Sequential(Backwards())
    inject(net, AdapterConfig(num_experts=3, style="ffn_block", target_modules=["up", "down"]))
    with pytest.raises(
        ModelError, match=r"0 is called with 7 features, but adapter\.style ffn_block expects 9.*per_linear"
    ):
        net(tokens())

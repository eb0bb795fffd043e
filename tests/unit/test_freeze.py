"""Frozen roles: no gradient, no moments, no work; and what cannot be frozen is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.config import LossesConfig, OptimConfig, Recipe
from dsmoelora.errors import ConfigError
from dsmoelora.optim import build_optimizer
from tests.given_adapters import IDS_BS, our_adapter, peft_adapter
from tests.helpers import tiny_llama

NUM_TOKENS, WIDTH, OUT, NUM_EXPERTS, RANK = 24, 40, 30, 3, 4


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def one_layer(freeze: list[Any], num_experts: int = NUM_EXPERTS, **settings: Any) -> nn.Module:
    """A layer with experts that have learned something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT))
    options = {"r": RANK, "num_experts": num_experts, "target_modules": ["0"], "router": "softmax"} | settings
    if num_experts == 1:
        options.pop("router")
    inject(model, AdapterConfig(**options))
    with torch.no_grad():
        model[0].experts.b.normal_()
    for role in freeze:
        part = model[0].router if role == "router" else model[0].experts.get_parameter(role)
        part.requires_grad_(False)
    return model


def backward_flops(model: nn.Module) -> int:
    x_TD = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    y_TO = model(x_TD)
    with FlopCounterMode(display=False) as counter:
        y_TO.backward(torch.ones_like(y_TO))
    return counter.get_total_flops()


@pytest.mark.parametrize("num_experts", [1, NUM_EXPERTS])
def test_frozen_factors_cost_no_product_in_the_backward_pass(num_experts: int) -> None:
    whole, num_features = backward_flops(one_layer([], num_experts)), num_experts * RANK
    assert whole - backward_flops(one_layer(["a"], num_experts)) == 2 * NUM_TOKENS * WIDTH * num_features
    assert whole - backward_flops(one_layer(["b"], num_experts)) == 2 * NUM_TOKENS * OUT * num_features
    if num_experts > 1:
        assert whole - backward_flops(one_layer(["router"])) == 2 * NUM_TOKENS * WIDTH * NUM_EXPERTS
        assert whole - backward_flops(one_layer(["a", "b"])) == 2 * NUM_TOKENS * (WIDTH + OUT) * num_features


@pytest.mark.parametrize("freeze", [["a"], ["b"], ["router"], ["a", "b"], ["a", "router"]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"gate_power": 0.5}, {"expert": "dora"}, {"expert": "moslora"}], ids=str)
def test_the_other_gradients_stay_what_they_were(freeze: list[Any], settings: dict[str, Any]) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        x_TD = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x_TD).square().sum().backward()
        return {"x": x_TD.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    all_of_them, some = gradients(one_layer([], **settings)), gradients(one_layer(freeze, **settings))
    frozen = {f"0.experts.{role}" for role in freeze} | {"0.router.weight" for role in freeze if role == "router"}
    assert set(some) == set(all_of_them) - frozen
    for name, grad in some.items():
        wanted = all_of_them[name]  # of a wider product, whose sums round otherwise
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def test_what_only_a_frozen_factor_would_read_is_not_kept() -> None:
    """The input, for one expert of which `b` alone is trained."""

    def keeps_input(freeze: list[Any]) -> bool:
        kept: list[int] = []
        x_TD = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            one_layer(freeze, 1)(x_TD)
        return x_TD.data_ptr() in kept

    assert keeps_input([]) and not keeps_input(["a"])


def model_from(base_path: Path, folder: Path, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base_path)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "num_experts": 2, "router": "softmax"}
    inject(model, AdapterConfig(experts_from=[str(folder)] * 2, **config | settings))
    return model


@pytest.mark.parametrize("freeze", [["a"], ["a", "b"], ["router"]], ids=str)
def test_frozen_roles_have_no_moments_and_do_not_move(base_path: Path, tmp_path: Path, freeze: list[Any]) -> None:
    model = model_from(base_path, peft_adapter(base_path, tmp_path / "adapter"), freeze=freeze)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(warmup_steps=0, weight_decay=0.1))
    for _ in range(3):
        model(IDS_BS, labels=IDS_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    roles = {"a", "b", "router"} - set(freeze)
    assert {"router" if ".router." in name else name.rpartition(".")[2] for name in moved} == roles
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert held == sum(start[name].numel() for name in moved)


def test_a_frozen_factor_gives_its_gram_to_the_other(base_path: Path, tmp_path: Path) -> None:
    """FFA-LoRA with the scaled rule: `grad_b (a^T a + d I)^-1`."""
    model = model_from(base_path, peft_adapter(base_path, tmp_path / "adapter"), freeze=["a"])
    config = OptimConfig(name="sgd", lr=0.1, preconditioner="scaled", damping=0.02, damping_abs=1e-3, lr_router=None)
    optimizer = build_optimizer(model, config)
    model(IDS_BS, labels=IDS_BS).loss.backward()
    wanted = {}
    for name, layer in adapted_layers(model):
        a_EDR, b_EOR = layer.experts.a.detach().double(), layer.experts.b.detach().double()
        gram_ERR = a_EDR.mT @ a_EDR
        damping_E = 0.02 * gram_ERR.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-3
        inverse_ERR = torch.linalg.inv(gram_ERR + damping_E[:, None, None] * torch.eye(3))
        wanted[name] = b_EOR - 0.1 * layer.experts.b.grad.double() @ inverse_ERR
    optimizer.step()
    for name, layer in adapted_layers(model):
        torch.testing.assert_close(layer.experts.b.detach().double(), wanted[name], rtol=1e-5, atol=1e-7)


def test_padding_of_a_frozen_factor_is_0(base_path: Path, tmp_path: Path) -> None:
    """It could not learn, and nothing of it may be learned by the other."""
    narrow, wide = (peft_adapter(base_path, tmp_path / str(rank), r=rank, lora_alpha=2 * rank) for rank in (2, 5))
    model = AutoModelForCausalLM.from_pretrained(base_path)
    settings: dict[str, Any] = {"num_experts": 2, "r": 5, "lora_alpha": 10, "target_modules": ["q_proj", "up_proj"]}
    inject(model, AdapterConfig(experts_from=[str(narrow), str(wide)], freeze=["a"], **settings))
    for _, layer in adapted_layers(model):
        assert not layer.experts.a[0, :, 2:].any() and layer.experts.a[0, :, :2].any()


def test_an_adapter_with_frozen_roles_is_loaded_whole(base_path: Path, tmp_path: Path) -> None:
    config = AdapterConfig(r=2, num_experts=2, target_modules=["q_proj"], freeze=["a", "router"])
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    saved = load_file(folder / "adapter_model.safetensors")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder)
    found = {n: p for n, p in loaded.named_parameters() if ".experts." in n or ".router." in n}
    assert set(found) == set(saved) and len(saved) == 2 * 3
    assert all(torch.equal(found[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("adapter", "optim", "message"),
    [
        ({"freeze": ["c"]}, {}, r"adapter.freeze is \['c'\], but it must be a list of some of a, b, router"),
        ({"freeze": ["m"]}, {}, "Take m out"),
        ({"freeze": ["magnitude"], "expert": "moslora"}, {}, "some of a, b, m, router"),
        ({"freeze": ["router"], "num_experts": 1}, {}, "some of a, b "),
        ({"freeze": ["a", "b", "router"], "experts_from": ["x"]}, {}, "fewer than all of a, b, router"),
        ({"freeze": ["b"]}, {}, "without b where adapter.experts_from is empty: it starts at 0"),
        ({"freeze": ["a"], "init": "svd"}, {}, "without a and b where adapter.init is svd"),
        ({"freeze": ["a"], "init": "gradient"}, {}, "where adapter.init is gradient: their start is one of training"),
        ({"freeze": ["router"], "router": "sigmoid_bias"}, {}, "whose bias moves"),
        ({"freeze": ["b"], "experts_from": ["x"]}, {"lr_b_ratio": 4.0}, "optim.lr_b_ratio is 4.0"),
        ({"freeze": ["router"]}, {"lr_router": 1e-3}, "optim.lr_router is 0.001"),
        (
            {"freeze": ["a"]},
            {"preconditioner": "tangent"},
            "`scaled` is the rule where one factor is frozen",
        ),
        ({"freeze": ["a", "b"], "experts_from": ["x"]}, {"preconditioner": "scaled"}, "There is no pair"),
        ({"freeze": ["m"], "expert": "moslora"}, {"preconditioner": "scaled"}, "There is no pair"),
    ],
)
def test_what_cannot_be_frozen_is_refused(adapter: dict[str, Any], optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(adapter=AdapterConfig(**adapter), optim=OptimConfig(**optim))


@pytest.mark.parametrize(("expert", "freeze"), [("lora", ["b", "a"]), ("moslora", ["m", "b", "a"])])
def test_a_loss_of_outputs_that_stay_is_refused(expert: Any, freeze: list[Any]) -> None:
    losses = LossesConfig(contrastive=0.1)
    Recipe(adapter=AdapterConfig(expert=expert, freeze=freeze[:-1], experts_from=["x"]), losses=losses)
    message = r"losses.contrastive is 0.1, but it must be 0 where adapter.freeze is \['"
    with pytest.raises(ConfigError, match=message):
        Recipe(adapter=AdapterConfig(expert=expert, freeze=freeze, experts_from=["x"]), losses=losses)

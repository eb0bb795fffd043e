"""Experts of kind `dora` against a loop over whole weights in fp64. Shapes as in the tests of the layer function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters.experts.dora import RescaledRows
from dsmoelora.adapters.experts.function import Mixture, RoutedExperts

NUM_TOKENS, NUM_IN, NUM_OUT, NUM_EXPERTS, RANK = 9, 7, 6, 4, 3


class GivenGates(nn.Module):
    """A router that says what the test wants."""

    def __init__(self, gate_TE: Tensor) -> None:
        super().__init__()
        self.gate_TE = gate_TE

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gate_TE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gates(dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, E), two experts a token; they need not sum to 1."""
    order_TE = random(NUM_TOKENS, NUM_EXPERTS, seed=1).argsort(-1)
    return torch.where(order_TE < 2, random(NUM_TOKENS, NUM_EXPERTS, seed=2).abs(), 0.0).to(dtype).requires_grad_()


def make_layer(base: nn.Module, trained: bool = True, **settings: Any) -> Any:
    """The adapted layer, in fp64; its weights moved away from the start."""
    settings = {"r": RANK, "lora_alpha": 2.0, "num_experts": NUM_EXPERTS, "expert": "dora"} | settings
    model = nn.Sequential(base)
    inject(model, AdapterConfig(target_modules=["0"], **settings))
    layer: Any = model[0]
    with torch.no_grad():
        if trained:
            layer.experts.b.copy_(random(NUM_EXPERTS, NUM_OUT, RANK, seed=3))
            layer.experts.magnitude.mul_(1 + 0.3 * random(NUM_EXPERTS, NUM_OUT, seed=4))
    return layer


def linear(bias: bool = True) -> nn.Linear:
    base = nn.Linear(NUM_IN, NUM_OUT, bias=bias, dtype=torch.float64)
    base.weight.data.copy_(random(NUM_OUT, NUM_IN, seed=5))
    if bias:
        base.bias.data.copy_(random(NUM_OUT, seed=6))
    return base


def conv() -> Conv1D:
    base = Conv1D(NUM_OUT, NUM_IN).double()
    base.weight.data.copy_(random(NUM_OUT, NUM_IN, seed=5).t())
    base.bias.data.copy_(random(NUM_OUT, seed=6))
    return base


def reference(layer: Any, x_TD: Tensor, gate_TE: Tensor, dropped_TD: Tensor | None = None) -> Tensor:
    """The formula, a whole weight for each expert."""
    w_OD = random(NUM_OUT, NUM_IN, seed=5)
    y0_TO, scale = x_TD @ w_OD.t(), layer.experts.scale
    y_TO = y0_TO + (0.0 if layer.base.bias is None else random(NUM_OUT, seed=6))
    for e, (a_DR, b_OR) in enumerate(zip(layer.experts.a, layer.experts.b, strict=True)):
        n_O = (w_OD + scale * b_OR @ a_DR.t()).norm(dim=1).detach()
        ratio_O = layer.experts.magnitude[e] / n_O
        update_TO = scale * (x_TD if dropped_TD is None else dropped_TD) @ a_DR @ (ratio_O[:, None] * b_OR).t()
        y_TO = y_TO + gate_TE[:, e : e + 1] * (y0_TO * (ratio_O - 1) + update_TO)
    return y_TO


def leaves(layer: Any, x_TD: Tensor, gate_TE: Tensor) -> dict[str, Tensor]:
    bank = layer.experts
    return {"x": x_TD, "gate": gate_TE, "a": bank.a, "b": bank.b, "magnitude": bank.magnitude}


def gradients(y_TO: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(y_TO, list(of.values()), random(NUM_TOKENS, NUM_OUT, seed=7), allow_unused=True)
    return dict(zip(of, found, strict=True))


@pytest.mark.parametrize("gate_power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("make_base", [linear, lambda: linear(bias=False), conv], ids=["bias", "no-bias", "conv1d"])
def test_output_and_gradients_are_those_of_whole_weights(make_base: Callable[[], nn.Module], gate_power: float) -> None:
    layer = make_layer(make_base(), gate_power=gate_power)
    gate_TE, x_TD = gates(), random(NUM_TOKENS, NUM_IN, seed=8).requires_grad_()
    layer.router = GivenGates(gate_TE)
    of = leaves(layer, x_TD, gate_TE)
    y_TO, expected_TO = layer(x_TD), reference(layer, x_TD, gate_TE)
    torch.testing.assert_close(y_TO, expected_TO, rtol=1e-12, atol=1e-12)
    found, exact = gradients(y_TO, of), gradients(expected_TO, of)
    power_TE = torch.where(gate_TE > 0, gate_TE.detach() ** gate_power, 0.0)
    weighed = gradients(reference(layer, x_TD, power_TE), of)
    for name, grad in found.items():
        wanted = weighed[name] if name in ("a", "b", "magnitude") else exact[name]
        tolerance = 1e-5 if name == "gate" else 1e-11  # of the gate in fp32, as the router works in fp32
        torch.testing.assert_close(
            grad, wanted, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
        )


def test_gradcheck_of_the_chain_rule() -> None:
    gate_TE = gates()
    base_TO = random(NUM_TOKENS, NUM_OUT, seed=8).requires_grad_()
    ratio_EO = (1 + 0.3 * random(NUM_EXPERTS, NUM_OUT, seed=4)).requires_grad_()
    b_EOR = random(NUM_EXPERTS, NUM_OUT, RANK, seed=3).requires_grad_()
    x_TD, a_EDR = random(NUM_TOKENS, NUM_IN, seed=8), random(NUM_EXPERTS, NUM_IN, RANK, seed=9)

    def function(base_TO: Tensor, gate_TE: Tensor, ratio_EO: Tensor, b_EOR: Tensor) -> Tensor:
        y_TO = RescaledRows.apply(base_TO, random(NUM_OUT, seed=6), gate_TE, ratio_EO, 1.0)
        inputs = y_TO, x_TD, gate_TE, None
        return RoutedExperts.apply(Mixture(1.5), None, *inputs, a_EDR, b_EOR, None, ratio_EO)

    assert torch.autograd.gradcheck(function, (base_TO, gate_TE, ratio_EO, b_EOR), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_base", [linear, conv])
def test_the_start_is_the_base_to_the_last_bit(make_base: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    base = make_base().to(dtype)
    x_TD = random(NUM_TOKENS, NUM_IN, seed=8).to(dtype)
    expected_TO = base(x_TD)
    layer = make_layer(base, trained=False)
    assert torch.equal(layer(x_TD), expected_TO)
    norm_O = random(NUM_OUT, NUM_IN, seed=5).to(dtype).double().norm(dim=1)
    assert layer.experts.magnitude.dtype is dtype
    for magnitude_O in layer.experts.magnitude:
        torch.testing.assert_close(magnitude_O, norm_O.to(dtype))


def test_at_gate_1_rows_have_the_lengths_that_were_learned() -> None:
    layer = make_layer(linear())
    for expert in range(NUM_EXPERTS):
        gate_TE = nn.functional.one_hot(torch.full((NUM_IN + 1,), expert), NUM_EXPERTS).double()
        layer.router = GivenGates(gate_TE)
        rows = layer(torch.cat((torch.eye(NUM_IN), torch.zeros(1, NUM_IN))).double())
        torch.testing.assert_close((rows[:-1] - rows[-1]).norm(dim=0), layer.experts.magnitude[expert].abs())


def test_dropout_leaves_the_base_alone() -> None:
    layer = make_layer(linear(), lora_dropout=0.5).train()
    gate_TE, x_TD = gates(), random(NUM_TOKENS, NUM_IN, seed=8)
    layer.router = GivenGates(gate_TE)
    torch.manual_seed(0)
    found_TO = layer(x_TD)
    torch.manual_seed(0)
    dropped_TD = nn.functional.dropout(x_TD, 0.5)
    expected_TO = reference(layer, x_TD, gate_TE, dropped_TD)
    torch.testing.assert_close(found_TO, expected_TO, rtol=1e-12, atol=1e-12)
    assert (expected_TO - reference(layer, x_TD, gate_TE)).abs().max() > 0.1


def test_norms_are_computed_once_in_evaluation_and_never_out_of_date() -> None:
    layer = make_layer(linear()).eval()
    gate_TE, x_TD = gates(), random(NUM_TOKENS, NUM_IN, seed=8)
    layer.router = GivenGates(gate_TE)
    num_tokens: list[int] = []
    layer.base.register_forward_pre_hook(lambda _, inputs: num_tokens.append(len(inputs[0])))

    def is_right() -> bool:
        return torch.allclose(layer(x_TD), reference(layer, x_TD, gate_TE), rtol=1e-12)

    columns = NUM_EXPERTS * RANK + 1  # the last one says the bias
    assert is_right() and is_right()
    assert num_tokens == [columns, NUM_TOKENS, NUM_TOKENS]
    layer.experts.b.data.mul_(2)  # autograd counts no writes to `data`, so a change of mode is wanted
    layer.eval()
    assert is_right() and num_tokens[3:] == [columns, NUM_TOKENS]
    with torch.no_grad():
        layer.experts.a.mul_(2)
    assert is_right() and num_tokens[5:] == [columns, NUM_TOKENS]
    layer.train()
    assert is_right() and is_right() and num_tokens[7:] == [columns, NUM_TOKENS, columns, NUM_TOKENS]
    with torch.inference_mode():
        assert is_right()
    layer(x_TD).sum().backward()
    layer.eval()(x_TD)
    seen = len(num_tokens)
    assert layer.float()(x_TD.float()).isfinite().all() and num_tokens[seen:] == [columns, NUM_TOKENS]


def test_bf16_is_as_close_to_fp64_as_its_eight_bits_allow() -> None:
    exact = make_layer(linear())
    rounded = make_layer(linear().bfloat16())
    with torch.no_grad():
        for name, parameter in rounded.experts.named_parameters():
            parameter.copy_(exact.experts.get_parameter(name))
    gate_TE, x_TD = gates(), random(NUM_TOKENS, NUM_IN, seed=8).bfloat16().double().requires_grad_()
    exact.router = GivenGates(gate_TE)
    of_exact = leaves(exact, x_TD, gate_TE)
    y_TO = exact(x_TD)
    expected = gradients(y_TO, of_exact) | {"output": y_TO}
    gate_TE, x_TD = gates(torch.float32), x_TD.detach().bfloat16().requires_grad_()
    rounded.router = GivenGates(gate_TE)
    of_rounded = leaves(rounded, x_TD, gate_TE)
    y_TO = rounded(x_TD)
    grads = torch.autograd.grad(y_TO, list(of_rounded.values()), random(NUM_TOKENS, NUM_OUT, seed=7).bfloat16())
    for name, value in (dict(zip(of_rounded, grads, strict=True)) | {"output": y_TO}).items():
        error = (value.double() - expected[name]).norm() / expected[name].norm()
        assert error < 2**-5, f"{name}: relative error {error:.1e}"  # weights, magnitudes and norms are rounded too


def test_the_gate_hears_of_rescaled_rows_in_fp32() -> None:
    """Numbers of few bits, whose products bf16 holds exactly: what is left to round is the sum over rows."""
    few_bits = torch.Generator().manual_seed(0)
    base_TO, grad_TO = (torch.randint(-15, 16, (NUM_TOKENS, 300), generator=few_bits).bfloat16() for _ in range(2))
    ratio_EO = 1 + torch.randint(-15, 16, (NUM_EXPERTS, 300), generator=few_bits) / 16
    gate_TE = gates(torch.float32)
    y_TO = RescaledRows.apply(base_TO, None, gate_TE, ratio_EO, 1.0)
    (found_TE,) = torch.autograd.grad(y_TO, gate_TE, grad_TO)
    expected_TE = (grad_TO.double() * base_TO.double()) @ (ratio_EO.double() - 1).t()
    assert found_TE.dtype is torch.float32
    torch.testing.assert_close(found_TE.double(), expected_TE, rtol=1e-4, atol=0)


def test_a_row_of_zeros_stays_finite() -> None:
    base = linear()
    base.weight.data[2] = 0.0
    layer = make_layer(base, trained=False)
    gate_TE, x_TD = gates(), random(NUM_TOKENS, NUM_IN, seed=8).requires_grad_()
    layer.router = GivenGates(gate_TE)
    of = leaves(layer, x_TD, gate_TE)
    assert all(grad.isfinite().all() for grad in gradients(layer(x_TD), of).values())

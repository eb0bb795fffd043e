"""The fused layer function against a loop over experts in fp64 that anyone can check against the formula.

Shapes: `T` tokens, `D` in-features, `O` out-features, `E` experts, `K` of them used by a token, `R` rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsmoelora.adapters.experts.function import Mixture, RoutedExperts, RouterLogits
from dsmoelora.adapters.experts.products import product_fp32

SCALE = 1.5


def given_gates(
    mixture: Mixture,
    base_TO: Tensor,
    x_TD: Tensor,
    gate_TE: Tensor,
    a_EDR: Tensor,
    b_EOR: Tensor,
    m_ERR: Tensor | None = None,
) -> Tensor:
    gates = base_TO, x_TD, gate_TE, None
    output: Tensor = RoutedExperts.apply(mixture, None, *gates, a_EDR, b_EOR, m_ERR, None)
    return output


@dataclass
class Case:
    """The inputs of `RoutedExperts`, all wanting gradients, and the gradient that comes from above."""

    base_TO: Tensor
    x_TD: Tensor
    gate_TE: Tensor
    selected_TE: Tensor
    a_EDR: Tensor
    b_EOR: Tensor
    m_ERR: Tensor | None
    grad_TO: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        leaves = {"base": self.base_TO, "x": self.x_TD, "gate": self.gate_TE, "a": self.a_EDR, "b": self.b_EOR}
        return leaves if self.m_ERR is None else leaves | {"m": self.m_ERR}

    def run(self, gate_power: float = 1.0, scope: str = "factors") -> Tensor:
        inputs = (self.base_TO, self.x_TD, self.gate_TE)
        mixture = Mixture(SCALE, gate_power, power_for_input=scope == "factors_and_input")
        return given_gates(mixture, *inputs, self.a_EDR, self.b_EOR, self.m_ERR)

    def gradients(self, gate_power: float = 1.0, scope: str = "factors") -> dict[str, Tensor]:
        grads = torch.autograd.grad(self.run(gate_power, scope), list(self.leaves.values()), self.grad_TO)
        return dict(zip(self.leaves, grads, strict=True))


def make_case(
    num_tokens: int = 11,
    num_experts: int = 5,
    top_k: int = 2,
    dtype: torch.dtype = torch.float64,
    mixers: bool = False,
) -> Case:
    """Random inputs with D = 7, O = 6, R = 3; gates sum to 1 over K random experts of each token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    order_TE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)
    selected_TE = order_TE < top_k
    gate_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    scores_TE = random(num_tokens, num_experts).to(gate_dtype).masked_fill(~selected_TE, -torch.inf)
    case = Case(
        base_TO=random(num_tokens, 6),
        x_TD=random(num_tokens, 7),
        gate_TE=scores_TE.softmax(-1),
        selected_TE=selected_TE,
        a_EDR=random(num_experts, 7, 3),
        b_EOR=random(num_experts, 6, 3),
        m_ERR=random(num_experts, 3, 3) if mixers else None,
        grad_TO=random(num_tokens, 6),
    )
    for leaf in case.leaves.values():
        leaf.requires_grad_()
    return case


def loop_over_experts(case: Case, weight_TE: Tensor) -> Tensor:
    """base + s sum_e weight_e (x a_e) m_e b_e^T, one expert after the other, in fp64."""
    y_TO = case.base_TO.double()
    m_ERR = torch.eye(3).expand(len(case.a_EDR), 3, 3) if case.m_ERR is None else case.m_ERR
    tensors = (weight_TE.T, case.a_EDR, m_ERR, case.b_EOR)
    for weight_T, a_DR, m_RR, b_OR in zip(*(tensor.double() for tensor in tensors), strict=True):
        y_TO = y_TO + SCALE * weight_T[:, None] * (case.x_TD.double() @ a_DR @ m_RR @ b_OR.T)
    return y_TO


def expected_gradients(case: Case, gate_power: float, scope: str) -> dict[str, Tensor]:
    """The chain rule of the loop; where the gate's power counts, the loop is weighed with it instead of the gate."""
    leaves = list(case.leaves.values())
    exact = torch.autograd.grad(loop_over_experts(case, case.gate_TE), leaves, case.grad_TO.double())
    gate_TE = case.gate_TE.detach()
    power_TE = torch.where(case.selected_TE, torch.copysign(gate_TE.abs() ** gate_power, gate_TE), 0.0)
    weighed = torch.autograd.grad(loop_over_experts(case, power_TE), leaves, case.grad_TO.double(), allow_unused=True)
    with_power = {"a", "b", "m", "x"} if scope == "factors_and_input" else {"a", "b", "m"}
    chosen = (w if name in with_power else e for name, e, w in zip(case.leaves, exact, weighed, strict=True))
    return dict(zip(case.leaves, chosen, strict=True))


@pytest.mark.parametrize("scope", ["factors", "factors_and_input"])
@pytest.mark.parametrize("gate_power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (5, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("mixers", [False, True])
def test_output_and_gradients_are_those_of_a_loop_over_experts(
    mixers: bool, num_experts: int, top_k: int, gate_power: float, scope: str
) -> None:
    case = make_case(num_experts=num_experts, top_k=top_k, mixers=mixers)
    torch.testing.assert_close(case.run(gate_power, scope), loop_over_experts(case, case.gate_TE), rtol=1e-12, atol=0)
    expected = expected_gradients(case, gate_power, scope)
    for name, grad in case.gradients(gate_power, scope).items():
        # the gate's gradient is computed in fp32, as the router works in fp32
        tolerance = 1e-5 if name == "gate" else 1e-11
        torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate_power", [0.5, 0.0])
def test_a_negative_gate_keeps_its_sign_in_every_power(gate_power: float) -> None:
    """Free gates of the router `constant` may fall below 0: there the expert's output is taken away."""
    case = make_case()
    case.gate_TE = (case.gate_TE.detach() - 0.3 * case.selected_TE).requires_grad_()
    assert (case.gate_TE[case.selected_TE] < 0).any()
    expected = expected_gradients(case, gate_power, "factors")
    for name, grad in case.gradients(gate_power).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


def test_the_gate_power_leaves_the_gradients_of_input_and_gate_exact() -> None:
    case = make_case()
    exact, rescaled = case.gradients(1.0), case.gradients(0.5)
    for name in ("base", "x", "gate"):
        assert torch.equal(rescaled[name], exact[name]), name
    assert not torch.allclose(rescaled["a"], exact["a"]), "a power of 1/2 must change the factors' gradients"


def test_powers_agree_where_a_token_uses_one_expert() -> None:
    case = make_case(top_k=1)  # its renormalised gate is 1, and so is every power of it
    exact = case.gradients(1.0)
    for gate_power in (0.5, 0.0):
        for name, grad in case.gradients(gate_power).items():
            torch.testing.assert_close(grad, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixers", [False, True])
def test_gradcheck_of_the_chain_rule(mixers: bool) -> None:
    case = make_case(num_tokens=4, num_experts=3, top_k=2, mixers=mixers)

    def function(base_TO: Tensor, x_TD: Tensor, gate_TE: Tensor, *factors: Tensor) -> Tensor:
        return given_gates(Mixture(SCALE), base_TO, x_TD, gate_TE, *factors)

    assert torch.autograd.gradcheck(function, tuple(case.leaves.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixers", [False, True])
def test_bf16_is_as_close_to_fp64_as_its_eight_bits_allow(mixers: bool) -> None:
    case = make_case(num_tokens=64, dtype=torch.bfloat16, mixers=mixers)
    pairs = {"output": (case.run(), loop_over_experts(case, case.gate_TE))}
    found, expected = case.gradients(), expected_gradients(case, 1.0, "factors")
    pairs |= {name: (found[name], expected[name].double()) for name in found}
    for name, (value, reference) in pairs.items():
        assert value.dtype is (torch.float32 if name == "gate" else torch.bfloat16), name
        error = (value.double() - reference).norm() / reference.norm()
        assert error < 2**-7, f"{name}: relative error {error:.1e}"  # rounded at most twice on its way


def test_no_tokens_give_no_output_and_zero_gradients() -> None:
    case = make_case(num_tokens=0)
    assert case.run().shape == (0, 6)
    for name, grad in case.gradients(0.5).items():
        assert grad.shape == case.leaves[name].shape
        assert not grad.any()


@pytest.mark.parametrize("mixers", [False, True])
def test_the_parameters_themselves_wait_for_the_backward_pass(mixers: bool) -> None:
    """Under ZeRO-3 a copy or a view would keep the gathered weight alive from forward to backward."""
    case = make_case(mixers=mixers)
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        case.run()
    parameters = [case.a_EDR, case.b_EOR] + ([] if case.m_ERR is None else [case.m_ERR])
    inputs = [case.x_TD, case.gate_TE, *parameters]
    own = [tensor for tensor in saved if all(tensor.data_ptr() != given.data_ptr() for given in inputs)]
    assert [tuple(tensor.shape) for tensor in own] == [(11, 5 * 3)], "only the features x a (T, E * R) are made here"
    for parameter in parameters:
        (kept,) = [tensor for tensor in saved if tensor.data_ptr() == parameter.data_ptr()]
        assert kept.shape == parameter.shape
        assert kept.stride() == parameter.stride()


def test_backward_reads_the_weights_that_are_gathered_then() -> None:
    """ZeRO-3 empties `.data` after the forward pass and fills it again, elsewhere, before the backward one."""
    case = make_case()
    expected = case.gradients()
    output = case.run()
    whole = [parameter.data.clone() for parameter in (case.a_EDR, case.b_EOR)]
    for parameter in (case.a_EDR, case.b_EOR):
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    for parameter, value in zip((case.a_EDR, case.b_EOR), whole, strict=True):
        parameter.data = 2 * value
    grads = torch.autograd.grad(output, list(case.leaves.values()), case.grad_TO)
    found = dict(zip(case.leaves, grads, strict=True))
    # grad_a and grad_gate are linear in b, grad_x in a and b, grad_b needs the features of the forward pass alone
    for name, factor in {"base": 1, "x": 4, "gate": 2, "a": 2, "b": 1}.items():
        torch.testing.assert_close(found[name], factor * expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_fp32_products_whatever_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(9, 16, generator=generator).to(dtype).requires_grad_()
    weight_ED = torch.randn(4, 16, generator=generator).to(dtype).requires_grad_()
    grad_TE = torch.randn(9, 4, generator=generator)
    logits_TE = RouterLogits.apply(x_TD, weight_ED)
    assert logits_TE.dtype is torch.float32
    reference_TE = x_TD.double() @ weight_ED.double().T
    torch.testing.assert_close(logits_TE.double(), reference_TE, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(logits_TE, [x_TD, weight_ED], grad_TE)
    expected = torch.autograd.grad(reference_TE, [x_TD, weight_ED], grad_TE.double())
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype is dtype
        torch.testing.assert_close(value, reference)  # rounded once, at the end


def test_an_fp16_product_may_be_larger_than_fp16() -> None:
    x_TD, weight_DE = torch.full((2, 100), 100.0).half(), torch.full((100, 3), 100.0).half()
    torch.testing.assert_close(product_fp32(x_TD, weight_DE), torch.full((2, 3), 1e6))


def test_router_logits_keep_no_fp32_copy_of_the_input() -> None:
    x_TD = torch.randn(9, 16).bfloat16()
    weight_ED = torch.randn(4, 16).bfloat16().requires_grad_()
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        RouterLogits.apply(x_TD, weight_ED)
    assert [tensor.data_ptr() for tensor in saved] == [x_TD.data_ptr(), weight_ED.data_ptr()]

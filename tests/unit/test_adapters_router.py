"""Which experts a token uses, and how much of each. T tokens, D in-features, E experts, K of them used by a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsmoelora import AdapterConfig
from dsmoelora.adapters.layer import BatchContext, RoutedLinear
from dsmoelora.adapters.router import SingleExpertRouter, SoftmaxTopKRouter


def make_router(num_experts: int = 6, top_k: int = 2, seed: int = 0) -> SoftmaxTopKRouter:
    return SoftmaxTopKRouter(16, num_experts, top_k, torch.empty(0), (seed, "layer", "router"))


def tokens(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed))


def renormalised_softmax(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> Tensor:
    """The softmax over all experts, cut down to its K largest entries and divided by their sum, in fp64."""
    share_TE = (x_TD.double() @ weight_ED.double().T).softmax(-1)
    smallest_kept_T1 = share_TE.sort(-1, descending=True).values[:, top_k - 1 : top_k]
    kept_TE = torch.where(share_TE >= smallest_kept_T1, share_TE, 0.0)
    return kept_TE / kept_TE.sum(-1, keepdim=True)


@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 1), (6, 2), (6, 6), (20, 10)])
def test_gates_are_the_renormalised_softmax_and_so_are_their_gradients(num_experts: int, top_k: int) -> None:
    router, x_TD = make_router(num_experts, top_k), tokens(50).requires_grad_()
    _, gate_TE, selected_TE = router(x_TD)
    expected_TE = renormalised_softmax(x_TD, router.weight, top_k)
    assert gate_TE.dtype is torch.float32
    torch.testing.assert_close(gate_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(selected_TE, expected_TE > 0)
    torch.testing.assert_close(gate_TE.sum(-1), torch.ones(50))

    above_TE = torch.randn(50, num_experts, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(gate_TE, [x_TD, router.weight], above_TE)
    expected = torch.autograd.grad(expected_TE, [x_TD, router.weight], above_TE.double())
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_unselected_experts_have_a_gate_of_exactly_zero_and_no_gradient() -> None:
    router = make_router()
    _, gate_TE, selected_TE = router(tokens(1))
    gate_TE.square().sum().backward()
    (unselected,) = (~selected_TE).nonzero(as_tuple=True)[1:]
    assert len(unselected) == 4
    assert torch.equal(gate_TE[0, unselected], torch.zeros(4))
    assert router.weight.grad is not None
    assert torch.equal(router.weight.grad[unselected], torch.zeros(4, 16))
    assert router.weight.grad[selected_TE[0]].any()


def test_equal_logits_still_select_k_experts() -> None:
    _, gate_TE, selected_TE = make_router(top_k=3)(torch.zeros(5, 16))
    assert selected_TE.sum(-1).tolist() == [3] * 5
    torch.testing.assert_close(gate_TE[selected_TE], torch.full((15,), 1 / 3))


def test_a_bf16_router_computes_in_fp32() -> None:
    router = make_router(num_experts=20, top_k=10).bfloat16()
    x_TD = tokens(50).bfloat16()
    expected_TE = renormalised_softmax(x_TD, router.weight, 10)
    torch.testing.assert_close(router(x_TD)[1].double(), expected_TE, rtol=1e-5, atol=1e-6)


def test_one_expert_needs_no_router() -> None:
    _, gate_TE, selected_TE = SingleExpertRouter()(tokens(3).bfloat16())
    assert torch.equal(gate_TE, torch.ones(3, 1))
    assert selected_TE.all()
    assert not list(SingleExpertRouter().parameters())


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_parameter_gets_a_gradient_when_all_tokens_go_to_the_same_experts(top_k: int) -> None:
    """A parameter without a gradient would make some rank wait for ever."""
    config = AdapterConfig(r=2, num_experts=4, top_k=top_k)
    layer = RoutedLinear(nn.Linear(16, 8).requires_grad_(False), config, "layer", BatchContext())
    with torch.no_grad():
        layer.experts.b.normal_(generator=torch.Generator().manual_seed(2))
    same_TD = tokens(1).expand(12, 16)
    *_, selected_TE = layer.router(same_TD)
    layer(same_TD).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    used = selected_TE[0]
    assert int(used.sum()) == top_k
    for factor in (layer.experts.a, layer.experts.b):
        assert factor.grad is not None
        assert torch.equal(factor.grad.flatten(1).any(-1), used), "used experts learn, the others get zeros"

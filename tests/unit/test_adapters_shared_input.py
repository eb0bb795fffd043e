"""What counts as one input: the same numbers, unchanged, read by another layer in the same pass."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoelora.adapters import eject, inject
from dsmoelora.adapters.shared_input import Siblings
from dsmoelora.config import AdapterConfig

Q, K = 1, 2


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_layers_share_what_lies_in_one_place(num_tokens: int) -> None:
    """Also where the place has no length: ranks with and without tokens must do the same."""
    siblings, x, other = Siblings(), torch.randn(num_tokens, 4), torch.randn(num_tokens, 4)
    first = siblings.shared_input(x, Q)
    assert siblings.shared_input(x.detach(), K) is first, "ZeRO-3 hands every module a tensor object of its own"
    assert siblings.shared_input(other, K) is not first


def test_the_first_reader_gives_the_dropout_key() -> None:
    siblings, x = Siblings(), torch.randn(3, 4)
    siblings.shared_input(x, Q)
    assert siblings.shared_input(x, K).dropout_key == Q


def test_a_layer_that_reads_again_begins_another_pass() -> None:
    """Else a second forward on the same tensor would reuse the first one's dropout mask and graph."""
    siblings, x = Siblings(), torch.randn(3, 4)
    first = siblings.shared_input(x, Q)
    siblings.shared_input(x, K)
    second = siblings.shared_input(x, Q)
    assert second is not first
    assert siblings.shared_input(x, K) is second


def test_what_was_written_to_or_cut_from_gradients_is_another_input() -> None:
    siblings, x = Siblings(), torch.randn(3, 4, requires_grad=True)
    first = siblings.shared_input(x, Q)
    assert siblings.shared_input(x.detach(), K) is not first, "its gradient must not reach x"
    first = siblings.shared_input(x, Q)
    with torch.no_grad():
        assert siblings.shared_input(x, K) is not first
        first = siblings.shared_input(x, Q)
        x.add_(1)
    assert siblings.shared_input(x, K) is not first
    assert siblings.shared_input(x[:, :2], Q + K) is not siblings.shared_input(x, Q)


def test_things_are_made_once() -> None:
    shared, made = Siblings().shared_input(torch.randn(3, 4), Q), []
    for _ in range(2):
        assert shared.once("thing", lambda: made.append(1) or len(made)) == 1
    assert made == [1]


class Attention(nn.Module):
    """Two layers that read one input, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x))


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_the_input_and_its_graph_are_let_go_of(is_recomputed: bool) -> None:
    """With the end of each forward, that of a recomputation too."""
    model = nn.Sequential(Attention(), Attention())
    inject(model, AdapterConfig(r=2, num_experts=2, top_k=1, lora_dropout=0.5, target_modules="all-linear"))
    inputs: list[weakref.ref[Tensor]] = []
    for attention in model:
        attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    y = torch.randn(3, 4, requires_grad=True)
    for attention in model:
        y = checkpoint(attention, y, use_reentrant=False) if is_recomputed else attention(y)
    y.square().sum().backward()
    num_calls = len(inputs)
    del y
    assert num_calls == (4 if is_recomputed else 2)
    assert all(read() is None for read in inputs)
    eject(model)
    assert not any(attention._forward_hooks for attention in model)

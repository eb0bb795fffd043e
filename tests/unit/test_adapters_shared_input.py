"""What counts as one input: the same numbers, unchanged, read by another layer in the same pass."""

from __future__ import annotations

import pytest
import torch

from dsmoelora.adapters.context import BatchContext

Q, K = 1, 2


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_layers_share_what_lies_in_one_place(num_tokens: int) -> None:
    """Also where the place has no length: ranks with and without tokens must do the same."""
    context, x, other = BatchContext(), torch.randn(num_tokens, 4), torch.randn(num_tokens, 4)
    first = context.shared_input(x, Q)
    assert context.shared_input(x.detach(), K) is first, "ZeRO-3 hands every module a tensor object of its own"
    assert context.shared_input(other, K) is not first


def test_the_first_reader_gives_the_dropout_key() -> None:
    context, x = BatchContext(), torch.randn(3, 4)
    context.shared_input(x, Q)
    assert context.shared_input(x, K).dropout_key == Q


def test_a_layer_that_reads_again_begins_another_pass() -> None:
    """Else a second forward on the same tensor would reuse the first one's dropout mask and graph."""
    context, x = BatchContext(), torch.randn(3, 4)
    first = context.shared_input(x, Q)
    context.shared_input(x, K)
    second = context.shared_input(x, Q)
    assert second is not first
    assert context.shared_input(x, K) is second


def test_what_was_written_to_or_cut_from_gradients_is_another_input() -> None:
    context, x = BatchContext(), torch.randn(3, 4, requires_grad=True)
    first = context.shared_input(x, Q)
    assert context.shared_input(x.detach(), K) is not first, "its gradient must not reach x"
    first = context.shared_input(x, Q)
    with torch.no_grad():
        assert context.shared_input(x, K) is not first
        first = context.shared_input(x, Q)
        x.add_(1)
    assert context.shared_input(x, K) is not first
    assert context.shared_input(x[:, :2], Q + K) is not context.shared_input(x, Q)


def test_things_are_made_once() -> None:
    shared, made = BatchContext().shared_input(torch.randn(3, 4), Q), []
    for _ in range(2):
        assert shared.once("thing", lambda: made.append(1) or len(made)) == 1
    assert made == [1]


def test_a_cleared_context_remembers_nothing() -> None:
    context, x = BatchContext(), torch.randn(3, 4)
    first = context.shared_input(x, Q)
    context.clear()
    assert context.shared_input(x, K) is not first

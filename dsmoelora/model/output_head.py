"""The output head of a causal language model: logits of few places, and a loss that never holds all of them at once.

The logits of a token are as wide as the vocabulary, often 128k numbers, and a loss keeps them three or four times. Here
the head is called once with the hidden states of all targets, works through them chunk by chunk, and forms the gradient
on the way: what is kept for the backward pass is as large as the hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from dsmoelora.adapters import RoutedLinear
from dsmoelora.data.dataset import IGNORED

LogitsOf = Callable[[Tensor], Tensor]  # (T, D) -> (T, V)


def can_keep_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes places (B, P) as `logits_to_keep` and gives the logits of these places.

    Asked by trying: before transformers 5.21 every row got the places of all rows. The model's own forward runs between
    a body and a head that compute nothing, so weights may be in pieces or on the meta device.
    """
    # What code that comes with a model takes for it is its own affair.
    own_code = not type(model).__module__.startswith("transformers.")
    is_of_two_parts = {model.base_model, model.get_output_embeddings()} <= set(model.children())
    if own_code or not is_of_two_parts or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    hidden_BSD = torch.arange(6.0).view(2, 3, 1)
    places_BP = torch.tensor([[0, 2], [1, 1]])
    try:
        kept_BPD = _forward_around(model, hidden_BSD, logits_to_keep=places_BP)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    return tuple(kept_BPD.shape) == (*places_BP.shape, 1)


def nll_of_rows(logits_BPV: Tensor, targets_BP: Tensor) -> list[list[float]]:
    """For each row the negative log likelihoods of its targets, in nats; those of -100 are none."""
    found = []
    for logits_PV, targets_P in zip(logits_BPV, targets_BP, strict=True):  # in fp32 one row at a time
        nll_P = nn.functional.cross_entropy(logits_PV.float(), targets_P, ignore_index=IGNORED, reduction="none")
        found.append(nll_P[targets_P != IGNORED].tolist())
    return found


class ChunkedLoss:
    """The negative log likelihood of a model's targets, from its head, chunk by chunk.

    Args:
        model: for which `of` has found that it can be done
        size: targets of a chunk
        is_plain: the logits are what the head gives; otherwise the model's own code goes on with it (soft caps, scales)
    """

    def __init__(self, model: PreTrainedModel, size: int, is_plain: bool) -> None:
        self._model, self._size, self._is_plain = model, size, is_plain
        self._head = model.get_output_embeddings()
        self._nll: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, size: int) -> ChunkedLoss | None:
        """The chunked loss of a model; None where it has to be had from all logits at once.

        That is so where the logits of some places cannot be asked for, where the head has an adapter, and where what
        the model makes of the head's output depends on more than one token, which is found out by trying.
        """
        if not size or not can_keep_logits(model) or isinstance(model.get_output_embeddings(), RoutedLinear):
            return None
        vocab_size = model.config.get_text_config().vocab_size
        from_head_BPV = torch.randn(2, 3, vocab_size, generator=torch.Generator().manual_seed(0))
        logits_BPV = _forward_around(model, from_head_BPV)
        flat_TV = from_head_BPV.flatten(0, 1)
        chunks = [_forward_around(model, chunk_TV.unsqueeze(0)).squeeze(0) for chunk_TV in flat_TV.split(4)]
        if not torch.equal(torch.cat(chunks), logits_BPV.flatten(0, 1)):
            return None
        return cls(model, size, is_plain=torch.equal(logits_BPV, from_head_BPV))

    def nll_sum(self, call: Callable[[], Any], places_T: Tensor, targets_T: Tensor, gradient: float) -> Tensor:
        """Sum of the negative log likelihoods of all targets (fp32 scalar).

        Args:
            call: calls the model so that its head sees hidden states (B, P, D)
            places_T: which of the B * P are predictions of a target
            targets_T: these targets
            gradient: that the sum will get in the backward pass; in fp16 what is smaller than its numbers would be lost
        """

        def of_head(hidden_BPD: Tensor) -> Tensor:
            hidden_TD = hidden_BPD.flatten(0, 1)[places_T]
            self._nll = ChunkedNll.apply(hidden_TD, targets_T, self._logits_of(forward), self._size, gradient)
            return self._nll.view(1, 1, 1)  # in place of logits

        forward = self._head.forward
        with _computes(self._head, of_head):
            in_place_of_logits = call().logits
        assert self._nll is not None, "the model has called its head"
        nll, self._nll = self._nll, None
        # The model's own code may have changed what came out. But it must be part of the graph: ZeRO-3 learns from the
        # gradient of a module's output that the module's backward pass begins.
        return nll + 0.0 * in_place_of_logits.sum()

    def _logits_of(self, forward: LogitsOf) -> LogitsOf:
        """What the head's `forward` and the model's code after it make of hidden states."""
        if self._is_plain:
            return forward
        return lambda hidden_TD: _forward_around(self._model, forward(hidden_TD).unsqueeze(0)).squeeze(0)


class ChunkedNll(torch.autograd.Function):
    """Sum of negative log likelihoods, its gradient formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_TD: Tensor, targets_T: Tensor, logits_of: LogitsOf, size: int, gradient: float
    ) -> Tensor:
        """fp32 scalar.

        Args:
            hidden_TD: (T, D), T may be 0
            targets_T: int64
            logits_of: of a chunk; its weights get no gradient
            size: tokens of a chunk
            gradient: which the sum is expected to get
        """
        total, grads = hidden_TD.new_zeros((), dtype=torch.float32), []
        for chunk_TD, chunk_T in zip(hidden_TD.split(size), targets_T.split(size), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):  # type: ignore[attr-defined]
                leaf_TD = chunk_TD.detach().requires_grad_(ctx.needs_input_grad[0])  # type: ignore[attr-defined]
                nll = nn.functional.cross_entropy(logits_of(leaf_TD).float(), chunk_T, reduction="sum")
            if leaf_TD.requires_grad:
                (grad_TD,) = torch.autograd.grad(nll, leaf_TD, nll.new_full((), gradient))
                grads.append(grad_TD)
            total += nll.detach()
        ctx.save_for_backward(torch.cat(grads) if grads else hidden_TD)
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient that the forward pass has formed."""
        (grad_TD,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_TD * (grad / ctx.gradient).to(grad_TD.dtype), None, None, None, None  # type: ignore[attr-defined]


def _forward_around(model: PreTrainedModel, from_head_BPV: Tensor, **arguments: Any) -> Tensor:
    """What the model's own forward makes of its head's output; body and head are not called, nor are their hooks."""
    body, head = model.base_model, model.get_output_embeddings()
    ids_BS = torch.zeros(from_head_BPV.shape[:2], dtype=torch.int64, device=from_head_BPV.device)
    from_body, from_head = _Computes(lambda *_, **__: _Hidden(from_head_BPV)), _Computes(lambda hidden: hidden)
    with _replaced(model, {body: from_body, head: from_head}):
        logits: Tensor = model.forward(ids_BS, **arguments).logits
    return logits


class _Computes(nn.Module):
    """A module that computes what it is told to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextmanager
def _replaced(model: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Inside the block others stand in for these modules of a model."""
    found = [(model, name, child) for name, child in model.named_children() if child in stand_ins]
    for parent, name, child in found:
        parent._modules[name] = stand_ins[child]
    try:
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


class _Hidden:
    """What a model's body gives back, of which only the last layer's output is looked at."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, _: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None


@contextmanager
def _computes(module: nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a module computes this instead of what it is for; its hooks stay."""
    own = vars(module).get("forward")
    module.forward = stand_in
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own

"""Floating-point operations of a micro-batch by formula: a product and a sum are two. Only matrix products count.

T tokens, H heads of d numbers, S keys, E experts of rank R, F = E R.

    a frozen matrix (D, O)    forward 2 T D O; backward as much for its input, and nothing for the weight
    attention                 forward 4 T S H d (masked or not); backward twice that
    experts                   forward 2 T F (D + O); backward as much for the inputs and as much for the factors
    mixers (moslora)          forward 2 O F R; backward twice that
    lengths of rows (dora)    forward 2 T E O for what the base says, 2 F D O and 2 F R (D + O) for the norms; backward
                              2 T E O for the gates and as much for the magnitudes
    router (E, D)             forward 2 T E D; backward twice that; `constant` has no product
    head (D, V)               as a frozen matrix, of the tokens before a target

What is computed again (layers with checkpointing, the scores of fused attention, mixed factors, the change of what the
base says) is counted apart: it is work, but no progress. In bf16 the logits of routers take a second product
(`product_fp32`), which is left out too.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dsmoelora.adapters import RoutedLinear
from dsmoelora.adapters.experts.bank import ExpertBank, Factor
from dsmoelora.adapters.experts.dora import DoraRows
from dsmoelora.adapters.four_bit import FrozenLinear4bit
from dsmoelora.adapters.routers.given import ConstantRouter
from dsmoelora.config import OptimConfig
from dsmoelora.planner.shapes import ParameterShape


class Work(StrEnum):
    """When operations happen, and whether the model learns from them."""

    FORWARD = "forward"
    BACKWARD = "backward"
    AGAIN = "computed again"


class Source(StrEnum):
    """Whose operations they are."""

    BASE = "base"
    ATTENTION = "attention"
    EXPERTS = "experts"
    ROUTERS = "routers"
    HEAD = "head"


Flops = Counter[tuple[Source, Work]]


def model_flops(flops: Flops) -> float:
    """Without what is computed again: what a share of the peak (MFU) is reckoned with."""
    return sum(count for (_, work), count in flops.items() if work is not Work.AGAIN)


@dataclass(frozen=True)
class TokenFlops:
    """What the model computes for a token, without what is computed again.

    Args:
        fixed: whatever the row's length
        per_key: of attention, for each token of the row
    """

    fixed: float
    per_key: float

    @staticmethod
    def of(flops: Flops, num_rows: int, length: int) -> TokenFlops:
        """Of a micro-batch of so many full rows."""
        attention = sum(flops[Source.ATTENTION, work] for work in (Work.FORWARD, Work.BACKWARD))
        num_tokens = num_rows * length
        return TokenFlops((model_flops(flops) - attention) / num_tokens, attention / num_tokens / length)

    def in_row(self, length: float) -> float:
        """Of a token in a row of so many."""
        return self.fixed + self.per_key * length


def optimizer_flops(trained: list[ParameterShape], optim: OptimConfig, stage: int = 3) -> int:
    """Of the preconditioner on a rank in a step; AdamW itself has no products.

    A Gram matrix of n numbers in rows of R takes 2 n R, a product with a matrix (R, R) as much. `scaled` takes one of
    each, `tangent` two; factorisations, of R^3 a pair, are left out. In stage 0 of ZeRO every rank does all.
    """
    products = {"none": 0, "scaled": 2, "tangent": 4}[optim.preconditioner]
    factors = [(one.piece if stage else one.numel, one.trainable) for one in trained if one.trainable is not None]
    return sum(2 * products * piece * of.row_size for piece, of in factors if of.factor in (Factor.A, Factor.B))


@dataclass
class FlopsOfModel:
    """Counts what a model's modules compute as they are called.

    Args:
        model: adapted
        is_fused: attention computes its scores again in the backward pass

    Attributes:
        found: of all calls
        is_backward: what is called now is called again
    """

    model: PreTrainedModel
    is_fused: bool
    found: Flops = field(default_factory=Counter)
    is_backward: bool = False

    def __post_init__(self) -> None:
        head = self.model.get_output_embeddings()
        self._head = head.base if isinstance(head, RoutedLinear) else head
        for module in self.model.modules():
            if isinstance(module, ExpertBank):
                # before the call: the last of a layer that is computed again does not come to its end
                module.register_forward_pre_hook(self._experts, with_kwargs=True)
            elif isinstance(module, DoraRows):
                module.register_forward_pre_hook(self._rows)
            elif _is_attention(module):
                module.register_forward_hook(self._attention, with_kwargs=True)
            elif not isinstance(module, nn.Embedding | ConstantRouter) and _has_matrices(module):
                module.register_forward_hook(self._matrices)

    def _add(self, source: Source, forward: float, backward: float, again: float = 0.0) -> None:
        if self.is_backward:
            self.found[source, Work.AGAIN] += round(forward)
            return
        self.found[source, Work.FORWARD] += round(forward)
        self.found[source, Work.BACKWARD] += round(backward)
        self.found[source, Work.AGAIN] += round(again)

    def _matrices(self, module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        """A linear layer, the experts of a base that has some, or a router."""
        x = args[0]
        num_tokens = x.numel() // x.shape[-1]
        for parameter in module.parameters(recurse=False):
            numel: float = parameter.numel()
            if isinstance(module, FrozenLinear4bit) and parameter is module.weight:
                numel = math.prod(module.shape)  # it is unpacked
            elif parameter.dim() < 2:
                continue
            elif parameter.dim() == 3:  # of each token's experts
                numel *= args[1].shape[-1] / parameter.shape[0]
            forward = 2 * num_tokens * numel
            source = Source.ROUTERS if parameter.requires_grad else Source.BASE
            if module is self._head:
                source = Source.HEAD
            self._add(source, forward, forward * (x.requires_grad + parameter.requires_grad))

    def _factor(self, num_tokens: int, factor: Tensor, input_learns: bool, source: Source = Source.EXPERTS) -> None:
        forward = 2 * num_tokens * factor.numel()
        self._add(source, forward, forward * (input_learns + factor.requires_grad))

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, ExpertBank)
        num_tokens, input_learns = args[1].shape[0], args[1].requires_grad
        self._factor(num_tokens, module.a, input_learns)
        self._factor(num_tokens, module.b, input_learns=True)
        if module.m is not None:
            mixed = 2 * module.b.numel() * module.m.shape[-1]
            self._add(Source.EXPERTS, mixed, 2 * mixed, again=mixed)
        if len(args) == 2:  # no gates are given
            for weight in module.joined_parameters:
                self._factor(num_tokens, weight, input_learns, Source.ROUTERS)

    def _rows(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The change of what the base says, and the norms; for their `W0 a` the base layer itself is called."""
        assert isinstance(module, DoraRows)
        _, x_TD, gate_TE, _ = args
        norms = 2 * (module.a.numel() + module.b.numel()) * module.a.shape[-1]
        change = 2 * gate_TE.numel() * module.b.shape[1]
        backward = change * (gate_TE.requires_grad + module.magnitude.requires_grad)
        self._add(Source.EXPERTS, norms + change, backward, again=change * x_TD.requires_grad)

    def _attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        num_rows, length = hidden.shape[:2]
        text = self.model.config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(module, "head_dim", None) or text.hidden_size // heads
        forward = 4 * num_rows * length**2 * heads * size
        found = output[0] if isinstance(output, tuple) else output
        learns = int(found.requires_grad)
        self._add(Source.ATTENTION, forward, 2 * forward * learns, forward / 2 * learns * self.is_fused)


def _has_matrices(module: nn.Module) -> bool:
    is_packed = isinstance(module, FrozenLinear4bit)
    return is_packed or any(one.dim() > 1 for one in module.parameters(recurse=False))


def _is_attention(module: nn.Module) -> bool:
    """The module whose own code brings queries and keys together."""

    def named(one: nn.Module) -> bool:
        return type(one).__name__.endswith("Attention")

    return named(module) and not any(named(part) for part in module.modules() if part is not module)

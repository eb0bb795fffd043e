"""One optimizer over shards: AdamW or SGD with a learning-rate multiplier per segment of rows.

The same code runs on plain parameters and on ZeRO's flat partitions. ZeRO sees one param group, so that one call of
`step()` has every gradient of a process group at hand; learning rates of `a`, `b` and routers are multipliers of
`group["lr"]`, and schedulers of torch and transformers work on that one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from dsmoelora.adapters.experts.bank import Factor
from dsmoelora.config import OptimConfig
from dsmoelora.config.checks import require
from dsmoelora.optim.clip import RouterClip
from dsmoelora.optim.frozen import FrozenGrams, frozen_grams
from dsmoelora.optim.packed import GroupStep, Part
from dsmoelora.optim.preconditioner import Preconditioner, RouterReport, StepReport
from dsmoelora.optim.rows import Segment, Shard, ShardGroup, Trainable, frozen_tensors, joined_spans, trainables, whole

_Alike = tuple[float, torch.device]  # numbers that one call updates: with one multiplier, on one device


def lr_multiplier(config: OptimConfig, factor: Factor) -> float:
    """Learning rate of a role as a multiple of `optim.lr`."""
    if factor is Factor.B:
        return config.lr_b_ratio
    if factor is Factor.ROUTER and config.lr_router is not None:
        return config.lr_router / config.lr
    return 1.0


class ShardOptimizer(torch.optim.Optimizer):
    """AdamW or SGD on shards.

    Before `bind`, `step()` does nothing (wrappers may call it once with zero gradients). `bind` makes the state of
    every shard at once, so no rank ever has other keys than the next. Moments live on the preconditioned gradient.

    Args:
        found: every trainable tensor and its parameter, from `trainables`
        config: which base optimizer, and its numbers
        frozen: Gram matrices of the factors that are not trained, where there is a preconditioner

    Attributes:
        trainables: the trainable tensors, of all experts and all ranks
        shards: what this rank holds of them, once bound
        skip: while True, `step()` leaves values and state alone
        keeps_sketches: while True, `step()` does nothing but put the gradient of every `a` in its place
        num_steps: steps applied, the `t` of Adam's bias correction
    """

    def __init__(
        self,
        found: Iterable[tuple[Trainable, nn.Parameter]],
        config: OptimConfig,
        frozen: FrozenGrams | None = None,
    ) -> None:
        found = list(found)
        super().__init__([parameter for _, parameter in found], {"lr": config.lr})
        self.config = config
        self.trainables = [trainable for trainable, _ in found]
        self.shards: list[Shard] = []
        self._frozen_grams = frozen or {}
        self._reporters: list[Preconditioner | RouterReport] = []
        self.skip = self.keeps_sketches = False
        self.num_steps = 0
        self._spans: dict[_Alike, list[tuple[Tensor, slice]]] = {}
        self._group_steps: dict[Tensor, GroupStep] = {}

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the moments that every shard has."""
        if self.config.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.config.momentum else ()

    def bind(self, groups: Iterable[ShardGroup]) -> None:
        """Learn which shards there are, and make their moments (flat, fp32, zero).

        Raises:
            ValueError: master values are not fp32, or there is nothing to precondition
        """
        for group in groups:
            self.shards += group.shards
            # ZeRO steps one process group at a time, with the gradients of that group alone at hand
            self._group_steps[group.shards[0].tensor] = GroupStep(group, self._parts_of(group))
        if self.config.preconditioner != "none" and not any(isinstance(one, Preconditioner) for one in self._reporters):
            raise ValueError("there is no pair (a, b) to precondition in any process group")
        for shard in self.shards:
            if shard.tensor.dtype != torch.float32:
                raise ValueError(f"master values are {shard.tensor.dtype}, but must be fp32: load the model in fp32")
            flat = shard.tensor.detach().view(-1)
            for multiplier, spans in self._spans_by_multiplier(shard.segments).items():
                alike = self._spans.setdefault((multiplier, flat.device), [])
                alike += [(shard.tensor, span) for span in spans]
            self.state[shard.tensor] = {name: torch.zeros_like(flat) for name in self.state_names}

    def _parts_of(self, group: ShardGroup) -> list[Part]:
        """What happens to the gradients of a process group before the base optimizer sees them."""
        parts: list[Part] = []
        has_routers = any(trainable.factor is Factor.ROUTER for trainable in group.trainables)
        if self.config.max_grad_norm_router and has_routers:
            parts.append(RouterClip(group, self.config.max_grad_norm_router))
        if self.config.preconditioner != "none":
            has_factors = any(trainable.factor in (Factor.A, Factor.B) for trainable in group.trainables)
            self._reporters.append(
                Preconditioner(group, self.config, self._frozen_grams) if has_factors else RouterReport(group)
            )
            parts.append(self._reporters[-1])
        return parts

    def set_frozen(self, frozen: FrozenGrams) -> None:
        """Learn the Gram matrices of the factors that are not trained, when these have become others."""
        for one in self._reporters:
            if isinstance(one, Preconditioner):
                one.set_frozen(frozen)

    @property
    def reports(self) -> list[StepReport]:
        """Of the last step with a preconditioner, one for each process group."""
        return [one.report for one in self._reporters if one.report is not None]

    def _spans_by_multiplier(self, segments: list[Segment]) -> dict[float, list[slice]]:
        """Where the numbers of each learning-rate multiplier lie; neighbours are joined, padding is left out."""
        by_multiplier: dict[float, list[Segment]] = {}
        for segment in segments:
            by_multiplier.setdefault(lr_multiplier(self.config, segment.of.factor), []).append(segment)
        return {multiplier: joined_spans(some) for multiplier, some in by_multiplier.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the shards of the param group from their gradients; one without a gradient stays as it is.

        Under ZeRO this is called once per optimizer step and process group, after unscaling and clipping.

        Args:
            closure: computes the gradients first; what it returns is returned
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.shards and not self.skip:
            self._keep_sketches() if self.keeps_sketches else self._step()
        return loss

    def _step(self) -> None:
        group = self.param_groups[0]
        if group["params"][0] is self.shards[0].tensor:  # the first process group opens the step
            self.num_steps += 1
        absent = [tensor for tensor in group["params"] if tensor.grad is None]  # in a loop of one's own
        for tensor in absent:
            tensor.grad = torch.zeros_like(tensor)
        for tensor in group["params"]:
            if tensor in self._group_steps:
                self._group_steps[tensor].apply()
        for tensor in absent:
            tensor.grad = None
        self._update({tensor for tensor in group["params"] if tensor.grad is not None}, group["lr"])

    def _keep_sketches(self) -> None:
        for shard in self.shards:
            if shard.tensor.grad is not None:
                value, grad = shard.tensor.detach().view(-1), shard.tensor.grad.view(-1)
                for span in joined_spans(segment for segment in shard.segments if segment.of.factor is Factor.A):
                    value[span] = grad[span]

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer of torch, with the number of steps."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where it stood."""
        super().load_state_dict(state_dict)
        self.num_steps = int(state_dict["num_steps"])

    def _update(self, tensors: set[Tensor], lr: float) -> None:
        """Move shards by their gradients, in one call for all numbers with one learning rate."""
        for (multiplier, _), places in self._spans.items():
            here = [(tensor, span) for tensor, span in places if tensor in tensors]
            if not here:
                continue
            values = [tensor.detach().view(-1)[span] for tensor, span in here]
            grads = [tensor.grad.view(-1)[span] for tensor, span in here]  # type: ignore[union-attr]
            moments = {name: [self.state[tensor][name][span] for tensor, span in here] for name in self.state_names}
            if self.config.name == "adamw":
                self._adamw(values, grads, moments, lr * multiplier)
            else:
                self._sgd(values, grads, moments, lr * multiplier)

    def _adamw(self, values: list[Tensor], grads: list[Tensor], moments: dict[str, list[Tensor]], lr: float) -> None:
        config = self.config
        # torch counts the step up itself; after infinitely many steps there is nothing left to correct
        steps_so_far = self.num_steps - 1 if config.bias_correction else torch.inf
        steps = torch.full((len(values),), float(steps_so_far), device=values[0].device)
        adamw(
            values,
            grads,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            max_exp_avg_sqs=[],
            state_steps=list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=lr,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )

    def _sgd(self, values: list[Tensor], grads: list[Tensor], moments: dict[str, list[Tensor]], lr: float) -> None:
        config = self.config
        buffers: list[Any] = moments.get("momentum_buffer") or [None] * len(values)
        sgd(
            values,
            grads,
            buffers,
            fused=True,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> ShardOptimizer:
    """The optimizer of an adapted model on plain tensors (no DeepSpeed): bound, ready to step.

    What is trained becomes fp32, in place, for small updates need it; layers compute in the dtype of the model as ever.

    Args:
        model: adapted by `inject`
        config: of the optimizer; its `max_grad_norm` and schedule are the business of the training loop

    Raises:
        ConfigError: it asks for `flat_noise`, which the engine writes into the base, not the optimizer
    """
    allowed = "0 where the training loop is not the engine's"
    require(not config.flat_noise, "optim.flat_noise", config.flat_noise, allowed, "Train with launch/train.py.")
    found = trainables(model)
    for _, parameter in found:
        parameter.data = parameter.data.float()
    frozen = frozen_grams(frozen_tensors(model)) if config.preconditioner != "none" else {}
    optimizer = ShardOptimizer(found, config, frozen)
    shards = [whole(trainable, parameter) for trainable, parameter in found]
    optimizer.bind([ShardGroup(optimizer.trainables, shards)])
    return optimizer

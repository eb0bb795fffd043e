"""The start factors of a run with `adapter.init: svd`, in shards, and the base that is shifted by them.

A singular value decomposition may come out with other signs on another machine, so a run that goes on takes its start
from the checkpoint. There the factors lie beside the values and moments that belong to them, in the same segments of
rows: any number of ranks in any placement can load them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters import Factor, RoutedLinear, adapted_layers
from dsmoelora.adapters.starts.svd import Dealers, StartFactors, shift_bases, start_experts, start_names
from dsmoelora.errors import ModelError
from dsmoelora.optim.rows import Shard, trainables
from dsmoelora.parallel import comm, zero

logger = logging.getLogger(__name__)

_open_weights = partial(zero.gathered, rewrite=True)


class StartShards:
    """What this rank holds of the start factors (methods are collective, but for `flat`).

    Args:
        model: adapted, its base untouched; not yet with DeepSpeed
        resumes: the start comes from a checkpoint; otherwise it is found now, each rank decomposing its share of the
            layers, and the base is shifted
        on_progress: called for every layer

    Attributes:
        flat: for each shard a flat tensor of the same segments, in the dtype of the model's weights, which holds the
            start exactly (what is not of a factor `a` or `b` means nothing)
    """

    def __init__(self, model: nn.Module, resumes: bool, on_progress: Callable[[], None]) -> None:
        self._model = model
        self._dtype = next(layer.base.weight.dtype for _, layer in adapted_layers(model))
        self._known = {trainable.name: trainable for trainable, _ in trainables(model)}
        self._shards: list[Shard] = []
        self.flat: list[Tensor] = []
        self._is_shifted = not resumes

        def broadcast(factor: Tensor, source: int) -> None:
            on_progress()
            comm.broadcast_tensor(factor, source)

        if not resumes:
            dealers = Dealers(comm.rank(), comm.world_size(), comm.together, broadcast)
            self._say(start_experts(model, _open_weights, dealers))

    def bind(self, shards: list[Shard]) -> None:
        """Remember the starting values of the optimizer's shards."""
        self._shards = shards
        self.flat = [shard.tensor.detach().view(-1).to(self._dtype, copy=True) for shard in shards]

    def check_untouched(self, checkpoint: Path) -> None:
        """Before a checkpoint is read into `flat`: whether `shift` may follow.

        Raises:
            ModelError: the base has been shifted already
        """
        if self._is_shifted:
            raise ModelError(
                f"{checkpoint} cannot be loaded: with adapter.init = svd it has a start of its own, and the base of "
                "this engine is shifted by another. Build the engine with resumes=True, and load once."
            )

    def shift(self) -> None:
        """Shift the untouched base of a run that goes on by what was loaded into `flat`."""

        def find(layer: RoutedLinear) -> StartFactors:
            return StartFactors(*(self._whole(name) for name in start_names(layer.name)))

        self._say(shift_bases(self._model, find, _open_weights))
        self._is_shifted = True

    def on_rank_0(self) -> dict[str, Tensor]:
        """The start of every factor, whole and on the CPU, on rank 0; nothing on the others."""
        found = {}
        for name, trainable in self._known.items():
            if trainable.factor in (Factor.A, Factor.B):
                values = self._whole(name)
                if comm.rank() == 0:
                    found[name] = values.cpu()
        return found

    def _whole(self, name: str) -> Tensor:
        """The start of one factor over all experts, on every rank."""
        shape = self._known[name].shape
        device = torch.device(get_accelerator().current_device_name())
        values = torch.zeros(math.prod(shape), device=device)  # fp32, which every backend can sum
        for shard, flat in zip(self._shards, self.flat, strict=True):
            for segment in shard.segments:
                if segment.of.name == name:
                    values[segment.start : segment.stop] = flat[segment.span]
        if all(shard.num_copies == 1 for shard in self._shards):
            comm.sum_over_ranks(values)
        return values.view(shape).to(self._dtype)

    def _say(self, lost: float) -> None:
        if comm.rank() == 0:
            what = "The base is shifted by the experts' start; rounding to %s changes %.2g of that."
            logger.info(what, self._dtype, lost)

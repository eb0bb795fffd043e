"""The start of a run with `adapter.init: loftq`, as found while the base was read (see `starts.loftq`).

Under ZeRO-3 that is rank 0 alone; in the other stages each rank reads them all, and takes rank 0's for its own, since
others could find other signs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.experts.bank import ExpertBank
from dsmoelora.adapters.four_bit import FrozenLinear4bit
from dsmoelora.adapters.starts.loftq import LoftqSearch
from dsmoelora.adapters.starts.svd import StartFactors, start_names
from dsmoelora.errors import ModelError
from dsmoelora.parallel import comm


class PackedStarts:
    """Gives the experts of all layers their start (collective).

    Args:
        model: adapted; the layers of its base come with what was found
        on_progress: called for every layer

    Raises:
        ModelError: the base was not loaded for these experts

    Attributes:
        start, taken: on rank 0 what the experts start from, and what the weights went without when they were packed,
            by the names of the factors, on the CPU; nothing on the others
    """

    def __init__(self, model: nn.Module, on_progress: Callable[[], None]) -> None:
        self.start: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        for name, layer in adapted_layers(model):
            base = layer.base
            if not (isinstance(base, FrozenLinear4bit) and isinstance(base.prepare, LoftqSearch)):
                raise ModelError(
                    f"adapter.init is 'loftq', but {name} was not packed with it. Load and adapt with Engine.build."
                )
            if comm.rank() == 0:
                for known, found in ((self.start, base.prepare.start), (self.taken, base.prepare.taken)):
                    assert found is not None, "rank 0 has read the weight"
                    known |= zip(start_names(name), (found.a_EDR, found.b_EOR), strict=True)
            _give(layer.experts, base.prepare.start if comm.rank() == 0 else None)
            base.prepare = None  # on the other ranks nobody needs it
            on_progress()


@torch.no_grad()
def _give(bank: ExpertBank, found: StartFactors | None) -> None:
    """Set the factors of the experts that lie here to those that rank 0 has found."""
    empty = (torch.empty(bank.shapes[name], dtype=bank.a.dtype) for name in ("a", "b"))
    start = found or StartFactors(*empty)
    held = slice(bank.held.start, bank.held.stop)
    for factor, whole in ((bank.a, start.a_EDR), (bank.b, start.b_EOR)):
        factor.copy_(comm.broadcast_tensor(whole)[held])

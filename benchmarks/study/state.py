"""What a cell goes on with: values, moments, and what routers' losses and biases go by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.optim import ShardOptimizer, trainables


class State:
    """Of a cell that has not come to its end.

    Args:
        model: adapted
        optimizer: of its adapters
        log: of its routers
        folder: where states lie between two times, under the number of the step
    """

    def __init__(self, model: nn.Module, optimizer: ShardOptimizer, log: RoutingLog, folder: Path) -> None:
        self._model, self._optimizer, self._log, self._folder = model, optimizer, log, folder

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for of, parameter in trainables(self._model):
            yield of.name, parameter.detach()
            for name, moment in self._optimizer.state[parameter].items():
                yield f"{of.name}.{name}", moment

    def save(self, step: int) -> None:
        """As a whole or not at all."""
        partial = self._folder / "state.partial"
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors()}
        save_file(tensors, partial, {"routing": json.dumps(self._log.state())})
        partial.replace(self._folder / f"state-{step}.safetensors")

    def load(self, step: int, begin: int = 0) -> None:
        """Go on where it stood after so many steps, of which an optimizer of before took the first ones."""
        with safe_open(self._folder / f"state-{step}.safetensors", "pt") as found:
            for name, tensor in self._tensors():
                tensor.copy_(found.get_tensor(name))
            self._log.load_state(json.loads(found.metadata()["routing"]))
        self._optimizer.num_steps = step - begin


def alone(cell: Path) -> Path:
    """Where a cell keeps the adapter that learned before the others."""
    return cell / "alone"


def has_state(cell: Path, step: int) -> bool:
    """Whether a cell can go on from there."""
    return (cell / f"state-{step}.safetensors").exists() or alone(cell).exists()


def forget_states(cell: Path, all_but: int | None = None) -> None:
    """Remove the states of a cell's folder and its first adapter; or all states but that of a step."""
    for file in cell.glob("state-*.safetensors"):
        if file.name != f"state-{all_but}.safetensors":
            file.unlink()
    if all_but is None:
        shutil.rmtree(alone(cell), ignore_errors=True)

"""How much of the devices' peak the model's own work takes (MFU)."""

from __future__ import annotations

from collections.abc import Callable

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.engine import StepResult

MFU = "mfu(%)"


class Utilisation(Callback):
    """Adds the share of the peak to the metrics: products that the model learns from, over what was possible.

    A frozen base has no weight gradients, so none are counted; what is computed again and padding are no progress, so
    they are not counted either. Nothing is asked of the device.

    Args:
        flops_of_token: for a token in a row of so many
        peak: of all ranks together, operations a second
    """

    def __init__(self, flops_of_token: Callable[[float], float], peak: float) -> None:
        self._flops_of_token, self._peak = flops_of_token, peak

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        speed = run.metrics["throughput(tokens/s)"] or 0.0
        length = result.num_tokens / run.recipe.train.batch_size
        run.metrics[MFU] = 100 * speed * self._flops_of_token(length) / self._peak

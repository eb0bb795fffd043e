"""The canary: looks after a few steps whether every adapter tensor received a gradient and moved."""

from __future__ import annotations

import logging

from dsmoelora.adapters.targets import layer_config
from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.config import AdapterConfig
from dsmoelora.engine import StepResult
from dsmoelora.errors import listing
from dsmoelora.parallel import comm

logger = logging.getLogger(__name__)

# More than one, for `b` starts at 0 and so the first gradient of `a` is 0, and the warm-up's first rate may be.
NUM_WATCHED_STEPS = 3


class Canary(Callback):
    """Watches the first steps of a run and names the adapter tensors that take no part in it (all ranks).

    Adds `canary/dead_tensors` to the metrics of the step it looks at. Silence means that all is well.
    """

    def __init__(self) -> None:
        self._steps_left = 0

    def on_train_begin(self, run: TrainingRun) -> None:
        if run.start_step == 0 and run.num_steps >= NUM_WATCHED_STEPS:
            self._steps_left = NUM_WATCHED_STEPS
            run.engine.watch.start()

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        if not self._steps_left or result.skipped:  # a skipped step moves nothing and proves nothing
            return
        self._steps_left -= 1
        if self._steps_left == 0:
            self._look(run)

    def _look(self, run: TrainingRun) -> None:
        statistics = run.engine.watch.stop()
        # Negated comparisons, so that NaN counts as dead too.
        without_gradient = [
            name
            for name, found in statistics.items()
            if not found["grad_norm"] > 0 and not (found["grad_norm"] == 0 and _may_rest(name, run.recipe.adapter))
        ]
        unmoved = [name for name, found in statistics.items() if found["grad_norm"] > 0 and not found["moved"] > 0]
        run.metrics["canary/dead_tensors"] = float(len(without_gradient) + len(unmoved))
        if comm.rank() > 0:
            return
        for names, what in ((without_gradient, "received no gradient"), (unmoved, "did not move")):
            if names:
                logger.warning(
                    "%d of %d adapter tensors %s in the first %d steps: %s. Look at adapter.target_modules, "
                    "the learning rates, and whether the model uses these layers at all.",
                    *(len(names), len(statistics), what, NUM_WATCHED_STEPS, listing(names)),
                )


def _may_rest(name: str, config: AdapterConfig) -> bool:
    """Whether a tensor has no gradient where no prompt has chosen its module, which health tells."""
    layer, is_of_experts, _ = name.partition(".experts.")
    return bool(is_of_experts) and layer_config(config, layer).style == "decoder_layer"

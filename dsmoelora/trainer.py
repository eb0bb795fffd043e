"""The training loop: a thin sequence of steps, evaluations and checkpoints, with hooks for everything else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmoelora.callbacks import (
    Callback,
    Canary,
    MetricsFile,
    PeakMemory,
    ProgressBar,
    RouterHealth,
    Samples,
    Summary,
    TrainingRun,
)
from dsmoelora.data import InstructionDataset, MicroBatch, Packing, eval_micro_batches, first_micro_batches, train_steps
from dsmoelora.data.streaming import Peers, StreamedSets
from dsmoelora.engine import Engine, StepResult
from dsmoelora.errors import HopelessError, bad_value
from dsmoelora.parallel import comm
from dsmoelora.parallel.stopping import Stopped
from dsmoelora.run.files import ADAPTER_FOLDER, DONE_FILE, FAILED_FILE
from dsmoelora.run.identity import check_identity, identity_of

logger = logging.getLogger(__name__)


def default_callbacks(
    console: Console,
    trackers: Sequence[Callback],
    scores: Sequence[Callback] = (),
    measures: Sequence[Callback] = (),
) -> list[Callback]:
    """The callbacks of an ordinary run, on this rank; what only reads and writes is on rank 0 alone.

    Args:
        console: what the user looks at
        trackers: from `open_trackers`, on rank 0
        scores: what evaluations measure beside the loss, on every rank
        measures: what steps are measured by beside their time, on rank 0
    """
    if comm.rank() > 0:
        return [Canary(), RouterHealth(), *scores, Samples(console)]
    # Canary and health add to the metrics, so they come before those who write them. The bar ends before tables are
    # printed.
    health: list[Callback] = [Canary(), RouterHealth(), *scores, *measures]
    return [*health, ProgressBar(console), MetricsFile(), *trackers, Samples(console), Summary(console)]


class Trainer:
    """Takes the engine from where it stands to `train.max_steps` (all methods are collective).

    Args:
        engine: built, at step 0
        folder: of the run; checkpoints, metrics and the adapter go there
        train_data: what is learned
        eval_data: held-out samples; without them nothing is evaluated
        callbacks: called in this order; the same kinds of collective callbacks on every rank
        packing: which training samples share a row, where the recipe says `data.packing`
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        train_data: InstructionDataset | StreamedSets,
        eval_data: InstructionDataset | None,
        callbacks: Sequence[Callback],
        packing: Packing | None = None,
    ) -> None:
        assert (packing is not None) == engine.recipe.data.packing, "the recipe says whether rows are packed"
        self._engine = engine
        self._callbacks = callbacks
        self.train_data = train_data
        self._stream = train_data if isinstance(train_data, StreamedSets) else None
        self._packing = packing
        self._stream_state: dict[str, Any] | None = None
        self._eval_batches = [] if eval_data is None else eval_micro_batches(eval_data, **self._dealing())
        self._memory = PeakMemory()
        self._saved_in: Path | None = None
        self._skipped_in_a_row = 0
        self.run = TrainingRun(engine.recipe, engine, folder, eval_data, metrics={"step": engine.step})

    def fit(self, resume_from: Path | None = None, describe: Callable[[], object] = lambda: None) -> None:
        """Train, evaluate and save as the recipe says, or until the engine's `stop` says otherwise.

        A run that came to its end leaves a file `DONE`. One that was asked to stop leaves a checkpoint of its last
        step, and goes on from there to the same end as if nothing had happened.

        Args:
            resume_from: checkpoint to go on from
            describe: writes down what this run is, on rank 0, when the checkpoint has been accepted

        Raises:
            CheckpointError: the checkpoint was trained with something else, see `identity`
            ModelError: rows are packed, and the model's samples would see each other
            HopelessError: the model is not finite, or `train.max_skipped_steps` in a row were not
        """
        self._mark(FAILED_FILE, None)
        try:
            self._train(resume_from, describe)
        except Stopped:
            self._leave()
        except HopelessError as error:
            self._mark(FAILED_FILE, str(error))
            raise

    def _train(self, resume_from: Path | None, describe: Callable[[], object]) -> None:
        run, recipe = self.run, self._engine.recipe.train
        if self._packing is not None:
            self._engine.check_packing()
        if resume_from is not None:
            self._resume(resume_from)
        comm.together(lambda: describe() if comm.rank() == 0 else None)
        self._mark(DONE_FILE, None)
        self._check_finite()
        self._memory.start()
        if self._engine.recipe.adapter.init == "gradient" and resume_from is None:
            self._draw_start()
        self._call("on_train_begin")
        steps = self._steps()
        if run.first_row == run.step:
            steps = self._look_at_start(steps)
        while run.step < recipe.max_steps:
            self._step(steps)
            if self._evaluation_is_due():
                self._evaluate()
            self._finish_metrics()
            if run.step == recipe.max_steps or (recipe.save_every and run.step % recipe.save_every == 0):
                self._save()
            if self._engine.stop.agreed and run.step < recipe.max_steps:
                raise Stopped
        self._engine.save_adapter(run.folder / ADAPTER_FOLDER)
        self._memory.stop()
        self._mark(DONE_FILE, "")  # what follows is talk: a request to stop may cut it short
        self._call("on_train_end")

    def _draw_start(self) -> None:
        """Let the experts start from the gradient of the rows that training begins with, and will learn from too."""
        recipe, data = self._engine.recipe, self.train_data
        num_rows = recipe.adapter.init_samples
        if isinstance(data, StreamedSets):
            state = data.state()
            batches = next(self._streamed_steps(data, num_rows))
            comm.together(lambda: data.load_state(state))
        else:
            dealing, seed = self._dealing(), recipe.run.seed
            batches = first_micro_batches(data, num_rows=num_rows, seed=seed, packing=self._packing, **dealing)
        report = self._engine.draw_start(batches)
        if comm.rank() == 0:
            text = "adapter.init gradient: %d directions of experts are those of the gradient of %d rows, %d are drawn"
            logger.info(text, report.num_directions - report.num_drawn, num_rows, report.num_drawn)

    def _streamed_steps(self, stream: StreamedSets, batch_size: int) -> Iterator[list[MicroBatch]]:
        peers = Peers(comm.rank(), comm.world_size(), comm.together, comm.all_reduce_sum, comm.gather_objects)
        dealing = self._dealing()
        sizes = {"batch_size": batch_size, "micro_batch_size": dealing["micro_batch_size"]}
        return stream.steps(**sizes, peers=peers, pad_token_id=dealing["pad_token_id"])

    def _steps(self) -> Iterator[list[MicroBatch]]:
        recipe, dealing = self._engine.recipe, self._dealing()
        if isinstance(self.train_data, StreamedSets):
            return self._streamed_steps(self.train_data, recipe.train.batch_size)
        return train_steps(
            self.train_data,
            seed=recipe.run.seed,
            batch_size=recipe.train.batch_size,
            start_step=self.run.step,
            packing=self._packing,
            **dealing,
        )

    def _step(self, steps: Iterator[list[MicroBatch]]) -> None:
        begin = time.perf_counter()
        result = self._engine.train_step(next(steps))
        seconds = time.perf_counter() - begin
        if self._stream is not None:  # a step that is cut short does not come here, and is done again
            self._stream_state = self._stream.state()
        self.run.metrics = self._metrics(result, seconds)
        if result.skipped and comm.rank() == 0:
            logger.warning(
                "step %d was skipped: loss %s, gradient norm %s", self.run.step, result.loss, result.grad_norm
            )
        self._call("on_step_end", result)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if self._skipped_in_a_row >= self._engine.recipe.train.max_skipped_steps:
            raise self._hopeless()

    def _check_finite(self) -> None:
        name = self._engine.first_not_finite()
        if name is not None:
            raise HopelessError(
                f"{name} has numbers that are not finite before step {self.run.step + 1}, so no loss could be. Copy or "
                "download the model again, or go back to an older checkpoint."
            )

    def _hopeless(self) -> HopelessError:
        name = self._engine.first_not_finite()
        found = "all weights are finite" if name is None else f"{name} is the first tensor that is not finite"
        return HopelessError(
            f"The last {self._skipped_in_a_row} steps were skipped, for loss or gradient were not finite "
            f"(train.max_skipped_steps); {found}. Likely causes: optim.lr is too high for this model, or numbers go "
            "beyond those of fp16. Lower optim.lr, or set model.dtype to bf16 or fp32."
        )

    def _metrics(self, result: StepResult, seconds: float) -> dict[str, float | None]:
        return {
            "step": self.run.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "throughput(tokens/s)": result.num_tokens / seconds,
            "skipped_steps": self._engine.skipped_steps,
            **result.preconditioning,
            **({} if self._stream is None else self._stream.metrics()),
            **{f"losses/{name}": value for name, value in result.router_losses.items()},
        }

    def _look_at_start(self, steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """Fill the line of metrics that belongs to no step of this process; returns the steps, none of them lost."""
        is_shifted = self.run.step == 0 and self._engine.recipe.adapter.init == "svd"
        if self._evaluation_is_due():
            self._evaluate()
        if is_shifted and self._eval_batches:
            self._measure_gap(self._eval_batches)
        elif is_shifted:
            first = next(steps)
            self._measure_gap(first)
            steps = chain([first], steps)
        if is_shifted or self._evaluation_is_due():
            self._finish_metrics()
        return steps

    def _measure_gap(self, batches: list[MicroBatch]) -> None:
        """How far the routers take the loss from that of the base, which the model has with gates of 1 / E."""
        routed = self.run.metrics.get("eval/loss")
        if routed is None:
            routed = self._engine.evaluate(batches)
        base = self._engine.evaluate(batches, routed=False)
        self.run.metrics |= {"start/base_loss": base, "start/loss_gap": routed - base}
        if comm.rank() == 0:
            text = "adapter.init svd: before the first step the loss is %.4f; the base model's is %.4f (gap %+.4f)"
            logger.info(text, routed, base, routed - base)

    def _evaluation_is_due(self) -> bool:
        every = self._engine.recipe.train.eval_every
        if not self._eval_batches or not every:
            return False
        return self.run.step % every == 0 or self.run.step == self.run.num_steps

    def _is_evaluated(self) -> bool:
        """Whether nothing of the present step is missing; a request to stop may have cut its evaluation short."""
        return not self._evaluation_is_due() or self.run.step in dict(self.run.evaluations)

    def _evaluate(self) -> None:
        loss = self._engine.evaluate(self._eval_batches)
        self.run.metrics["eval/loss"] = loss
        self._call("on_evaluate", loss)
        self.run.evaluations.append((self.run.step, loss))  # now it is whole: a request to stop may come before

    def _finish_metrics(self) -> None:
        self.run.metrics["memory/peak(GiB)"] = self._memory.gib()
        self._call("on_metrics")
        self.run.tables.clear()

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "stream": self._stream_state,
            "evaluations": self.run.evaluations,
            "open_line": None if self._is_evaluated() else {"metrics": self.run.metrics, "tables": self.run.tables},
            "callbacks": {type(callback).__name__: kept for callback in self._callbacks if (kept := callback.state())},
        }
        checkpoint = self._engine.save(self.run.folder, state, self._engine.recipe.train.keep_checkpoints)
        self._saved_in = checkpoint
        self._call("on_save", checkpoint)
        self._engine.stop.look()

    def _leave(self) -> None:
        """Save what is not saved yet, and say where (collective)."""
        run = self.run
        if run.step > run.start_step and (self._saved_in is None or self._saved_in.name != f"checkpoint-{run.step}"):
            self._save()
        if (run.folder / DONE_FILE).exists():
            what = "the run is finished, but for the answers to the prompts."
        elif self._saved_in is None:
            what = "no step had been taken."
        else:
            what = f"step {run.step} of {run.num_steps} lies in {self._saved_in}. Go on with --resume auto."
        self._engine.stop.leave(what)
        self._memory.stop()
        self._call("on_stop")

    def _mark(self, name: str, text: str | None) -> None:
        """Write a file into the run folder, or take it away where there is no text (rank 0)."""
        mark = self.run.folder / name

        def write() -> None:
            if comm.rank() == 0:
                mark.unlink(missing_ok=True) if text is None else mark.write_text(text, encoding="utf-8")

        comm.together(write)

    def _resume(self, checkpoint: Path) -> None:
        now = self._identity()
        state = self._engine.load(checkpoint, lambda state: check_identity(checkpoint, state["identity"], now))
        max_steps = self._engine.recipe.train.max_steps
        if self.run.step > max_steps:
            taken = f"{checkpoint} has taken as many steps already."
            raise bad_value("train.max_steps", max_steps, f"{self.run.step} or more", taken)
        if self._stream is not None:
            stream, self._stream_state = self._stream, state["stream"]
            comm.together(lambda: stream.load_state(state["stream"]))
        self._saved_in = checkpoint
        self.run.start_step = self.run.step
        self.run.evaluations = [(int(step), float(loss)) for step, loss in state["evaluations"]]
        if (line := state["open_line"]) is not None:
            self.run.metrics, self.run.tables, self.run.is_open = line["metrics"], line["tables"], True
        for callback in self._callbacks:
            kept = state["callbacks"].get(type(callback).__name__)
            if kept is not None:
                callback.load_state(kept)

    def _identity(self) -> dict[str, Any]:
        eval_data, engine = self.run.eval_data, self._engine
        held_out = None if eval_data is None else eval_data.fingerprint
        return identity_of(engine.recipe, engine.base_fingerprint, self.train_data.fingerprint, held_out)

    def _dealing(self) -> dict[str, int]:
        """How batches are dealt out to ranks."""
        pad_token_id = self._engine.tokenizer.pad_token_id
        assert isinstance(pad_token_id, int), "load_tokenizer sets a pad token"
        return {
            "micro_batch_size": self._engine.recipe.train.micro_batch_size,
            "rank": comm.rank(),
            "world_size": comm.world_size(),
            "pad_token_id": pad_token_id,
        }

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self.run, *args)

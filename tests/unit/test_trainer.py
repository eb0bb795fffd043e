"""The loop: what happens at which step, and that an interrupted run ends like one that was not."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from dsmoelora.callbacks import Callback, MetricsFile, Samples, TrainingRun
from dsmoelora.callbacks.tensorboard import TensorBoard
from dsmoelora.config import DataConfig, DataSource, Recipe, RunConfig, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.data.packing import pack
from dsmoelora.data.streaming import StreamedSets
from dsmoelora.data.tokenised import TokeniseOptions
from dsmoelora.engine import StepResult
from dsmoelora.errors import CheckpointError, HopelessError
from dsmoelora.parallel.stopping import Stopped, StopRequest
from dsmoelora.run.files import read_metrics
from dsmoelora.trainer import Trainer, default_callbacks
from tests.fake_engine import FakeDataset, FakeEngine
from tests.helpers import tiny_tokenizer


def make_recipe(seed: int = 0, **train: Any) -> Recipe:
    defaults = {"max_steps": 7, "batch_size": 4, "micro_batch_size": 2, "eval_every": 3, "save_every": 2}
    return Recipe(run=RunConfig(seed=seed), train=TrainConfig(**defaults | train))


def make_trainer(
    engine: FakeEngine, folder: Path, callbacks: list[Callback], *, held_out: int = 3, data: str = "data"
) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    train_data, eval_data = FakeDataset(50, data), FakeDataset(held_out) if held_out else None
    return Trainer(cast(Any, engine), folder, cast(Any, train_data), cast(Any, eval_data), callbacks)


class Recorder(Callback):
    """Writes down every hook with the step at which it was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_begin(self, run: TrainingRun) -> None:
        self.calls.append(f"begin {run.step}")

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        self.calls.append(f"step {run.step}")

    def on_evaluate(self, run: TrainingRun, loss: float) -> None:
        self.calls.append(f"evaluate {run.step}")

    def on_metrics(self, run: TrainingRun) -> None:
        self.calls.append(f"metrics {run.step}")

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        self.calls.append(f"save {run.step}")

    def on_train_end(self, run: TrainingRun) -> None:
        self.calls.append(f"end {run.step}")


def test_hooks_come_in_this_order(tmp_path: Path) -> None:
    recorder = Recorder()
    make_trainer(FakeEngine(make_recipe(max_steps=3, eval_every=2, save_every=2)), tmp_path, [recorder]).fit()
    assert recorder.calls == [
        *("begin 0", "evaluate 0", "metrics 0"),
        *("step 1", "metrics 1"),
        *("step 2", "evaluate 2", "metrics 2", "save 2"),
        *("step 3", "evaluate 3", "metrics 3", "save 3", "end 3"),
    ]


@pytest.mark.parametrize("held_out", [0, 3])
def test_the_gap_to_the_base_is_measured_once_where_experts_start_from_singular_vectors(
    tmp_path: Path, held_out: int
) -> None:
    recipe = make_recipe(max_steps=3, eval_every=2, save_every=2)
    recipe.adapter.init = "svd"
    engine = FakeEngine(recipe)
    make_trainer(engine, tmp_path, [MetricsFile()], held_out=held_out).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["start/base_loss"] == 3.5 and rows[0]["start/loss_gap"] == 0.5
    assert ("eval/loss" in rows[0]) == bool(held_out)
    assert not any("start/base_loss" in row for row in rows[1:])
    assert engine.calls[:2] == ["evaluate at 0", "evaluate base at 0"]

    engine = FakeEngine(recipe)
    make_trainer(engine, tmp_path / "on", [MetricsFile()], held_out=held_out).fit(tmp_path / "checkpoint-2")
    assert not any(call.startswith("evaluate base") for call in engine.calls), "a run that goes on has left the start"


def test_the_batch_that_the_gap_is_measured_on_is_learned_from_too(tmp_path: Path) -> None:
    """A stream gives each batch once, and without held-out data the gap is that of the first."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "x"}}\n' for i in range(9)))
    tokenizer, options = tiny_tokenizer(tmp_path / "tokenizer"), TokeniseOptions(60)
    found = []
    for init in ("kaiming", "svd", "gradient"):
        recipe = make_recipe(max_steps=5)
        recipe.adapter.init = init
        data = StreamedSets([DataSource(str(tmp_path / "a.jsonl"))], "data.train", tokenizer, options, 0, 4)
        folder = tmp_path / init
        folder.mkdir()
        Trainer(cast(Any, FakeEngine(recipe)), folder, data, None, [MetricsFile()]).fit()
        state = json.loads((folder / "checkpoint-2" / "state.json").read_text())["caller"]["stream"]
        found.append((losses(folder), state))
    (kaiming, its_state), (svd, state), from_gradient = found
    assert from_gradient == (kaiming, its_state)
    assert svd.pop(0) == (None, None) and 0 not in kaiming  # the line of the gap
    assert svd == kaiming and state == its_state


def test_experts_start_from_the_first_rows_which_are_learned_from_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything else, once in a run, and no row is lost by it."""
    found = []
    for init in ("kaiming", "gradient"):
        recipe = make_recipe(max_steps=4)
        recipe.adapter.init, recipe.adapter.init_samples = init, 5  # type: ignore[assignment]
        engine = FakeEngine(recipe)
        with caplog.at_level("INFO"):
            make_trainer(engine, tmp_path / init, [MetricsFile()]).fit()
        found.append((engine.calls, losses(tmp_path / init)))
    (calls, expected), (with_start, learned) = found
    assert with_start == ["draw_start of [0, 1, 2, 3, 4] at 0", *calls] and learned == expected
    assert "9 directions of experts are those of the gradient of 5 rows, 3 are drawn" in caplog.text

    engine = FakeEngine(recipe)
    make_trainer(engine, tmp_path / "on", []).fit(tmp_path / "gradient" / "checkpoint-2")
    assert not any(call.startswith("draw_start") for call in engine.calls)


def calls_at(engine: FakeEngine, what: str) -> list[int]:
    return [int(call.split()[-1]) for call in engine.calls if call.startswith(what + " ")]


@pytest.mark.parametrize(
    ("max_steps", "eval_every", "evaluations"),
    [(7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6]), (5, 9, [0, 5]), (5, 0, [])],
)
def test_evaluations_at_the_start_at_the_end_and_between(
    tmp_path: Path, max_steps: int, eval_every: int, evaluations: list[int]
) -> None:
    engine = FakeEngine(make_recipe(max_steps=max_steps, eval_every=eval_every))
    make_trainer(engine, tmp_path, []).fit()
    assert calls_at(engine, "evaluate") == evaluations


def test_no_evaluation_without_held_out_data(tmp_path: Path) -> None:
    engine = FakeEngine(make_recipe())
    make_trainer(engine, tmp_path, [], held_out=0).fit()
    assert calls_at(engine, "evaluate") == []


@pytest.mark.parametrize(("save_every", "checkpoints"), [(2, [2, 4, 6, 7]), (7, [7]), (0, [7])])
def test_checkpoints_between_and_at_the_end(tmp_path: Path, save_every: int, checkpoints: list[int]) -> None:
    engine = FakeEngine(make_recipe(save_every=save_every))
    make_trainer(engine, tmp_path, []).fit()
    assert calls_at(engine, "save") == checkpoints
    assert calls_at(engine, "save_adapter") == [7]


class Interrupt(Callback):
    """Ends the process, as it were, after a step: before its metrics and its checkpoint."""

    def __init__(self, after: int) -> None:
        self._after = after

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        if run.step == self._after:
            raise KeyboardInterrupt


def losses(folder: Path) -> dict[int, tuple[Any, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    assert len({row["step"] for row in rows}) == len(rows), "a step is there twice"
    return {int(row["step"] or 0): (row.get("loss"), row.get("eval/loss")) for row in rows}


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    make_trainer(FakeEngine(make_recipe()), straight, [MetricsFile()]).fit()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(FakeEngine(make_recipe()), broken, [MetricsFile(), Interrupt(after=6)]).fit()
    assert max(losses(broken)) == 5  # one step beyond the checkpoint that the run goes on from
    engine = FakeEngine(make_recipe())
    trainer = make_trainer(engine, broken, [MetricsFile()])
    trainer.fit(broken / "checkpoint-4")
    assert losses(broken) == losses(straight)
    assert calls_at(engine, "evaluate") == [6, 7]
    assert trainer.run.evaluations == [(0, 4.0), (3, 3.7), (6, 3.4), (7, 3.3)]


def test_an_interrupted_run_on_packed_rows_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """16 rows of three samples, and one of the last two; the loss tells which samples a step saw."""
    recipe = replace(make_recipe(), data=DataConfig(packing=True))
    packing = pack(FakeDataset(50).num_tokens, 10, seed=0)
    assert len(packing) == 17

    def fit(folder: Path, *callbacks: Callback, resume_from: Path | None = None) -> FakeEngine:
        folder.mkdir(exist_ok=True)
        engine, data = FakeEngine(recipe), FakeDataset(50)
        metrics = [MetricsFile(), *callbacks]
        Trainer(cast(Any, engine), folder, cast(Any, data), None, metrics, packing).fit(resume_from)
        return engine

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit(straight).calls[0] == "check_packing at 0"
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Interrupt(after=6))
    fit(broken, resume_from=broken / "checkpoint-4")
    assert losses(broken) == losses(straight)
    with pytest.raises(CheckpointError, match=r"data\.packing was true, and is false"):
        make_trainer(FakeEngine(make_recipe()), broken, []).fit(broken / "checkpoint-4")


def test_answers_of_before_survive_a_resume(tmp_path: Path) -> None:
    recipe = make_recipe(max_steps=4, num_samples=2)
    make_trainer(FakeEngine(recipe), tmp_path, [Samples(Console(quiet=True))]).fit()
    engine, samples = FakeEngine(make_recipe(max_steps=6, num_samples=2)), Samples(Console(quiet=True))
    make_trainer(engine, tmp_path, [samples]).fit(tmp_path / "checkpoint-4")
    assert samples.state() == {"before": ["step 0: question 0", "step 0: question 1"]}
    assert calls_at(engine, "generate") == [6]


def test_a_finished_run_can_be_resumed_and_takes_no_step(tmp_path: Path) -> None:
    make_trainer(FakeEngine(make_recipe()), tmp_path, [MetricsFile()]).fit()
    before = losses(tmp_path)
    engine = FakeEngine(make_recipe())
    make_trainer(engine, tmp_path, [MetricsFile()]).fit(tmp_path / "checkpoint-7")
    assert losses(tmp_path) == before
    assert engine.calls == ["save_adapter at 7"]


@pytest.mark.parametrize(
    ("recipe", "data", "what"),
    [
        (make_recipe(seed=1), "data", "run.seed was 0, and is 1"),
        (make_recipe(batch_size=8), "data", "train.batch_size was 4, and is 8"),
        (make_recipe(), "other", "data.train was other rows"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, recipe: Recipe, data: str, what: str) -> None:
    make_trainer(FakeEngine(make_recipe()), tmp_path, []).fit()
    with pytest.raises(CheckpointError, match=what):
        make_trainer(FakeEngine(recipe), tmp_path, [], data=data).fit(tmp_path / "checkpoint-4")


def test_a_run_that_skips_step_after_step_ends(tmp_path: Path) -> None:
    recipe = make_recipe()
    recipe.train.max_skipped_steps = 3
    engine = FakeEngine(recipe, skipped=(1, 2, 4, 5, 6))
    with pytest.raises(HopelessError, match=r"The last 3 steps were skipped.*all weights are finite"):
        make_trainer(engine, tmp_path, [MetricsFile()]).fit()
    assert engine.step == 6 and not (tmp_path / "DONE").exists()
    assert (tmp_path / "FAILED").read_text().startswith("The last 3 steps were skipped")
    make_trainer(FakeEngine(recipe), tmp_path, []).fit(tmp_path / "checkpoint-4")
    assert (tmp_path / "DONE").exists() and not (tmp_path / "FAILED").exists()


def test_a_model_that_is_not_finite_takes_no_step(tmp_path: Path) -> None:
    engine = FakeEngine(make_recipe())
    engine.not_finite = "model.norm.weight"
    with pytest.raises(HopelessError, match=r"model\.norm\.weight has numbers that are not finite before step 1"):
        make_trainer(engine, tmp_path, []).fit()
    assert engine.step == 0 and (tmp_path / "FAILED").exists() and not (tmp_path / "DONE").exists()


def test_skipped_steps_are_counted_and_are_null_in_the_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(FakeEngine(make_recipe(), skipped=(2, 3)), tmp_path, [MetricsFile()]).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["loss"] is None for row in rows[1:]] == [False, True, True, False, False, False, False]
    assert [row["skipped_steps"] for row in rows[1:]] == [0, 1, 2, 2, 2, 2, 2]
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 2 was skipped", "step 3 was skipped"]


def test_metrics_have_the_names_of_the_design(tmp_path: Path) -> None:
    make_trainer(FakeEngine(make_recipe()), tmp_path, [MetricsFile()]).fit()
    first, second, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first.keys() == {"step", "eval/loss", "memory/peak(GiB)"}
    common = {"step", "loss", "grad_norm", "lr", "throughput(tokens/s)", "memory/peak(GiB)", "skipped_steps"}
    assert second.keys() == common
    assert last.keys() == common | {"eval/loss"}
    assert first["eval/loss"] == 4.0
    assert second["memory/peak(GiB)"] is not None and 0.01 < second["memory/peak(GiB)"] < 100


class Ask(Callback):
    """Asks the run to stop at the hook that bears this name."""

    def __init__(self, hook: str, at: int) -> None:
        self._hook, self._at = hook, at

    def on_train_begin(self, run: TrainingRun) -> None:
        self._ask("on_train_begin", run)

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        self._ask("on_step_end", run)

    def on_metrics(self, run: TrainingRun) -> None:
        self._ask("on_metrics", run)

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        self._ask("on_save", run)

    def _ask(self, hook: str, run: TrainingRun) -> None:
        if (hook, run.step) == (self._hook, self._at):
            os.kill(os.getpid(), signal.SIGTERM)


class Table(Callback):
    """Files a table in every step, as the routers' health does."""

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        run.tables["table"] = {"of step": run.step}


def fit_and_stop(engine: FakeEngine, folder: Path, ask: Ask, resume_from: Path | None = None) -> None:
    engine.stop = StopRequest(folder)
    with engine.stop.listening():
        make_trainer(engine, folder, [Table(), MetricsFile(), ask]).fit(resume_from)


@pytest.mark.parametrize(
    ("hook", "at", "saved"),
    [
        ("on_step_end", 3, [2, 3]),  # before an evaluation, which is cut short
        ("on_step_end", 4, [2, 4]),  # before a checkpoint that is due anyway, noticed by it
        ("on_metrics", 4, [2, 4]),
        ("on_metrics", 5, [2, 4, 6]),  # noticed at the end of the next step
        ("on_save", 4, [2, 4]),
        ("on_step_end", 7, [2, 4, 6, 7]),  # before the last evaluation
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(
    tmp_path: Path, hook: str, at: int, saved: list[int]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    make_trainer(FakeEngine(make_recipe()), straight, [Table(), MetricsFile()]).fit()
    engine = FakeEngine(make_recipe())
    fit_and_stop(engine, broken, Ask(hook, at))
    assert calls_at(engine, "save") == saved
    assert calls_at(engine, "save_adapter") == []
    assert not (broken / "DONE").exists()
    trainer = make_trainer(FakeEngine(make_recipe()), broken, [Table(), MetricsFile()])
    trainer.fit(broken / f"checkpoint-{saved[-1]}")
    assert losses(broken) == losses(straight)
    assert [row.get("table") for row in read_metrics(broken / "metrics.jsonl")] == [
        {"of step": step} if step else None for step in range(8)
    ]
    assert trainer.run.evaluations == [(0, 4.0), (3, 3.7), (6, 3.4), (7, 3.3)]
    assert (broken / "DONE").exists()


class CutShort(FakeEngine):
    """A request to stop reaches it in the middle of the step after the third."""

    def train_step(self, micro_batches: list[MicroBatch]) -> StepResult:
        if self.step == 3:
            raise Stopped
        return super().train_step(micro_batches)


def test_a_streamed_step_that_is_cut_short_is_done_again(tmp_path: Path) -> None:
    """The loss tells which places of the stream a step saw; four of nine rows make a step."""
    rows = [{"instruction": f"{number}", "output": "yes"} for number in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources, tokenizer = [DataSource(str(tmp_path / "train.jsonl"))], tiny_tokenizer(tmp_path / "tokenizer")

    def fit(engine: FakeEngine, folder: Path, resume_from: Path | None = None) -> None:
        folder.mkdir(exist_ok=True)
        data = StreamedSets(sources, "data.train", tokenizer, TokeniseOptions(60), 0, 5)
        Trainer(cast(Any, engine), folder, data, None, [MetricsFile()]).fit(resume_from)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fit(FakeEngine(make_recipe()), straight)
    fit(CutShort(make_recipe()), broken)
    assert not (broken / "DONE").exists()
    fit(FakeEngine(make_recipe()), broken, broken / "checkpoint-3")
    assert losses(broken) == losses(straight) and len(losses(broken)) == 7


def test_a_crash_after_an_evaluation_was_made_up_for_does_not_write_its_line_twice(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    make_trainer(FakeEngine(make_recipe()), straight, [MetricsFile()]).fit()
    fit_and_stop(FakeEngine(make_recipe()), broken, Ask("on_step_end", 3))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(FakeEngine(make_recipe()), broken, [MetricsFile(), Interrupt(4)]).fit(broken / "checkpoint-3")
    make_trainer(FakeEngine(make_recipe()), broken, [MetricsFile()]).fit(broken / "checkpoint-3")
    assert losses(broken) == losses(straight)


def test_nothing_is_saved_where_no_step_was_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(make_recipe())
    fit_and_stop(engine, tmp_path, Ask("on_train_begin", 0))
    assert engine.calls == []
    assert caplog.messages[-1].endswith("s after the request: no step had been taken.")


def test_a_request_before_experts_have_their_start_ends_the_run_as_any_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe()
    recipe.adapter.init = "gradient"
    engine = FakeEngine(recipe)
    engine.stop = StopRequest(tmp_path)
    with engine.stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        make_trainer(engine, tmp_path, default_callbacks(Console(quiet=True), [TensorBoard()])).fit()
    assert engine.calls == []
    assert caplog.messages[-1].endswith("s after the request: no step had been taken.")


def test_a_run_that_goes_on_takes_back_that_it_is_done(tmp_path: Path) -> None:
    make_trainer(FakeEngine(make_recipe()), tmp_path, []).fit()
    assert (tmp_path / "DONE").exists()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(FakeEngine(make_recipe(max_steps=9)), tmp_path, [Interrupt(8)]).fit(tmp_path / "checkpoint-7")
    assert not (tmp_path / "DONE").exists()


def test_a_request_while_the_last_answers_are_given_finds_the_run_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(make_recipe(max_steps=2, num_samples=1))
    engine.stop = StopRequest(tmp_path)
    with engine.stop.listening():
        make_trainer(engine, tmp_path, [Ask("on_save", 2), Samples(Console(quiet=True))]).fit()
    assert calls_at(engine, "save_adapter") == [2] and calls_at(engine, "generate") == [0]
    assert (tmp_path / "DONE").exists()
    assert "the run is finished" in caplog.messages[-1]

"""What a user sees and finds: progress, samples, summary, metrics, curves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoelora.callbacks import MetricsFile, ProgressBar, Samples, Summary, TrainingRun, Utilisation
from dsmoelora.callbacks.memory import resident_bytes
from dsmoelora.callbacks.tensorboard import TensorBoard
from dsmoelora.config import Recipe, TrainConfig
from dsmoelora.data.chat import Prompt
from dsmoelora.data.questions import split_prompt
from dsmoelora.engine import StepResult
from dsmoelora.run.files import read_metrics
from tests.fake_engine import FakeDataset, FakeEngine


def make_run(folder: Path, step: int = 0, **train: Any) -> TrainingRun:
    engine = FakeEngine(Recipe(train=TrainConfig(**{"max_steps": 10, "num_samples": 2} | train)))
    engine.step = step
    return TrainingRun(engine.recipe, cast(Any, engine), folder, cast(Any, FakeDataset(5)))


def paper(terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, force_terminal=terminal, color_system=None), file


def take_steps(run: TrainingRun, bar: ProgressBar, steps: range) -> None:
    bar.on_train_begin(run)
    for step in steps:
        run.engine.step = step
        run.metrics = {"throughput(tokens/s)": 1234.0}
        bar.on_step_end(run, StepResult(1.5, 1.0, 1e-3, False, 1, 1))
    bar.on_train_end(run)


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path: Path) -> None:
    console, file = paper()
    take_steps(make_run(tmp_path), ProgressBar(console, seconds_between_lines=1000), range(1, 11))
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "10/10"]
    for part in ("loss 1.5000", "lr 1.00e-03", "1,234 tokens/s", "left"):
        assert part in lines[0]


def test_lines_come_as_often_as_asked(tmp_path: Path) -> None:
    console, file = paper()
    take_steps(make_run(tmp_path), ProgressBar(console, seconds_between_lines=0), range(1, 11))
    assert len(file.getvalue().splitlines()) == 10


def test_evaluations_always_get_a_line(tmp_path: Path) -> None:
    console, file = paper()
    ProgressBar(console).on_evaluate(make_run(tmp_path, step=5), 2.25)
    assert file.getvalue() == "step 5/10  held-out loss 2.2500\n"


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    console, file = paper(terminal=True)
    take_steps(make_run(tmp_path), ProgressBar(console), range(1, 8))
    text = file.getvalue()
    assert "step 7/10" in text and "━" in text and "loss 1.5000" in text


def test_samples_are_shown_beside_the_reference(tmp_path: Path) -> None:
    console, file = paper()
    run, samples = make_run(tmp_path), Samples(console)
    samples.on_train_begin(run)
    run.engine.step = 10
    samples.on_train_end(run)
    text = file.getvalue()
    for part in ("question 0", "step 0: question 0", "step 10: question 1", "answer 1"):
        assert part in text
    assert "question 2" not in text


def test_samples_may_hold_markup(tmp_path: Path) -> None:
    console, file = paper()
    run, samples = make_run(tmp_path, num_samples=1), Samples(console)
    samples.load_state({"before": ["[/bold] list[int]"]})
    samples.on_train_end(run)
    assert "[/bold] list[int]" in file.getvalue()


def test_rows_of_plain_text_are_no_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = FakeDataset.messages
    monkeypatch.setattr(FakeDataset, "messages", lambda self, i: [] if i == 0 else talk(self, i))
    console, file = paper()
    run, samples = make_run(tmp_path, num_samples=1), Samples(console)
    samples.on_train_begin(run)
    samples.on_train_end(run)
    assert "question 1" in file.getvalue() and "question 0" not in file.getvalue()


def test_no_samples_no_table(tmp_path: Path) -> None:
    console, file = paper()
    run, samples = make_run(tmp_path, num_samples=0), Samples(console)
    samples.on_train_begin(run)
    samples.on_train_end(run)
    assert file.getvalue() == ""
    assert cast(Any, run.engine).calls == []


def test_a_prompt_ends_before_the_last_answer() -> None:
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert split_prompt(messages, None) == (Prompt(messages[:4]), "a2")


def test_calls_of_tools_are_part_of_the_reference_and_tools_of_the_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    reference = '{"name": "look", "arguments": {"at": "é"}}'
    assert split_prompt(messages, tools) == (Prompt(messages[:1], tools), reference)


def test_the_summary_says_what_was_reached_and_where_it_lies(tmp_path: Path) -> None:
    console, file = paper()
    run, summary = make_run(tmp_path / "my run", step=10), Summary(console)
    run.evaluations, run.engine.skipped_steps = [(0, 4.0), (5, 3.5), (10, 3.0)], 2
    summary.on_train_begin(run)
    summary.on_save(run, run.folder / "checkpoint-10")
    summary.on_train_end(run)
    text = file.getvalue()
    assert "4.0000 (step 0) -> 3.0000 (step 10), -25.0%" in text
    assert "Skipped steps: 2" in text
    assert f"python launch/generate.py --adapter '{run.folder}/adapter' --prompt" in text  # quoted for the shell
    for name in ("metrics.jsonl", "tensorboard", "checkpoint-10"):
        assert str(run.folder / name) in text


def write_rows(run: TrainingRun, callback: MetricsFile | TensorBoard, rows: list[dict[str, Any]]) -> None:
    callback.on_train_begin(run)
    for row in rows:
        run.engine.step, run.metrics = row["step"], row
        callback.on_metrics(run)
    callback.on_train_end(run)


def test_metrics_are_one_object_a_line_and_null_where_not_finite(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/loss": 2.5}, {"step": 1, "loss": float("nan"), "grad_norm": float("inf")}]
    write_rows(make_run(tmp_path), MetricsFile(), rows)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows[0], {"step": 1, "loss": None, "grad_norm": None}]
    assert "NaN" not in lines[1]


@pytest.mark.parametrize(("start_step", "kept"), [(2, [0, 1, 2]), (0, [])])
def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path, start_step: int, kept: list[int]) -> None:
    write_rows(make_run(tmp_path), MetricsFile(), [{"step": step} for step in range(5)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    run = make_run(tmp_path, step=start_step)
    run.start_step = start_step
    write_rows(run, MetricsFile(), [])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == kept


def test_tensorboard_shows_the_same_numbers_and_only_the_steps_that_count(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0, "eval/loss": 2.5}, {"step": 2, "loss": 9.0}, {"step": 3, "loss": 9.0}]
    write_rows(make_run(tmp_path), TensorBoard(), rows)
    resumed = make_run(tmp_path, step=1)
    resumed.start_step = 1
    write_rows(resumed, TensorBoard(), [{"step": 2, "loss": 2.0}, {"step": 3, "loss": None}])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]


def test_resident_memory_grows_with_what_is_allocated() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * (64 * 2**20)
    assert 60 * 2**20 < resident_bytes() - before < 80 * 2**20
    assert len(block) == 64 * 2**20


def test_the_share_of_the_peak(tmp_path: Path) -> None:
    """1,000 tokens a second in rows of 64 tokens, of 500 operations each: half of a million a second."""
    run = make_run(tmp_path, batch_size=16)
    run.metrics = {"throughput(tokens/s)": 1000.0}
    result = StepResult(1.5, 1.0, 1e-3, False, num_tokens=16 * 64, num_supervised=1)
    Utilisation(lambda length: 436 + length, peak=1e6).on_step_end(run, result)
    assert run.metrics["mfu(%)"] == 50
    console, file = paper()
    bar = ProgressBar(console)
    bar.on_train_begin(run)
    bar.on_step_end(run, result)
    bar.on_train_end(run)
    assert "1,000 tokens/s  mfu 50.0%" in file.getvalue()

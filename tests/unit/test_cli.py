"""The command line: what it reads, and what it says when it cannot."""

from __future__ import annotations

import json
import sys
import time
import typing
from pathlib import Path

import pytest

from dsmoelora import cli
from dsmoelora.cli import DEFAULT_DEEPSPEED, FlagParser, parse_command, run_guarded
from dsmoelora.config import DataSource, Recipe
from dsmoelora.config.recipe_file import recipe_yaml
from dsmoelora.data.formats import PARSERS
from dsmoelora.errors import ConfigError
from dsmoelora.parallel.stopping import Stopped

RECIPE = """
run: {name: mine, seed: 7}
model: {path: some/model, dtype: fp32}
adapter: {r: 2, num_experts: 4, top_k: 2, target_modules: all-linear}
optim: {lr: 1e-3, betas: [0.7, 0.8]}
data: {train: [{path: a.jsonl}, {path: b.jsonl}]}
train: {batch_size: 8, micro_batch_size: 2}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def parse_recipe(folder: Path, text: str, *argv: str) -> Recipe:
    return parse_command(["--config", write(folder, text), *argv]).recipe


def message_of(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command(argv)
    return str(caught.value)


def test_a_recipe_becomes_dataclasses(tmp_path: Path) -> None:
    recipe = parse_recipe(tmp_path, RECIPE)
    assert recipe.run.name == "mine"
    assert recipe.optim.lr == 0.001  # `1e-3` is text in YAML 1.1, and a number to everybody else
    assert recipe.optim.betas == (0.7, 0.8)
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.adapter.target_modules == "all-linear"
    assert recipe.train.max_steps == Recipe().train.max_steps


@pytest.mark.parametrize("num_sets", [1, 2, 3])
def test_an_override_replaces_a_whole_list(tmp_path: Path, num_sets: int) -> None:
    # Nothing of the recipe's two sets stays behind, least of all a weight.
    recipe = RECIPE.replace("{path: a.jsonl}, {path: b.jsonl}", "{path: a, weight: 3}, {path: b, weight: 1}")
    new = ", ".join(f"{{path: new{i}}}" for i in range(num_sets))
    for override in (["--data.train", f"[{new}]"], [f"--data.train=[{new}]"]):
        sources = parse_recipe(tmp_path, recipe, *override).data.train
        assert sources == [DataSource(f"new{i}") for i in range(num_sets)]


@pytest.mark.parametrize("key", ["train", "eval"])
def test_a_second_recipe_replaces_a_whole_list(tmp_path: Path, key: str) -> None:
    weight = ", weight: 3" if key == "train" else ""
    first = f"data: {{{key}: [{{path: a, format: alpaca, fields: {{instruction: q}}{weight}}}], max_length: 99}}"
    second, other = f"data: {{{key}: [{{path: b}}]}}", "optim: {lr: 1}"
    files = [write(tmp_path, text, f"{number}.yaml") for number, text in enumerate((first, second, other))]
    data = parse_command([word for file in files for word in ("--config", file)]).recipe.data
    assert getattr(data, key) == [DataSource("b")]
    assert data.max_length == 99
    data = parse_command(["--config", files[1], "--config", files[0]]).recipe.data
    assert getattr(data, key)[0].fields == {"instruction": "q"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("[{path: a, weight: 0}]", "data.train[0].weight is 0.0, but it must be above 0"),
        ("[{path: a, weight: .inf}]", "data.train[0].weight is inf, but it must be above 0"),
        ("[{path: a, weight: 1}, {path: b}]", "data.train[1].weight is None, but it must be given for all sets or"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, override: str, message: str) -> None:
    assert message in message_of(["--config", write(tmp_path, RECIPE), "--data.train", override])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("format: alpaka", "data.train[1].format is 'alpaka', but it must be one of auto, alpaca, messages"),
        ("weight: high", "data.train[1].weight is 'high', but it must be a number or null"),
        ("weight: true", "data.train[1].weight is True, but it must be a number or null"),
        ("fields: [x]", "data.train[1].fields is ['x'], but it must be {name: text, ...}"),
        ("split: 3", "data.train[1].split is 3, but it must be text or null"),
        ("pth: b", "unknown key data.train[1].pth. Did you mean path?"),
    ],
)
def test_wrong_entries_of_a_list_are_named(tmp_path: Path, entry: str, message: str) -> None:
    sets = f"[{{path: a}}, {{{entry}}}]"
    assert message in message_of(["--config", write(tmp_path, f"data: {{train: {sets}}}")])
    assert message in message_of(["--config", write(tmp_path, RECIPE), "--data.train", sets])
    assert message in message_of(["--config", write(tmp_path, RECIPE), f"--data.train={sets}"])


def test_numbers_in_a_list_may_be_written_in_any_way(tmp_path: Path) -> None:
    sources = parse_recipe(
        tmp_path, RECIPE, "--data.train", "[{path: a, weight: 1e-3}, {path: b, weight: 2}]"
    ).data.train
    assert [source.weight for source in sources] == [0.001, 2.0]


def test_the_formats_of_a_recipe_are_those_that_are_read() -> None:
    assert set(typing.get_args(typing.get_type_hints(DataSource)["format"])) == {"auto", *PARSERS}


def test_held_out_sets_have_no_weight(tmp_path: Path) -> None:
    argv = ["--config", write(tmp_path, RECIPE), "--data.eval", "[{path: a, weight: 2}]"]
    assert "data.eval[0].weight is 2.0" in message_of(argv)


def test_the_adapter_starts_from_the_runs_seed(tmp_path: Path) -> None:
    assert parse_recipe(tmp_path, RECIPE).adapter.seed == 7
    assert parse_recipe(tmp_path, RECIPE, "--run.seed", "9").adapter.seed == 9


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_override_counts_wherever_it_stands(tmp_path: Path, place: str) -> None:
    file, override = ["--config", write(tmp_path, RECIPE)], ["--optim.lr", "2e-4"]
    recipe = parse_command(override + file if place == "before" else file + override).recipe
    assert recipe.optim.lr == 0.0002


def test_lists_and_null_can_be_overridden(tmp_path: Path) -> None:
    argv = ("--data.train", "[{path: c.jsonl}]", "--optim.lr_router", "null", "--adapter.target_modules", "[q_proj]")
    recipe = parse_recipe(tmp_path, RECIPE, *argv)
    assert [source.path for source in recipe.data.train] == ["c.jsonl"]
    assert recipe.optim.lr_router is None
    assert recipe.adapter.target_modules == ["q_proj"]


def test_flags_have_defaults_and_the_launchers_own_is_ignored() -> None:
    command = parse_command(["--local_rank=1"])
    assert (command.resume, command.dry_run, command.preview, command.world_size) == ("none", False, 0, None)
    assert command.deepspeed == DEFAULT_DEEPSPEED


def test_flags_are_read(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps({"zero_optimization": {"stage": 3}, "steps_per_print": 5}), "ds.json")
    command = parse_command(
        ["--deepspeed", file, "--resume", "auto", "--dry-run", "--world-size", "8", "--preview", "3"]
    )
    assert command.deepspeed == {"zero_optimization": {"stage": 3}, "steps_per_print": 5}
    assert (command.resume, command.dry_run, command.preview, command.world_size) == ("auto", True, 3, 8)


def test_homes_and_variables_in_paths_are_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "/scratch/sets")
    data = "{train: [{path: $SETS/a.jsonl}], eval: [{path: '${SETS}/b.jsonl'}]}"
    (tmp_path / "recipe.yaml").write_text(f"run: {{dir: ~/runs}}\nmodel: {{path: ~/model}}\ndata: {data}\n")
    (tmp_path / "ds.json").write_text("{}")
    command = parse_command(["--config=~/recipe.yaml", "--deepspeed=~/ds.json", "--resume=~/runs/run/checkpoint-1"])
    recipe = command.recipe
    assert recipe.run.folder == tmp_path / "runs" / "run" and recipe.model.path == str(tmp_path / "model")
    sets = [source.path for source in (*recipe.data.train, *recipe.data.eval)]
    assert sets == ["/scratch/sets/a.jsonl", "/scratch/sets/b.jsonl"]
    assert command.deepspeed == {} and command.resume == str(tmp_path / "runs" / "run" / "checkpoint-1")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (["--run.dir", "$NO_SUCH/runs"], r"run\.dir is '\$NO_SUCH/runs', but .* no variable \$NO_SUCH"),
        (["--model.path", "~nobody9/m"], r"model\.path is '~nobody9/m', but .* Nobody here has the home ~nobody9"),
    ],
)
def test_homes_and_variables_that_nobody_knows_are_named(override: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_command(override)


def test_print_folder_says_where_the_run_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(["--config", write(tmp_path, RECIPE), "--run.dir", "all", "--run.name", "this", "--print_folder"])
    assert capsys.readouterr().out == "all/this\n"


def test_print_config_prints_a_recipe_that_reads_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = parse_recipe(tmp_path, RECIPE, "--optim.lr", "3e-4")
    with pytest.raises(SystemExit) as caught:
        parse_command(["--config", write(tmp_path, RECIPE), "--optim.lr", "3e-4", "--print_config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed == recipe_yaml(wanted)
    assert parse_recipe(tmp_path, printed) == wanted


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("optim: {lrr: 1}", ["line 1", "unknown key optim.lrr", "Did you mean lr?"]),
        ("run:\n  name: x\nmodell: {path: x}", ["line 3", "unknown key modell", "Did you mean model?"]),
        ("data: {train: [{path: x, pth: y}]}", ["unknown key data.train[0].pth", "Did you mean path?"]),
        ("optim: {lr: fast}", ["optim.lr is 'fast'", "a number"]),
        ("train: {max_steps: 1.5}", ["train.max_steps is 1.5", "a whole number"]),
        ("train: {activation_checkpointing: maybe}", ["train.activation_checkpointing is 'maybe'", "true or false"]),
        ("optim: {name: adam}", ["optim.name is 'adam'", "adamw, sgd"]),
        ("optim: {lr_router: slow}", ["optim.lr_router is 'slow'", "a number or null"]),
        ("data: {train: x.jsonl}", ["data.train is 'x.jsonl'", "a list", "path"]),
        ("optim: 3", ["line 1", "optim must be a mapping", "lr"]),
        ("adapter: {num_experts: 2, top_k: 3}", ["adapter.top_k is 3", "adapter.num_experts = 2"]),
        ("optim: {lr: -1}", ["optim.lr is -1", "above 0"]),
        ("optim: {lr: 1e-3}\noptim: {eps: 1e-6}", ["line 2", "optim is set twice"]),
        ("adapter: {seed: 3}", ["adapter.seed", "Set run.seed instead"]),
        ("optim: [1, 2", ["line 1", "Mend the YAML"]),
        ("just text", ["must be a YAML mapping", "run, model, adapter"]),
        ("", ["must be a YAML mapping"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_sentence(tmp_path: Path, recipe: str, parts: list[str]) -> None:
    message = message_of(["--config", write(tmp_path, recipe)])
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "Did you mean --optim.lr?"]),
        (["--dryrun"], ["--dryrun", "Did you mean --dry-run?"]),
        (["--adapter.seed", "1"], ["Set run.seed instead"]),
        (["recipe.yaml"], ["recipe.yaml", "--help"]),
        (["--optim.lr"], ["--optim.lr", "expected one argument"]),
        (["--preview", "-1"], ["--preview is -1", "0 or more"]),
        (["--preview", "few"], ["--preview is 'few'", "a whole number"]),
        (["--world-size", "4"], ["--dry-run"]),
        (["--optim.betas", "0.9"], ["optim.betas is 0.9", "a list of 2"]),
    ],
)
def test_a_wrong_flag_is_one_clear_sentence(argv: list[str], parts: list[str]) -> None:
    message = message_of(argv)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_a_missing_recipe_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, RECIPE, "demo.yaml")
    message = message_of(["--config", str(tmp_path / "dmeo.yaml")])
    assert "there is no such file" in message
    assert f"Did you mean {tmp_path / 'demo.yaml'}?" in message


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_wrong_deepspeed_file_is_named(tmp_path: Path, content: str) -> None:
    file = write(tmp_path, content, "ds.json")
    assert file in message_of(["--deepspeed", file])


def test_errors_are_said_once_on_rank_zero_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise ConfigError("optim.lr is [red]0[/red], but ...")  # not rich's markup, but what the user wrote

    monkeypatch.setattr(cli, "SILENT_RANKS_STAY_S", 0.3)
    codes, said, seconds = [], [], []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        start = time.monotonic()
        codes.append(run_guarded(body))
        seconds.append(time.monotonic() - start)
        said.append(capsys.readouterr().err)
    assert codes == [1, 1]
    assert seconds[1] >= 0.3, "a launcher that sees rank 1 gone would end rank 0 before it has spoken"
    assert said == ["error: optim.lr is [red]0[/red], but ...\n", ""]


@pytest.mark.parametrize("error", [ZeroDivisionError, Stopped])
def test_other_errors_are_said_with_their_traceback_before_the_group_is_left(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaving waits for the other ranks, and may end the process."""
    said: list[str] = []

    def fail() -> None:
        raise error("by mistake")

    monkeypatch.setattr("dsmoelora.parallel.comm.shutdown", lambda: said.append(capsys.readouterr().err))
    assert run_guarded(fail) == 1
    (before_leaving,) = said
    assert "Traceback" in before_leaving and "in fail" in before_leaving
    assert f"{error.__name__}: by mistake" in before_leaving


def test_a_program_that_exits_keeps_its_code() -> None:
    with pytest.raises(SystemExit, match="3"):
        run_guarded(lambda: sys.exit(3))


def test_success_is_code_zero() -> None:
    assert run_guarded(lambda: None) == 0


def test_an_unknown_flag_is_named_before_the_required_one_that_it_misspells() -> None:
    parser = FlagParser(allow_abbrev=False)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--prompt")
    for word in ("--adpter", "--adpter=x"):
        with pytest.raises(ConfigError, match=r"^--adpter is no known flag\. Did you mean --adapter\?"):
            parser.parse_args([word, "x"])
    with pytest.raises(ConfigError, match="the following arguments are required: --adapter"):
        parser.parse_args([])
    assert parser.parse_args(["--adapter", "a", "--prompt", "-- so it is"]).prompt == "-- so it is"

"""Everything that is checked before the first expensive step, one bad input after the other."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import AddedToken
from transformers import AutoTokenizer

from dsmoelora.config import AdapterConfig, DataSource, OptimConfig, Recipe
from dsmoelora.data import load_instructions
from dsmoelora.data.chat import REWRITTEN
from dsmoelora.errors import UserError
from dsmoelora.plan import make_plan, print_plan
from dsmoelora.planner.compared import found_for
from tests.chat_styles import template_of
from tests.helpers import tiny_llama, tiny_tokenizer

ZERO_3: dict[str, Any] = {"zero_optimization": {"stage": 3}}
ROW = {"instruction": "Say it.", "input": "", "output": "It."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Recipe:
    """A recipe that works, with its files in `tmp_path`."""
    recipe = Recipe()
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n")
    recipe.run.dir, recipe.run.name = str(tmp_path / "runs"), "new"
    recipe.model.path, recipe.model.dtype = str(model), "fp32"
    recipe.data.train = [DataSource(str(tmp_path / "train.jsonl"))]
    recipe.data.eval = [DataSource(str(tmp_path / "eval.jsonl"))]
    recipe.adapter.num_experts, recipe.adapter.top_k, recipe.adapter.r = 4, 2, 2
    recipe.adapter.target_modules = ["q_proj", "down_proj"]
    recipe.train.batch_size, recipe.train.micro_batch_size = 8, 2
    return recipe


def test_the_plan_counts_what_will_be_trained(recipe: Recipe) -> None:
    plan = make_plan(recipe, ZERO_3, world_size=2, resume="none")
    rows = dict(plan.rows)
    # Two layers; q_proj is 64 x 64, down_proj 128 -> 64; per expert: factors of rank 2 and one row of the router.
    trainable = 2 * 4 * ((2 * (64 + 64) + 64) + (2 * (128 + 64) + 128))
    assert rows["trainable"].startswith(f"{trainable:,} numbers")
    assert rows["batch"] == "8 sequences a step = 2 a forward x 2 forwards x 2 ranks"
    assert rows["adapted layers"] == "4: 2 x q_proj, 2 x down_proj"
    assert rows["checkpoint"].startswith(f"{trainable * 4 * 3 / 1024:.1f} KiB each")
    assert plan.notes == []


def test_the_plan_names_the_plain_lora_to_compare_with(recipe: Recipe) -> None:
    """Of as many trained factors, at the same scale alpha / R."""
    recipe.adapter.shared_experts = 1
    rows = dict(make_plan(recipe, ZERO_3, world_size=2, resume="none").rows)
    assert "shared_experts" not in rows["compared"]
    # 4 routed experts of rank 2 and a shared one; alpha 16 over rank 2 is a scale of 8
    assert "adapter.num_experts 1, top_k 1, r 10, lora_alpha 80" in rows["compared"]
    assert (Path(__file__).parents[2] / re.findall(r"docs/\w+\.md", rows["compared"])[0]).is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 1, "top_k": 1}, "no mixture"),
        ({"experts_from": ["a"]}, "not compared"),
        ({"num_experts": 4}, "shared_experts 1 helped a mixture"),
    ],
)
def test_a_recipe_hears_what_was_found_for_its_kind(settings: dict[str, Any], words: str) -> None:
    assert words in found_for(AdapterConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "sgd", "preconditioner": "scaled"}, True),
        ({"name": "sgd", "preconditioner": "tangent", "damping_abs": 1e-2}, False),
        ({"name": "sgd", "preconditioner": "tangent", "damping_abs": 0.0}, False),
        ({"name": "adamw", "preconditioner": "scaled"}, False),
        ({"name": "sgd"}, False),
    ],
)
def test_the_plan_warns_of_a_damping_that_lost(recipe: Recipe, settings: dict[str, Any], expected: bool) -> None:
    recipe.optim = OptimConfig(**settings)
    notes = make_plan(recipe, ZERO_3, world_size=2, resume="none").notes
    assert any("optim.damping_abs = 1e-06" in note for note in notes) == expected


def test_the_plan_counts_the_start_that_checkpoints_keep(recipe: Recipe) -> None:
    recipe.adapter.init, recipe.model.dtype = "svd", "bf16"
    rows = dict(make_plan(recipe, ZERO_3, world_size=2, resume="none").rows)
    trainable = 2 * 4 * ((2 * (64 + 64) + 64) + (2 * (128 + 64) + 128))
    assert rows["start"].startswith("4 singular value decompositions")
    assert rows["checkpoint"].startswith(f"{trainable * (4 * 3 + 2) / 1024:.1f} KiB each")
    assert rows["disk"].startswith(f"{(trainable * ((4 * 3 + 2) * 3 + 2 * 2)) / 1024:.1f} KiB wanted")


def test_the_plan_says_what_experts_start_from(recipe: Recipe) -> None:
    recipe.adapter.init, recipe.adapter.init_samples = "gradient", 1
    rows = dict(make_plan(recipe, ZERO_3, world_size=2, resume="none").rows)
    assert rows["start"] == "the gradient of 1 training row before the first step; a layer's directions are orthogonal"
    assert "the start" not in rows["checkpoint"]


def test_the_printed_plan_shows_every_row_and_note(recipe: Recipe) -> None:
    recipe.data.eval, recipe.optim.warmup_steps = [], 1000
    plan = make_plan(recipe, ZERO_3, world_size=1, resume="none")
    file = io.StringIO()
    print_plan(plan, Console(file=file, width=300))
    text = file.getvalue()
    assert all(what in text and how_much in text for what, how_much in plan.rows)
    assert "note: data.eval names no file" in text
    assert "note: optim.warmup_steps = 1000" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_that_are_taken_apart_are_said_to_be(recipe: Recipe, tmp_path: Path, streaming: bool) -> None:
    folder = tiny_llama(tmp_path / "thinking")
    tiny_tokenizer(folder, template_of("thinking"))
    roles = ("user", "assistant") * 2
    talk = {"messages": [{"role": role, "content": letter} for role, letter in zip(roles, "abcd", strict=True)]}
    short = {"messages": talk["messages"][:2]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (talk, short, talk)))
    recipe.model.path, recipe.data.streaming = str(folder), streaming
    plan = make_plan(recipe, ZERO_3, world_size=2, resume="none")
    (note,) = [note for note in plan.notes if "train.jsonl" in note]
    assert note.endswith(f"2 of the first 3 rows become 4 rows, one for each answer, because {REWRITTEN}.")


def test_the_dropout_of_the_base_is_said_to_be_off(recipe: Recipe, tmp_path: Path) -> None:
    file = shutil.copytree(recipe.model.path, tmp_path / "dropping") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.25}))
    recipe.model.path = str(file.parent)
    (note,) = make_plan(recipe, ZERO_3, world_size=1, resume="none").notes
    assert "switched off (attention_dropout 0.25)" in note


def test_a_model_without_weights_can_be_planned_with(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    recipe.model.path = str(tmp_path / "bare")
    assert "holds no weights" in make_plan(recipe, ZERO_3, world_size=1, resume="none").notes[0]


def test_a_base_model_without_template_is_planned_with_ours(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template.jinja"))
    recipe.model.path = str(tmp_path / "base")
    (note,) = make_plan(recipe, ZERO_3, world_size=1, resume="none").notes
    assert "no chat template: turns are written as ### User: and ### Assistant:" in note


def no_model_folder(recipe: Recipe, folder: Path) -> None:
    recipe.model.path = str(folder / "nowhere")


def no_model_name(recipe: Recipe, folder: Path) -> None:
    recipe.model.path = ""


def a_name_that_is_nowhere(recipe: Recipe, folder: Path) -> None:
    recipe.model.path = "nobody/has-this-model"


def a_file_as_model(recipe: Recipe, folder: Path) -> None:
    recipe.model.path = str(folder / "train.jsonl")


def no_config_json(recipe: Recipe, folder: Path) -> None:
    (folder / "empty").mkdir()
    recipe.model.path = str(folder / "empty")


def no_tokenizer(recipe: Recipe, folder: Path) -> None:
    (folder / "bare").mkdir()
    shutil.copy(Path(recipe.model.path) / "config.json", folder / "bare")
    recipe.model.path = str(folder / "bare")


def no_language_model(recipe: Recipe, folder: Path) -> None:
    shutil.copytree(recipe.model.path, folder / "images")
    (folder / "images" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    recipe.model.path = str(folder / "images")


def no_such_target(recipe: Recipe, folder: Path) -> None:
    recipe.adapter.target_modules = ["q_proj", "w_proj"]


def no_training_data(recipe: Recipe, folder: Path) -> None:
    recipe.data.train = []


def no_path_of_data(recipe: Recipe, folder: Path) -> None:
    recipe.data.eval = [DataSource()]


def missing_data(recipe: Recipe, folder: Path) -> None:
    recipe.data.train = [DataSource(str(folder / "nowhere.jsonl"))]


def empty_data(recipe: Recipe, folder: Path) -> None:
    (folder / "eval.jsonl").write_text("")


def a_row_without_answer(recipe: Recipe, folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"instruction": "Say it."}) + "\n")


def samples_without_prompts(recipe: Recipe, folder: Path) -> None:
    recipe.data.eval, recipe.train.num_samples = [], 3


def a_batch_that_does_not_divide(recipe: Recipe, folder: Path) -> None:
    recipe.train.batch_size = 10


def a_file_as_run_folder(recipe: Recipe, folder: Path) -> None:
    recipe.run.dir = str(folder / "train.jsonl")


def a_full_disk(recipe: Recipe, folder: Path) -> None:
    recipe.train.keep_checkpoints = 10**12


Spoil = Callable[[Recipe, Path], None]


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_model_folder, ["model.path", "nowhere", "no such folder"]),
        (no_model_name, ["model.path is ''", "Set model.path"]),
        (a_name_that_is_nowhere, ["model.path is 'nobody/has-this-model'", "no such folder", "hub"]),
        (a_file_as_model, ["model.path", "a folder"]),
        (no_config_json, ["model.path", "without config.json"]),
        (no_tokenizer, ["model.path", "tokenizer"]),
        (no_language_model, ["model.path", "no causal language model"]),
        (no_such_target, ["adapter.target_modules is 'w_proj'", "down_proj"]),
        (no_training_data, ["data.train is []", "a list of files"]),
        (no_path_of_data, ["data.eval[0].path is ''"]),
        (missing_data, ["data.train", "nowhere.jsonl", "does not exist"]),
        (empty_data, ["data.eval", "eval.jsonl", "no rows"]),
        (a_row_without_answer, ["train.jsonl, row 1", "output"]),
        (samples_without_prompts, ["train.num_samples is 3", "data.eval"]),
        (a_batch_that_does_not_divide, ["train.batch_size is 10", "2 x 2 = 4", "Nearest: 8"]),
        (a_file_as_run_folder, ["run.dir", "is a file"]),
        (a_full_disk, ["train.keep_checkpoints", "free", "Make room"]),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, spoil: Spoil, parts: list[str]
) -> None:
    spoil(recipe, tmp_path)
    with pytest.raises(UserError) as caught:
        make_plan(recipe, ZERO_3, world_size=2, resume="none")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_conflict_with_the_deepspeed_file_is_named(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"train_batch_size of the DeepSpeed file is 9, but it must be 8"):
        make_plan(recipe, ZERO_3 | {"train_batch_size": 9}, world_size=1, resume="none")


def test_a_router_for_a_block_is_counted_once_and_plain_lora_has_none(recipe: Recipe) -> None:
    recipe.adapter.style, recipe.adapter.lora_modules = "ffn_block", ["q_proj"]
    recipe.adapter.target_modules = ["up_proj", "down_proj"]
    rows = dict(make_plan(recipe, ZERO_3, world_size=2, resume="none").rows)
    # Two layers; up_proj is 64 -> 128, down_proj back; one router reads the block's 64 features.
    trainable = 2 * (4 * 2 * 2 * (64 + 128) + 4 * 64 + 2 * (64 + 64))
    assert rows["trainable"].startswith(f"{trainable:,} numbers")
    assert rows["plain LoRA"] == "2 of the layers have one expert of rank 2 and no router"
    assert rows["router"] == "softmax_topk of each feed-forward block"


def test_a_router_of_a_decoder_layer_chooses_among_layers_with_one_expert(recipe: Recipe) -> None:
    modules = ["q_proj", "o_proj", "up_proj", "down_proj"]
    recipe.adapter = AdapterConfig(r=2, style="decoder_layer", router="prompt", num_experts=4, target_modules=modules)
    rows = dict(make_plan(recipe, ZERO_3, world_size=2, resume="none").rows)
    trainable = 2 * (2 * 2 * (64 + 64) + 2 * 2 * (64 + 128) + 4 * 64)
    assert rows["trainable"].startswith(f"{trainable:,} numbers")
    assert rows["experts"] == "the 4 target modules of a decoder layer, of rank 2, 2 for a prompt"
    assert rows["router"] == "prompt of each decoder layer"


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_has_at_least_one_rank(recipe: Recipe, world_size: int) -> None:
    with pytest.raises(UserError, match="--world-size"):
        make_plan(recipe, ZERO_3, world_size=world_size, resume="none")


def with_token(recipe: Recipe, folder: Path, token: str, **template: str) -> None:
    """The model with one token more in its tokenizer than its embedding has rows."""
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(recipe.model.path, folder / "larger"))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    for key, value in template.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder / "larger")
    recipe.model.path = str(folder / "larger")


def say(recipe: Recipe, *rows: dict[str, Any]) -> None:
    Path(recipe.data.train[0].path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a <new> b", "output": "c"},
        {"instruction": "a", "output": "c<new>"},
        {"text": "a<new>"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "<new>"}]},
        {"instruction": "a", "output": "c", "tools": [{"name": "f", "description": "<new>"}]},
    ],
)
def test_a_row_with_a_token_beyond_the_embedding(
    recipe: Recipe, tmp_path: Path, row: dict[str, Any], streaming: bool
) -> None:
    with_token(recipe, tmp_path, "<new>")
    recipe.data.streaming = streaming
    plan = make_plan(recipe, ZERO_3, world_size=1, resume="none")
    assert any("none for <new>: rows that hold such a token are wrong" in note for note in plan.notes)
    recipe.data.train[0].format = "messages" if "messages" in row else "text" if "text" in row else "alpaca"
    say(recipe, {"messages": ROW_OF_TURNS} if "messages" in row else {"text": "x"} if "text" in row else ROW, row)
    with pytest.raises(UserError, match=r"row 2: it holds '<new>', which is token 260, but .* has 260 rows, 0 to 259"):
        make_plan(recipe, ZERO_3, world_size=1, resume="none")
    recipe.data.on_bad_row = "skip"
    make_plan(recipe, ZERO_3, world_size=1, resume="none")


ROW_OF_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("template", [{"eos_token": "<new>"}, {"bos_token": "<new>"}, {"chat_template": "<new>: "}])
def test_a_token_of_the_template_beyond_the_embedding(recipe: Recipe, tmp_path: Path, template: dict[str, str]) -> None:
    with_token(recipe, tmp_path, "<new>", **template)
    with pytest.raises(UserError, match=r"has '<new>' as number 260, but the embedding of the model has 260 rows"):
        make_plan(recipe, ZERO_3, world_size=1, resume="none")


def test_an_embedding_that_is_too_small_for_ordinary_tokens(recipe: Recipe, tmp_path: Path) -> None:
    recipe.model.path = str(tiny_llama(tmp_path / "small", vocab_size=200))
    with pytest.raises(UserError, match=r"as number 200, but the embedding of the model has 200 rows, 0 to 199"):
        make_plan(recipe, ZERO_3, world_size=1, resume="none")


def test_a_wrong_row_that_is_skipped_leaves_no_token_beyond_the_embedding(recipe: Recipe, tmp_path: Path) -> None:
    with_token(recipe, tmp_path, "<new>")
    say(recipe, ROW, {"instruction": "a <new> b", "output": "c"})
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    load = partial(load_instructions, recipe.data.train, "data.train", tokenizer, 64, num_embeddings=260)
    with pytest.raises(UserError, match=r"row 2: it holds '<new>'"):
        load()
    dataset = load(on_bad_row="skip")
    assert len(dataset) == 1 and "1 of 2 rows skipped (row 2: it holds '<new>'" in dataset.reports[0].losses()

"""Everything that can be checked before the first expensive step, and the plan that comes out of it."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from dsmoelora.adapters import inject, untouched
from dsmoelora.adapters.four_bit import BITS
from dsmoelora.adapters.targets import layer_config
from dsmoelora.config import AdapterConfig, ModelConfig, Recipe
from dsmoelora.data.formats import read_conversations
from dsmoelora.data.packing_probe import check_takes_positions
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.readers import open_source
from dsmoelora.data.tokenised import TokeniseOptions, tokenise
from dsmoelora.data.vocabulary import check_conversation, tokens_beyond
from dsmoelora.errors import ConfigError, DataError, bad_value, listing
from dsmoelora.model import (
    check_weights,
    chosen_to_pack,
    layers_to_pack,
    limits_of,
    load_tokenizer,
    loftq_searches,
    model_without_weights,
    num_embeddings,
    without_dropout,
)
from dsmoelora.model.folder import check_model_folder
from dsmoelora.optim import trainables
from dsmoelora.optim.rows import frozen_tensors
from dsmoelora.planner.compared import found_for, notes_of
from dsmoelora.run.folder import check_run_folder, existing_parent, is_open_to_all

_FP32_BYTES = 4
_STANDS = {"per_linear": "", "ffn_block": " of each feed-forward block", "decoder_layer": " of each decoder layer"}
_TOKENISED_ROWS = 200  # of each training set, whose conversations are looked at
_STREAMED_ROWS = 1000  # of each streamed set, whose tokens are looked at


@dataclass
class Plan:
    """What a run will be, in numbers.

    Args:
        rows: (what, how much) in the order they are printed
        notes: what a user should know before training
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, how_much: str) -> None:
        """One more row."""
        self.rows.append((what, how_much))


def make_plan(recipe: Recipe, deepspeed: dict[str, Any], world_size: int, resume: str) -> Plan:
    """Check recipe, DeepSpeed file, paths, target modules and disk room without loading any weight.

    Args:
        recipe: of the run
        deepspeed: content of the DeepSpeed file
        world_size: ranks to plan for
        resume: `none`, `auto` or a checkpoint folder

    Raises:
        UserError: something cannot work
    """
    # imports deepspeed, which takes a second: not before cheaper errors were found
    from dsmoelora.parallel.placement import check_placement
    from dsmoelora.parallel.zero_config import merge_config
    from dsmoelora.planner import device_of_run

    plan = Plan()
    _check_batches(plan, recipe, world_size)
    check_placement(recipe, world_size)
    check_run_folder(recipe, resume)
    _check_access(plan, recipe.run.folder)
    _check_trackers(recipe.train.report_to)
    device_of_run(recipe)
    _check_data(plan, recipe)
    merge_config(recipe, deepspeed, world_size)
    plan.notes += check_model_folder(recipe.model)
    model = model_without_weights(recipe.model)
    limits_of(model).check_length("data.max_length", recipe.data.max_length)
    _check_tokens(plan, recipe)
    _note_splits(plan, recipe)
    check_weights(recipe.model, model)
    if recipe.data.packing:
        check_takes_positions(model)
    base = sum(parameter.numel() for parameter in model.parameters())
    num_packed = _num_packed(recipe.model, model)
    loftq_searches(model, recipe.adapter, recipe.model.torch_dtype, torch.device("cpu"))  # for its checks
    _note_what_is_off(plan, model)
    plan.notes += untouched(model)
    layers = inject(model, recipe.adapter, start=lambda _: None)  # there are no weights to start from
    adapter = sum(math.prod(trainable.shape) for trainable, _ in trainables(model))
    frozen = sum(math.prod(tensor.shape) for tensor, _ in frozen_tensors(model))
    _describe_model(plan, recipe, model, base, num_packed, world_size)
    _describe_adapter(plan, recipe, layers, adapter, base)
    if frozen:
        plan.add("frozen", f"{frozen:,} numbers of the adapter ({', '.join(recipe.adapter.freeze)})")
    _check_disk(plan, recipe, adapter, frozen)
    return plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table, and its notes below."""
    table = Table(title="The plan (nothing was trained)", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, how_much in plan.rows:
        table.add_row(what, Text(how_much))
    console.print(table)
    print_notes(plan, console)


def print_notes(plan: Plan, console: Console) -> None:
    """Print what a user should know before training."""
    for note in plan.notes:
        console.print(Text("note: ", style="bold yellow") + Text(note), soft_wrap=True)


def _check_batches(plan: Plan, recipe: Recipe, world_size: int) -> None:
    if world_size < 1:
        raise bad_value("--world-size", world_size, "1 or more", "Give the number of ranks of the run.")
    train = recipe.train
    accumulation = train.accumulation_steps(world_size)
    plan.add("ranks", str(world_size))
    split = f"{train.micro_batch_size} a forward x {accumulation} forwards x {world_size} ranks"
    what = f"rows of {recipe.data.max_length} tokens, packed," if recipe.data.packing else "sequences"
    plan.add("batch", f"{train.batch_size} {what} a step = {split}")
    warmup = f", {recipe.optim.warmup_steps} of them warm-up" if recipe.optim.warmup_steps else ""
    plan.add("steps", f"{train.max_steps}{warmup}")
    plan.add("optimizer", f"{recipe.optim.name}, lr {recipe.optim.lr:g}, {recipe.optim.schedule}")
    plan.add("preconditioner", recipe.optim.preconditioner)
    plan.notes += notes_of(recipe.optim)
    if not train.max_steps:
        plan.notes.append("train.max_steps is 0: nothing is trained; the adapter is written as it starts.")
    elif recipe.optim.warmup_steps >= train.max_steps:
        plan.notes.append(
            f"optim.warmup_steps = {recipe.optim.warmup_steps} reaches to the end of train.max_steps = "
            f"{train.max_steps}: the learning rate never comes to optim.lr."
        )


def _check_trackers(names: list[str] | str) -> None:
    """The packages that `train.report_to` needs are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.report_to has {name!r}, but the package {name} is not installed. "
                f"Install it (pip install {name}), or take it out of train.report_to."
            )


def _check_access(plan: Plan, folder: Path) -> None:
    if folder.is_dir() and is_open_to_all(folder):
        plan.notes.append(f"{folder} may be written by every user. Close it: chmod -R o-w {folder}")


def _check_data(plan: Plan, recipe: Recipe) -> None:
    """Every file is there, of a known format, and its first row is right; the rest is read when training begins."""
    data, train = recipe.data, recipe.train
    if not data.train:
        raise bad_value("data.train", [], "a list of files", "Example: [{path: data/train.jsonl}].")
    if train.eval_score != "none" and not (data.eval and train.eval_every):
        raise ConfigError(
            f"train.eval_score is {train.eval_score}, but nothing is evaluated. Set data.eval and train.eval_every, or "
            "train.eval_score to none."
        )
    if not data.eval and train.num_samples:
        raise ConfigError(
            f"train.num_samples is {train.num_samples}, but data.eval names no file to take prompts from. "
            "Set data.eval, or train.num_samples to 0."
        )
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for place, source in enumerate(sources):
            if not source.path:
                raise bad_value(f"{key}[{place}].path", source.path, "a data file", "Name the file.")
            try:
                opened = open_source(source, streaming=data.streaming and key == "data.train")
                next((row for row in read_conversations(source, data.on_bad_row, opened) if not row.problem), None)
            except DataError as error:
                raise DataError(f"{key}: {error}") from None
            share = "" if source.weight is None else f", weight {source.weight:g}"
            size = _size(opened.num_bytes) if opened.files else "streamed from the hub"
            plan.add(key, f"{opened.name} ({size}{share})")
    if not data.eval:
        plan.notes.append("data.eval names no file: there will be no held-out loss.")
    elif not train.eval_every:
        plan.notes.append("train.eval_every is 0: there will be no held-out loss.")


def _check_tokens(plan: Plan, recipe: Recipe) -> None:
    """The embedding has a row for every token that is certain to come; streamed sets are looked at in part."""
    data, size = recipe.data, num_embeddings(recipe.model)
    beyond = tokens_beyond(load_tokenizer(recipe.model), size)
    if not beyond:
        return
    plan.notes.append(
        f"the embedding of the model has {size} rows, and none for {listing(beyond)}: rows that hold such a token are "
        "wrong (data.on_bad_row)."
    )
    if data.on_bad_row == "skip":
        return
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        streamed = data.streaming and key == "data.train"
        for source in sources:
            rows = read_conversations(source, data.on_bad_row, open_source(source, streamed))
            for row in islice(rows, _STREAMED_ROWS if streamed else None):
                try:
                    check_conversation(row, beyond, size)
                except RowProblem as problem:
                    raise DataError(f"{key}: {problem.at(row.path, row.row)}") from None


def _note_splits(plan: Plan, recipe: Recipe) -> None:
    """Conversations that get a row for each answer, among the first rows of each training set."""
    data, tokenizer = recipe.data, load_tokenizer(recipe.model)
    for source in data.train:
        rows = read_conversations(source, "skip", open_source(source, data.streaming))
        first = list(islice(rows, _TOKENISED_ROWS))
        talks = [row for row in first if sum(message["role"] == "assistant" for message in row.messages) > 1]
        tokens = tokenise(talks, tokenizer, TokeniseOptions(data.max_length, "skip"))
        for why, count in Counter(filter(None, tokens["split"])).items():
            places = {place for place, split in zip(tokens["place"], tokens["split"], strict=True) if split == why}
            plan.notes.append(
                f"{source.path}: {len(places)} of the first {len(first)} rows become {count} rows, one for each "
                f"answer, because {why}."
            )


def _num_packed(config: ModelConfig, model: PreTrainedModel) -> int:
    """Weights of the base that `model.quantize` keeps in 4 bits.

    Raises:
        ModelError: they cannot be, or the package that does it is missing
    """
    if not chosen_to_pack(config):
        return 0
    return sum(model.get_parameter(f"{name}.weight").numel() for name in layers_to_pack(model))


def _describe_model(
    plan: Plan, recipe: Recipe, model: PreTrainedModel, base: int, num_packed: int, world_size: int
) -> None:
    num_bytes = (base - num_packed) * recipe.model.torch_dtype.itemsize + int(num_packed * BITS / 8)
    share = f", {_size(num_bytes // world_size)} a rank under ZeRO-3" if world_size > 1 else ""
    packed = f" and {num_packed / base:.0%} of them in 4 bits" if num_packed else ""
    plan.add("model", f"{recipe.model.path} ({type(model).__name__})")
    plan.add("base weights", f"{base:,} frozen, {_size(num_bytes)} in {recipe.model.dtype}{packed}{share}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and recipe.data.max_length > limit:
        plan.notes.append(f"data.max_length = {recipe.data.max_length} is beyond the model's {limit} positions.")


def _note_what_is_off(plan: Plan, model: PreTrainedModel) -> None:
    off = without_dropout(model.config)
    if off:
        plan.notes.append(
            f"The base's own dropout is switched off ({', '.join(f'{key} {value:g}' for key, value in off.items())}): "
            "its masks would depend on the number of ranks. adapter.lora_dropout takes its place."
        )


def _experts(config: AdapterConfig) -> str:
    """How many there are, and how many are used."""
    what, user = f"{config.num_experts} of rank {config.r} a layer", "token"
    if config.style == "decoder_layer":
        what, user = f"the {config.num_experts} target modules of a decoder layer, of rank {config.r}", "prompt"
    used = "" if config.top_k is None else f", {config.top_k} for a {user}"
    if config.top_k_warmup:
        used += f" (falling from {config.num_experts} in the first {config.top_k_warmup} steps)"
    shared = f"; {config.shared_experts} more for every token" if config.shared_experts else ""
    return what + used + shared


def _describe_adapter(plan: Plan, recipe: Recipe, layers: list[str], adapter: int, base: int) -> None:
    config = recipe.adapter
    kinds: dict[str, int] = {}
    for name in layers:
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    plan.add("adapted layers", f"{len(layers)}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    plan.add("experts", _experts(config))
    if config.lora_modules:
        num_plain = sum(layer_config(config, name).num_experts == 1 for name in layers)
        plan.add("plain LoRA", f"{num_plain} of the layers have one expert of rank {config.r} and no router")
    if recipe.parallel.ep_size > 1:
        held = config.num_experts // recipe.parallel.ep_size
        parallel = f"parallel.ep_size {recipe.parallel.ep_size}, exchange {recipe.parallel.exchange}"
        plan.add("experts of a rank", f"{held} a layer ({parallel})")
    if config.num_experts > 1:
        losses = [f"{name} loss {weight:g}" for name, weight in recipe.losses.weights.items() if weight]
        plan.add("router", ", ".join([config.router + _STANDS[config.style], *losses]))
    if config.init == "svd":
        plan.add("start", f"{len(layers)} singular value decompositions before the first step; they shift the base")
    if config.init == "loftq":
        each = f"{config.loftq_iterations} for each of {len(layers)} layers"
        plan.add("start", f"singular value decompositions while weights are read, {each}; by rank 0 under ZeRO-3")
    if config.init == "gradient":
        spread = "a layer's" if config.init_spread == "joint" else "each expert's"
        rows = f"{config.init_samples} training row{'s' * (config.init_samples > 1)}"
        plan.add("start", f"the gradient of {rows} before the first step; {spread} directions are orthogonal")
    if config.experts_from:
        plan.add("start", f"the experts of {listing(config.experts_from, 4)}")
    plan.add("trainable", f"{adapter:,} numbers ({100 * adapter / base:.2f}% of the base)")
    plan.add("compared", found_for(config))


def _check_disk(plan: Plan, recipe: Recipe, adapter: int, frozen: int) -> None:
    """Room for the kept checkpoints, one more while it is written, and the adapter.

    Raises:
        ConfigError: the disk of the run folder has less
    """
    optim, folder = recipe.optim, recipe.run.folder
    num_moments = 2 if optim.name == "adamw" else int(optim.momentum > 0)
    # with `init: svd` checkpoints hold the experts' start beside their values, and so does the adapter; with `loftq` it
    # holds what was taken from the packed weights as well
    start, itemsize = int(recipe.adapter.init == "svd"), recipe.model.torch_dtype.itemsize
    beside = {"svd": 1, "loftq": 2}.get(recipe.adapter.init, 0)
    checkpoint = adapter * (_FP32_BYTES * (1 + num_moments) + start * itemsize) + frozen * itemsize
    wanted = checkpoint * (recipe.train.keep_checkpoints + 1) + (adapter * (1 + beside) + frozen) * itemsize
    free = shutil.disk_usage(existing_parent(folder)).free
    plan.add(
        "checkpoint", f"{_size(checkpoint)} each (values and {num_moments} moments in fp32{', the start' * start})"
    )
    plan.add("disk", f"{_size(wanted)} wanted in {folder}, {_size(free)} free")
    if free < wanted:
        raise ConfigError(
            f"{folder} wants {_size(wanted)} for train.keep_checkpoints = {recipe.train.keep_checkpoints} checkpoints "
            f"and the adapter, but its disk has {_size(free)} free. Make room, or set run.dir to another disk."
        )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"

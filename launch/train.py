"""Train: `deepspeed launch/train.py --config launch/recipes/demo.yaml --deepspeed ds_configs/zero3.json`.

Also under `torchrun`, `srun` (one task a device), `mpirun`, or plain `python` for one process. `--help` lists the
flags and all keys of a recipe; `--dry-run` checks everything and prints the plan.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from rich.console import Console

from dsmoelora.cli import Command, leave, parse_command, run_guarded
from dsmoelora.logs import setup_logging
from dsmoelora.parallel.ranks import adopt_launcher_environment, env_rank, env_world_size, on_first_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsmoelora.callbacks import Callback
    from dsmoelora.config import Recipe
    from dsmoelora.data import InstructionDataset, Packing
    from dsmoelora.data.report import SetReport
    from dsmoelora.data.streaming import StreamedSets
    from dsmoelora.parallel.stopping import StopRequest
    from dsmoelora.signs_of_life.heartbeat import Heartbeat
    from dsmoelora.trainer import Trainer


ALONE = {"-h", "--help", "--version", "--print_config", "--print_folder"}  # each rank for itself


def main() -> None:
    """One process's part of the run."""
    os.umask(os.umask(0) | 0o002)  # nobody else shall write into a run, whatever the shell would allow
    if not ALONE.intersection(sys.argv):
        adopt_launcher_environment()
    if ALONE.intersection(sys.argv) or env_world_size() == 1:
        run(parse_command(sys.argv[1:]))
        return
    # A file may be missing on one node alone. So the ranks meet first, and the error of one is everybody's.
    setup_logging(env_rank(), verbose="--verbose" in sys.argv)
    from dsmoelora.parallel import comm

    comm.init()
    run(comm.together(lambda: parse_command(sys.argv[1:])))


def run(command: Command) -> None:
    """Check everything, then do what the command says (collective)."""
    setup_logging(env_rank(), command.verbose)
    # Imports of seconds, which an error in the recipe need not wait for.
    from dsmoelora.model.folder import check_trainable
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.dtype import settle_dtype
    from dsmoelora.plan import make_plan, print_notes, print_plan
    from dsmoelora.planner import short_plan
    from dsmoelora.planner.at_start import notes_on_memory
    from dsmoelora.run.folder import dtype_before
    from dsmoelora.signs_of_life.waits import waiting_for

    console = Console(quiet=env_rank() > 0, highlight=False)
    dtype = settle_dtype(command.recipe, comm.together(lambda: dtype_before(command.recipe, command.resume)))
    command = replace(command, recipe=dtype.recipe)
    recipe = command.recipe
    world_size = env_world_size() if command.world_size is None else command.world_size
    with waiting_for(lambda: "the files that the recipe names to be looked at", speaks=env_rank() == 0):
        plan = comm.together(lambda: make_plan(recipe, command.deepspeed, world_size, command.resume))
    plan.add("dtype", dtype.why)
    plan.notes += dtype.notes
    if command.dry_run:
        with waiting_for(lambda: "memory and time of the run to be planned", speaks=env_rank() == 0):
            plan.rows += comm.together(
                lambda: short_plan(recipe, command.deepspeed, world_size) if env_rank() == 0 else []
            )
        print_plan(plan, console)
    elif command.preview:
        comm.together(lambda: show_samples(command, console))
    else:
        comm.together(lambda: check_trainable(recipe.model))
        with waiting_for(lambda: "the memory of the run to be planned", speaks=env_rank() == 0):
            plan.notes += notes_on_memory(recipe, command.deepspeed, world_size)
        print_notes(plan, console)
        console.print(f"Computes in {dtype.why}")
        train(command, console)


def show_samples(command: Command, console: Console) -> None:
    """Print tokenised samples with the loss mask made visible (rank 0)."""
    from dsmoelora.data import load_instructions, preview
    from dsmoelora.data.streaming import first_samples
    from dsmoelora.data.tokenised import TokeniseOptions
    from dsmoelora.model import load_tokenizer, num_embeddings

    if env_rank() > 0:
        return
    data = command.recipe.data
    tokenizer, size = load_tokenizer(command.recipe.model), num_embeddings(command.recipe.model)
    if data.streaming:
        options = TokeniseOptions(data.max_length, data.on_bad_row, num_embeddings=size)
        samples = first_samples(data.train, tokenizer, options, command.preview)
    else:
        samples = load_instructions(
            data.train,
            "data.train",
            tokenizer,
            data.max_length,
            on_bad_row=data.on_bad_row,
            num_proc=data.num_proc,
            num_embeddings=size,
        )
    colour = console.is_terminal
    text = preview(samples, tokenizer, command.preview, markup=colour)
    console.print(text, markup=colour, soft_wrap=True)


def train(command: Command, console: Console) -> None:
    """Data, model, loop, until the end or until a request to stop (collective)."""
    from dsmoelora.parallel import comm
    from dsmoelora.parallel.stopping import Stopped, StopRequest
    from dsmoelora.parallel.watchdog import watched
    from dsmoelora.parallel.zero_config import merge_config
    from dsmoelora.run.folder import write_description

    comm.init()
    folder = command.recipe.run.folder
    stop = StopRequest(folder)
    with stop.listening(), watched(folder, command.recipe.train.hang_timeout_s) as heartbeat:
        try:
            trainer, checkpoint = build(command, console, heartbeat, stop)
        except Stopped:
            stop.leave("nothing was trained.")
            return
        recipe, config = command.recipe, merge_config(command.recipe, command.deepspeed, comm.world_size())
        trainer.fit(checkpoint, partial(write_description, folder, recipe, config, checkpoint))
        if command.recipe.data.streaming:  # of sets that were read beforehand it was said beforehand
            say_losses(console, "data.train", trainer.train_data.reports)


def build(command: Command, console: Console, heartbeat: Heartbeat, stop: StopRequest) -> tuple[Trainer, Path | None]:
    """Data and model, ready for the loop, and the checkpoint to go on from (collective).

    Raises:
        Stopped: there was a request before anything was ready
    """
    from dsmoelora.callbacks import check_samples, open_trackers
    from dsmoelora.data import InstructionDataset, packing_report
    from dsmoelora.data.cache import cache_folder
    from dsmoelora.engine import Engine
    from dsmoelora.model import load_tokenizer
    from dsmoelora.parallel import comm
    from dsmoelora.run.folder import find_checkpoint
    from dsmoelora.signs_of_life.waits import num_bytes, watching
    from dsmoelora.trainer import Trainer, default_callbacks

    recipe, folder = command.recipe, command.recipe.run.folder
    checkpoint = find_checkpoint(recipe, command.resume)
    console.print(f"Going on from {checkpoint}" if checkpoint else f"A new run in {folder}", soft_wrap=True)
    # the folder grows when a part of the rows is done, here or by the one waited for
    with watching(lambda: num_bytes(cache_folder()), heartbeat.beat):
        train_data, eval_data = stop.together(lambda: load_data(recipe))
    num_held_out = 0 if eval_data is None else len(eval_data)
    learned = "Training samples are streamed"
    if isinstance(train_data, InstructionDataset):
        learned = f"{len(train_data):,} training samples"
    console.print(f"{learned}, {num_held_out:,} held out")
    say_losses(console, "data.train", train_data.reports)
    say_losses(console, "data.eval", eval_data.reports if eval_data else [])
    packing = stop.together(lambda: load_rows(recipe, train_data))
    if packing is not None:
        assert isinstance(train_data, InstructionDataset), "streamed samples are not packed"
        console.print(packing_report(train_data, packing, recipe), soft_wrap=True)
    scores = stop.together(lambda: load_scores(recipe))
    stop.together(lambda: check_samples(recipe, eval_data, load_tokenizer(recipe.model)))
    trackers = comm.together(lambda: open_trackers(recipe, folder, checkpoint is not None) if comm.rank() == 0 else [])
    measures = comm.together(lambda: load_measures(recipe) if comm.rank() == 0 else [])
    console.print(f"Loading {recipe.model.path}, ranks: {comm.world_size()} ...", soft_wrap=True)
    engine = Engine.build(recipe, command.deepspeed, heartbeat, stop, resumes=checkpoint is not None)
    stop.check()
    mebibytes = engine.checkpoint_bytes() / 2**20
    trained = f"Training {engine.num_trainable:,} numbers" if recipe.train.max_steps else "Nothing is trained"
    console.print(
        f"{trained} in {len(engine.adapted_layers)} adapted layers; a checkpoint of them takes {mebibytes:.1f} MiB",
        soft_wrap=True,
    )
    callbacks = default_callbacks(console, trackers, scores, measures)
    return Trainer(engine, folder, train_data, eval_data, callbacks, packing), checkpoint


def say_losses(console: Console, key: str, reports: Sequence[SetReport]) -> None:
    """Print what was lost of each set, where something was."""
    from dsmoelora.data.report import all_losses

    for line in all_losses(reports):
        console.print(f"{key}: {line}", markup=False, soft_wrap=True)


def load_data(recipe: Recipe) -> tuple[InstructionDataset | StreamedSets, InstructionDataset | None]:
    """Training and held-out samples, tokenised, or what streams them."""
    from dsmoelora.data import load_instructions
    from dsmoelora.data.streaming import StreamedSets
    from dsmoelora.data.tokenised import TokeniseOptions
    from dsmoelora.model import load_tokenizer, num_embeddings

    tokenizer, size, data = load_tokenizer(recipe.model), num_embeddings(recipe.model), recipe.data
    load = partial(
        load_instructions,
        tokenizer=tokenizer,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        num_proc=data.num_proc,
        progress=on_first_node(),
        num_embeddings=size,
    )
    train_data: InstructionDataset | StreamedSets
    if data.streaming:
        options = TokeniseOptions(data.max_length, data.on_bad_row, num_embeddings=size)
        train_data = StreamedSets(data.train, "data.train", tokenizer, options, recipe.run.seed, data.block_size)
    else:
        train_data = load(data.train, "data.train")
    return train_data, load(data.eval, "data.eval") if data.eval else None


def load_scores(recipe: Recipe) -> list[Callback]:
    """What scores held-out rows at every evaluation, if `train.eval_score` says so."""
    from dsmoelora.callbacks import HeldOutScore
    from dsmoelora.model import load_tokenizer

    if recipe.train.eval_score == "none":
        return []
    return [HeldOutScore.of(recipe, load_tokenizer(recipe.model))]


def load_measures(recipe: Recipe) -> list[Callback]:
    """What tells the share of the peak, where that is known."""
    from dsmoelora.callbacks import Utilisation
    from dsmoelora.planner import device_of_run, token_flops

    device = device_of_run(recipe)
    flops = None if device is None else token_flops(recipe)
    if device is None or flops is None:
        return []
    return [Utilisation(flops.in_row, env_world_size() * device.peak_tflops * 1e12)]


def load_rows(recipe: Recipe, samples: InstructionDataset | StreamedSets) -> Packing | None:
    """Which training samples share a row, if `data.packing` says that some do."""
    from dsmoelora.data import InstructionDataset, load_packing

    if not recipe.data.packing:
        return None
    assert isinstance(samples, InstructionDataset), "streamed samples are not packed"
    return load_packing(
        samples.num_tokens, samples.mixture, samples.fingerprint, recipe.run.seed, recipe.data.max_length
    )


if __name__ == "__main__":
    leave(run_guarded(main))

"""Does a run fit, what limits it, how long does it take? Answered before a GPU is booked, on any machine.

    python launch/plan.py --config mine.yaml --deepspeed ds_configs/zero3.json --gpus 8 --gpu a100-40
    python launch/plan.py --config mine.yaml --gpus 8 16 32 --gpu h100 --search

Takes the recipe's keys as `launch/train.py` does (`--train.micro_batch_size 8`). The model's folder needs no more than
its config.json, no weights. Ends with 1 where the run does not fit. What is counted, and how: docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from rich.console import Console

from dsmoelora.cli import FlagParser, parse_command, run_guarded
from dsmoelora.config import Recipe
from dsmoelora.config.dtype import DtypeName
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.logs import setup_logging

if TYPE_CHECKING:
    from dsmoelora.planner import Device

_WIDTH = 100  # columns, where the output is no terminal
_DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


def main() -> None:
    """Plan as the command line says, and fail where it does not fit."""
    options, rest = parse_options(sys.argv[1:])
    command = parse_command(rest)
    setup_logging(rank=0)
    from dsmoelora.model.folder import check_described
    from dsmoelora.planner import device_named

    device = device_named(options.gpu)
    check_described(command.recipe.model)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    recipe = with_dtype(command.recipe, device.dtype)
    if options.search:
        search(recipe, options, command.deepspeed, device, console)
    else:
        plan(recipe, options, command.deepspeed, device, console)


def plan(
    recipe: Recipe, options: argparse.Namespace, deepspeed: dict[str, Any], device: Device, console: Console
) -> None:
    """Print memory, traffic and time of one run.

    Raises:
        ConfigError: it does not fit
    """
    from dsmoelora.planner import (
        largest_micro_batch,
        memory_of,
        print_memory,
        print_time,
        print_traffic,
        rehearse,
        time_of,
        traffic_of,
        verdict,
    )
    from dsmoelora.planner.picture import draw_plan

    (world_size,) = options.gpus
    if options.fit:
        recipe = largest_micro_batch(recipe, deepspeed, world_size, device)
        console.print(f"the largest that fits: --train.micro_batch_size {recipe.train.micro_batch_size}")
    run = rehearse(recipe, deepspeed, world_size)
    memory = memory_of(run)
    print_memory(memory, device, world_size, console)
    print_traffic(traffic_of(run), device, world_size, console)
    time = time_of(run, device)
    print_time(time, device, options.price, console)
    if options.out is not None:
        draw(draw_plan(memory, time, device), options.out, console)
    found = verdict(memory, device)
    if not found.fits:
        raise ConfigError(f"{world_size} x {device.name}: {found.text}. Change what is largest: {found.limits[0]}.")


def draw(figure: Any, path: Path, console: Console) -> None:
    """Write a picture and say so.

    Raises:
        ConfigError: it cannot be written
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written ({error.strerror}). Name another file.") from error
    console.print(f"Drew {path}", soft_wrap=True)


def search(
    recipe: Recipe, options: argparse.Namespace, deepspeed: dict[str, Any], device: Device, console: Console
) -> None:
    """Print which settings are best, of the user's DeepSpeed file and those of `ds_configs/`.

    Raises:
        ConfigError: nothing fits
    """
    from dsmoelora.planner import Search, print_search

    found = {f"ds_configs/{path.name}": json.loads(path.read_text()) for path in sorted(_DS_CONFIGS.glob("*.json"))}
    others = {name: content for name, content in found.items() if content != deepspeed}
    looked = Search(recipe, {options.deepspeed: deepspeed} | others, device)
    best = looked.best(options.gpus)
    print_search(looked, best, console)
    if not best:
        remedy = "Take more ranks, a larger device, or --model.quantize nf4."
        raise ConfigError(f"--search: nothing fits {', '.join(map(str, options.gpus))} x {device.name}. {remedy}")


def with_dtype(recipe: Recipe, dtype: DtypeName) -> Recipe:
    """What `auto` takes on the device."""
    return replace(recipe, model=replace(recipe.model, dtype=dtype)) if recipe.model.dtype == "auto" else recipe


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not of the planner alone is left for the recipe.

    Raises:
        ConfigError: a flag has no such value, or does not go with another
    """
    parser = FlagParser(
        description="Does a run fit, and what limits it?",
        epilog="Further: --config, --deepspeed and the recipe's keys, as of launch/train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], metavar="N", help="ranks; several with --search")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="of devices.yaml, or a file with such an entry")
    parser.add_argument("--price", type=float, metavar="X", help="of a device for an hour, for the cost of the run")
    parser.add_argument("--search", action="store_true", help="which settings fit, and the fastest of them")
    parser.add_argument("--fit", action="store_true", help="plan with the largest micro-batch that fits")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw memory and time into it: .png, .pdf or .svg")
    parser.add_argument("--deepspeed", default="", help=argparse.SUPPRESS)  # parse_command reads it; here its name
    options, rest = parser.parse_known_args(argv)
    if min(options.gpus) < 1:
        raise bad_value("--gpus", min(options.gpus), "1 or more", "Give the number of ranks of the run.")
    if options.search and options.fit:
        raise ConfigError("--fit takes the largest micro-batch, and so does --search for each choice. Drop --fit.")
    if len(options.gpus) > 1 and not options.search:
        raise bad_value("--gpus", options.gpus, "one number without --search", "Give one, or add --search.")
    if options.out is not None:
        if options.search:
            raise ConfigError("--out draws one plan, but --search makes many. Drop one of them.")
        from launch.plot import check_matplotlib, check_picture

        check_picture(options.out)
        check_matplotlib("--out")
    if options.deepspeed:
        rest += ["--deepspeed", options.deepspeed]
    if options.price is not None and options.price < 0:
        raise bad_value("--price", options.price, "0 or more", "Give what a device costs for an hour.")
    return options, rest


if __name__ == "__main__":
    sys.exit(run_guarded(main))

"""Does a run fit, what limits it, how long does it take? Answered before a GPU is booked, on any machine.

    python launch/plan.py --config mine.yaml --deepspeed ds_configs/zero3.json --gpus 8 --gpu a100-40

Takes the recipe's keys as `launch/train.py` does (`--train.micro_batch_size 8`). The model's folder needs no more than
its config.json, no weights. Ends with 1 where the run does not fit. What is counted, and how: docs/planning.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from rich.console import Console

from dsmoelora.cli import parse_command, run_guarded
from dsmoelora.config import Recipe
from dsmoelora.config.dtype import DtypeName
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.logs import setup_logging


def main() -> None:
    """Plan as the command line says, and fail where it does not fit."""
    options, rest = parse_options(sys.argv[1:])
    command = parse_command(rest)
    setup_logging(rank=0)
    from dsmoelora.planner import device_named, memory_of, print_memory, print_time, rehearse, time_of, verdict

    device, console = device_named(options.gpu), Console()
    run = rehearse(with_dtype(command.recipe, device.dtype), command.deepspeed, options.gpus)
    plan = memory_of(run)
    print_memory(plan, device, options.gpus, console)
    print_time(time_of(run, device), device, options.price, console)
    found = verdict(plan, device)
    if not found.fits:
        raise ConfigError(f"{options.gpus} x {device.name}: {found.text}. Change what is largest: {found.limits[0]}.")


def with_dtype(recipe: Recipe, dtype: DtypeName) -> Recipe:
    """What `auto` takes on the device."""
    return replace(recipe, model=replace(recipe.model, dtype=dtype)) if recipe.model.dtype == "auto" else recipe


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not of the planner alone is left for the recipe.

    Raises:
        ConfigError: the number of GPUs is not 1 and more, or a price is below 0
    """
    parser = argparse.ArgumentParser(
        description="Does a run fit, and what limits it?",
        epilog="Further: --config, --deepspeed and the recipe's keys, as of launch/train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the run")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="of devices.yaml, or a file with such an entry")
    parser.add_argument("--price", type=float, metavar="X", help="of a device for an hour, for the cost of the run")
    options, rest = parser.parse_known_args(argv)
    if options.gpus < 1:
        raise bad_value("--gpus", options.gpus, "1 or more", "Give the number of ranks of the run.")
    if options.price is not None and options.price < 0:
        raise bad_value("--price", options.price, "0 or more", "Give what a device costs for an hour.")
    return options, rest


if __name__ == "__main__":
    sys.exit(run_guarded(main))

"""Does a run fit, and what limits it? Answered before a GPU is booked, on any machine, without weights.

    python launch/plan.py --config mine.yaml --deepspeed ds_configs/zero3.json --gpus 8 --gpu a100-40

Takes the recipe's keys as `launch/train.py` does (`--train.micro_batch_size 8`). The model's folder needs no more than
its config.json. Ends with 1 where the run does not fit. What is counted, and how: docs/planning.md.
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
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.logs import setup_logging


def main() -> None:
    """Plan as the command line says, and fail where it does not fit."""
    options, rest = parse_options(sys.argv[1:])
    command = parse_command(rest)
    setup_logging(rank=0)
    from dsmoelora.planner import device_named, plan_memory, print_memory, verdict

    device = device_named(options.gpu)
    plan = plan_memory(with_dtype(command.recipe), command.deepspeed, options.gpus)
    print_memory(plan, device, options.gpus, Console())
    found = verdict(plan, device)
    if not found.fits:
        raise ConfigError(f"{options.gpus} x {device.name}: {found.text}. Change what is largest: {found.limits[0]}.")


def with_dtype(recipe: Recipe) -> Recipe:
    """All devices that can be planned for have bf16, which `auto` takes."""
    return replace(recipe, model=replace(recipe.model, dtype="bf16")) if recipe.model.dtype == "auto" else recipe


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not of the planner alone is left for the recipe.

    Raises:
        ConfigError: there is no number of GPUs, or none of 1 and more
    """
    parser = argparse.ArgumentParser(
        description="Does a run fit, and what limits it?",
        epilog="Further: --config, --deepspeed and the recipe's keys, as of launch/train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the run")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="of devices.yaml, or a file with such an entry")
    options, rest = parser.parse_known_args(argv)
    if options.gpus < 1:
        raise bad_value("--gpus", options.gpus, "1 or more", "Give the number of ranks of the run.")
    return options, rest


if __name__ == "__main__":
    sys.exit(run_guarded(main))

"""Is everything ready for a run? `python launch/doctor.py`, or under `deepspeed`, `torchrun`, `srun`, `mpirun`.

Looks at versions, accelerator, NCCL or gloo, network settings and free disk on every rank, and at what takes all
ranks: equal versions, a run folder that all see, the bandwidth of an all-reduce. Ends with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoelora.cli import run_guarded
from dsmoelora.errors import ConfigError
from dsmoelora.logs import setup_logging
from dsmoelora.parallel.ranks import adopt_launcher_environment, env_rank

if TYPE_CHECKING:
    from dsmoelora.doctor import Finding


def main() -> None:
    """Look, print, and fail if anything is wrong (collective)."""
    options = parse_options(sys.argv[1:])
    faulthandler.dump_traceback_later(options.timeout, exit=True)  # what hangs is wrong as well
    adopt_launcher_environment()
    setup_logging(env_rank())
    from dsmoelora.doctor import Finding, local_findings, shared_findings
    from dsmoelora.parallel import comm

    comm.init()
    own = local_findings(options.run_dir, os.environ)
    together = shared_findings(options.run_dir)
    everyone = comm.gather_objects([dataclasses.astuple(finding) for finding in own])
    problems: list[str] = []
    if everyone is not None:
        for rank, found in enumerate(everyone):
            problems += [f"rank {rank}: {what} is {value}: {problem}" for what, value, problem in found if problem]
        problems += [f"{finding.what}: {finding.problem}" for finding in together if finding.problem]
        show([Finding(*found) for found in everyone[0]] + together)
    problems = comm.broadcast_object(problems)
    faulthandler.cancel_dump_traceback_later()
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} found:", *problems]))
    Console(quiet=env_rank() > 0).print("All is well.")


def show(findings: list[Finding]) -> None:
    """Print rank 0's findings and those of all together."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text("wrong", style="bold red") if finding.problem else Text("ok", style="green")
        table.add_row(mark, finding.what, Text(finding.found))
    Console().print(table)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Look whether everything is ready for a run.", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="folder for runs: the recipe's run.dir")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which it gives up, with the stacks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_guarded(main))

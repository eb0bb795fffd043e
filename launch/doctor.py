"""Is everything ready for a run? `python launch/doctor.py`, or under `deepspeed`, `torchrun`, `srun`, `mpirun`.

Looks at versions, accelerator, NCCL or gloo, network settings and free disk on every rank, and at what takes all
ranks: equal versions, a run folder that all see, the bandwidth of an all-reduce. Ends with 1 when something is wrong.
`--calibrate mine.yaml` measures instead what machine and ranks reach, for `launch/plan.py --gpu mine.yaml`.
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

from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.errors import ConfigError, bad_value
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
    if options.calibrate is not None:
        measure(options.calibrate)
        faulthandler.cancel_dump_traceback_later()
        return
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


def measure(path: Path) -> None:
    """Write what this machine reaches to a file, and print it (collective)."""
    from dsmoelora.doctor.calibrate import calibrate, write_entry
    from dsmoelora.parallel import comm

    entry = calibrate()
    comm.together(lambda: write_entry(entry, path) if comm.rank() == 0 else None)
    console = Console(quiet=comm.rank() > 0, highlight=False)
    console.print(path.read_text(encoding="utf-8") if comm.rank() == 0 else "", end="", markup=False)
    console.print(f"Plan with it: python launch/plan.py --config mine.yaml --gpu {path}", soft_wrap=True)


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
    """Read the command line.

    Raises:
        ConfigError: what is measured cannot be written there
    """
    parser = FlagParser(description="Look whether everything is ready for a run.", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="folder for runs: the recipe's run.dir")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which it gives up, with the stacks")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine, for launch/plan.py --gpu")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(argv)
    if options.calibrate is not None:
        ok = options.calibrate.suffix == ".yaml" and options.calibrate.absolute().parent.is_dir()
        if not ok:
            raise bad_value(
                "--calibrate",
                str(options.calibrate),
                "a file of a folder that exists, and end on .yaml",
                "Example: --calibrate mine.yaml.",
            )
    return options


if __name__ == "__main__":
    sys.exit(run_guarded(main))

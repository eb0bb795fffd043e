"""Memory, bytes and seconds as planned, beside those measured here.

    python -m benchmarks.planner                       # memory and bytes of all rows that are not measured yet
    python -m benchmarks.planner --time                # seconds of a step; on a machine that has nothing else to do
    python -m benchmarks.planner --only 'stage 3, W 2' '1B, stage 0'
    python -m benchmarks.planner --table               # measures nothing, plans again

A row is measured in processes of its own and kept as a file below `.cache/planner`; Ctrl-C stops, and typed again it
goes on. Those of docs/planning.md lie in `benchmarks/planner/measured`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import setting
from benchmarks.planner import measure
from benchmarks.planner.cells import Cells
from benchmarks.planner.rows import ROWS, write_shape
from benchmarks.planner.table import lines_of, summary, table
from benchmarks.worker import ROOT, run_ranks
from dsmoelora.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table."""
    options = parse(argv)
    cells, kind, name = Cells(options.cells), "time" if options.time else "held", ""
    try:
        with tempfile.TemporaryDirectory() as shapes:
            for name in [] if options.table else options.only:
                if cells.read(name, kind) is None:
                    print(f"{name} ...", flush=True)
                    cells.write(name, kind, setting("fp32"), measured(name, kind, Path(shapes)))
            lines = lines_of(cells, Path(shapes), options.only)
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {name!r} has failed:\n{(error.stderr or '')[-3000:]}")
    for what in ("held", "time"):
        print(f"{what}: {'; '.join(cells.settings(what, options.only)) or 'not measured'}")
    print(*table(lines), sep="\n")
    if lines:
        print(summary(lines))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.planner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="these rows")
    parser.add_argument("--time", action="store_true", help="measure seconds of a step, not memory and bytes")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--cells", type=Path, default=ROOT / ".cache/planner", help="folder of the measurements")
    return parser.parse_args(argv)


def measured(name: str, kind: str, shapes: Path) -> dict[str, object]:
    """Of a row, by ranks of its own."""
    row, folder = ROWS[name], write_shape(ROWS[name].shape, shapes)
    if row.recipe(folder).model.quantize != "none" and not (folder / "model.safetensors").exists():
        # what is packed is packed while it is read
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).save_pretrained(
            folder
        )
    file = shapes / "found.json"
    run_ranks(measure.__file__, row.ranks, name, str(folder), kind, str(file), quiet=True)
    return dict(json.loads(file.read_text()))


if __name__ == "__main__":
    main()

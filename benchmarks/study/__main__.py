"""Which way to train learns best? Paired comparisons, rates chosen for every arm, on rows that did not choose them.

    python -m benchmarks.study --list                                                   # the arms that there are
    python -m benchmarks.study --arms experts gradient lora --tasks demo conflicting    # runs what is missing
    python -m benchmarks.study --arms experts gradient lora --tasks demo conflicting --table --plot study.png
    python -m benchmarks.study --arms experts gradient --tasks mine --train train.jsonl --eval dev.jsonl

The first arm is the control. For every arm a rate is chosen by successive halving, from a grid of factors of 2 that
grows until the best has both its neighbours, on one half of the held-out rows, with the first seeds. Then every seed
runs at that rate, and arms are compared on the other half: row by row, for seeds, rows and the order of samples are
the same for all. What is below the first adapted layer is computed once (`--depth full` adapts and computes all).

A cell (arm, rate, seed) is a folder below `.cache/study/<name>/<task>`. Ctrl-C stops a study; typed again it goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import DTYPE_NAME, setting
from benchmarks.study.arms import ARMS
from benchmarks.study.bench import prepare, run_cell
from benchmarks.study.cells import Cell, Task
from benchmarks.study.report import plot, table
from benchmarks.study.search import search
from benchmarks.study.tasks import Files, task_files
from benchmarks.study.workers import worker_pool
from dsmoelora.config.checks import require
from dsmoelora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    options = parse(argv)
    if options.list:
        for arm in ARMS.values():
            print(f"{arm.name:24s} {arm.why}")
        return
    try:
        tasks = [task_of(name, options) for name in options.tasks]
        if not (options.table or options.plot):
            run(tasks, options.arms, options.jobs)
        prepared = [task for task in tasks if task.tokens_file.exists()]
        print(f"\n{setting(options.dtype)}")
        for task in prepared:
            print(*("", *table(task, options.arms)), sep="\n")
        if options.plot:
            plot(prepared, options.arms, options.plot)
    except UserError as error:
        sys.exit(f"error: {error}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="study", help="folder of the cells, below .cache/study")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["experts", "gradient", "lora"], metavar="ARM")
    parser.add_argument("--tasks", nargs="+", default=["demo"], help="of demo, qa, gsm8k, conflicting; or a new name")
    parser.add_argument("--train", type=Path, help="training rows of a task of your own")
    parser.add_argument("--eval", type=Path, help="held-out rows of it")
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m")
    parser.add_argument("--template", type=Path, help="file of a chat template instead of the model's")
    parser.add_argument("--demo", type=Path, default=ROOT / "data/demo", help="folder of the demo's data")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the sets of qa and gsm8k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of adapters and the order of rows")
    parser.add_argument("--rate-seeds", type=int, default=3, metavar="N", help="the first N of them choose the rates")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument(
        "--depth", choices=["sixth", "third", "half", "full"], default="third", help="layers that are adapted"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default=DTYPE_NAME, help="of the model; default: this machine's"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    parser.add_argument("--plot", type=Path, help="run nothing, draw into this file (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the arms and end")
    return parser.parse_args(argv)


def task_of(name: str, options: argparse.Namespace) -> Task:
    """A task and where its cells lie.

    Raises:
        ConfigError: there is no such task, its data is not there, or no seed may choose a rate
    """
    require(options.rate_seeds > 0, "--rate-seeds", options.rate_seeds, "1 or more", "Leave it out for 3.")
    folder = ROOT / ".cache" / "study" / options.name
    if options.train and options.eval:
        files = Files(options.train, options.eval)
    else:
        files = task_files(name, folder, options.demo, options.data)
    sizes = (options.steps, options.batch_size, options.eval_rows, options.max_length)
    paths = (folder / name, options.model, options.template, *vars(files).values())
    return Task(
        *paths, *sizes, options.depth, options.dtype, tuple(options.seeds), tuple(options.seeds[: options.rate_seeds])
    )


def run(tasks: Sequence[Task], arms: Sequence[str], jobs: int) -> None:
    """All arms of all tasks; two rates or seeds, of whatever arm, run at a time."""
    with worker_pool(jobs) as pool, ThreadPoolExecutor(max(jobs, len(arms))) as threads:
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
            pool.submit(prepare, task).result()

            def train(cells: Sequence[Cell], until: int, task: Task = task) -> None:
                for future in [pool.submit(run_cell, task, cell, until) for cell in cells]:
                    future.result()

            list(threads.map(lambda arm, task=task, train=train: search(task, arm, train), arms))


if __name__ == "__main__":
    main()

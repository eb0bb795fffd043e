"""Reading and tokenising with 1, 2 ... processes, and with as many as are taken where nothing is said.

    python benchmarks/tokenising.py models/smollm2-135m --rows 5000 10000 20000

Chats of one question and one answer of 20 to 200 words each, in a JSON lines file; the cache is empty every time. Of
several turns the fastest counts. On a busy machine look at what was computed, not at what has passed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import datasets

from dsmoelora.config import DataSource, ModelConfig
from dsmoelora.data import load_instructions
from dsmoelora.data.tokenised import automatic_num_proc
from dsmoelora.model import load_tokenizer

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"


def write_rows(path: Path, count: int) -> None:
    """Rows of random words."""
    rng = random.Random(0)
    words = WORDS.split()
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(2))
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")


def seconds(path: Path, model: str, num_proc: int) -> tuple[float, float]:
    """Of one load without a cache: time that passed, and time that the busiest core computed.

    The latter is what would pass on cores that nobody else uses: this process's own share, and an equal part of what
    the others took.
    """
    tokenizer = load_tokenizer(ModelConfig(path=model))
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        begin, own, others = time.perf_counter(), time.process_time(), _seconds_of_children()
        load_instructions([DataSource(str(path))], "data.train", tokenizer, 512, num_proc=num_proc)
        computed = time.process_time() - own + (_seconds_of_children() - others) / num_proc
        return time.perf_counter() - begin, computed


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 10_000, 20_000])
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    numbers = range(1, len(os.sched_getaffinity(0)) + 1)
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.jsonl"
            write_rows(path, count)
            turns = [[seconds(path, args.model, number) for number in numbers] for _ in range(args.turns)]
        for number, of_number in zip(numbers, zip(*turns, strict=True), strict=True):
            passed, computed = (min(times) for times in zip(*of_number, strict=True))
            mark = " (taken by itself)" if number == automatic_num_proc(count) else ""
            print(f"{count:6,} rows, {number} processes: {passed:6.1f} s passed, {computed:6.1f} s computed{mark}")


if __name__ == "__main__":
    main()

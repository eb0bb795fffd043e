"""A run that is stopped or killed again and again must end like one that was left alone: `python benchmarks/soak.py`.

A tiny Llama on a few CPU ranks. Every so many steps, on average, a random rank gets SIGKILL, or SIGTERM, which asks
the whole run to stop; then the run starts again with `--resume auto`. At the end losses and adapter must equal those
of an undisturbed run to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file

from dsmoelora.run_files import read_metrics
from tests.helpers_distributed import base_environment
from tests.launched import Ranks, last_step, make_workshop

COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")


@dataclass(frozen=True)
class Soak:
    """What happened.

    Args:
        disturbances: how often each kind was done
        ends: exit codes of the ranks that were not the victim
        differences: what differs from the undisturbed run
    """

    disturbances: Counter[str]
    ends: Counter[int]
    differences: list[str]


def soak(folder: Path, num_steps: int, every: int, num_ranks: int, seed: int = 0) -> Soak:
    """Run a training twice below `folder`: undisturbed, and with a random disturbance about every `every` steps."""
    workshop = make_workshop(folder)
    _train(workshop, "undisturbed", num_steps, every, num_ranks)
    rng, run = random.Random(seed), workshop / "runs" / "disturbed"
    disturbances: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    aim = 0
    while (aim := max(aim, last_step(run)) + rng.randint(every // 2, every + every // 2)) < num_steps:
        kind, victim = rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.randrange(num_ranks)
        with _start(workshop, "disturbed", num_steps, every, num_ranks) as ranks:
            ranks.wait_for_step(run, aim, timeout_s=600)
            ranks.processes[victim].send_signal(kind)
            said = ranks.finish(timeout_s=300)
        disturbances[kind.name] += 1
        ends.update(one.returncode for rank, one in enumerate(said) if rank != victim)
        print(f"step {last_step(run)}: {kind.name} to rank {victim}", flush=True)
    _train(workshop, "disturbed", num_steps, every, num_ranks)
    return Soak(disturbances, ends, _differences(run, workshop / "runs" / "undisturbed"))


def _start(workshop: Path, name: str, num_steps: int, every: int, num_ranks: int) -> Ranks:
    settings = {
        "run.name": name,
        "train.max_steps": num_steps,
        "train.save_every": max(1, every // 4),
        "train.eval_every": every,
        "train.num_samples": 0,
        "train.hang_timeout_s": 120,
    }
    overrides = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    argv = ["--config", str(workshop / "recipe.yaml"), "--resume", "auto", *overrides]
    return Ranks(*[argv] * num_ranks)


def _train(workshop: Path, name: str, num_steps: int, every: int, num_ranks: int) -> None:
    """To the end, without a disturbance."""
    with _start(workshop, name, num_steps, every, num_ranks) as ranks:
        said = ranks.finish(timeout_s=3600)
    failed = [one.stderr for one in said if one.returncode]
    assert not failed, failed


def _differences(run: Path, undisturbed: Path) -> list[str]:
    found = []
    rows, wanted_rows = (read_metrics(one / "metrics.jsonl") for one in (run, undisturbed))
    found += [] if len(rows) == len(wanted_rows) else [f"{len(rows)} steps in the metrics, not {len(wanted_rows)}"]
    for row, wanted in zip(rows, wanted_rows, strict=False):
        found += [f"step {wanted['step']}: {name}" for name in COMPARED if row.get(name) != wanted.get(name)]
    tensors, wanted_tensors = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (run, undisturbed))
    found += [] if tensors.keys() == wanted_tensors.keys() else ["names of tensors"]
    found += [name for name in tensors.keys() & wanted_tensors.keys() if (tensors[name] != wanted_tensors[name]).any()]
    return found


def main() -> None:
    """Soak, and say how it went."""
    parser = argparse.ArgumentParser(description="Disturb a run again and again, and compare its end.")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the run")
    parser.add_argument("--every", type=int, default=20, help="steps between disturbances, on average; 2 or more")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks; 1, 2 or 4")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    options = parser.parse_args()
    os.environ.update(base_environment())
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), options.steps, options.every, options.ranks, options.seed)
    print(f"{options.steps} steps, disturbances: {dict(result.disturbances)}, {time.monotonic() - begin:.0f} s")
    print(f"exit codes of the ranks that were not the victim: {dict(result.ends)}")
    print(f"differences from the undisturbed run: {result.differences or 'none'}")
    sys.exit(bool(result.differences))


if __name__ == "__main__":
    main()

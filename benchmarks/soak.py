"""A run that is stopped or killed again and again must end like one that was left alone: `python benchmarks/soak.py`.

A tiny Llama on a few CPU ranks. Every so many steps, on average, a random rank gets SIGKILL, or SIGTERM, which asks
the whole run to stop; then the run starts again with `--resume auto`. At the end losses and adapter must equal those
of an undisturbed run to the last bit.

With `--starts N` disturbances come at any moment of N starts under `torchrun`, from its first import to the last file
it writes, and Ctrl-C is one of them.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from safetensors.torch import load_file

from dsmoelora.run.files import DONE_FILE, read_metrics
from tests.helpers_distributed import base_environment
from tests.launched import ROOT, Ranks, last_step, make_workshop

COMPARED = ("step", "loss", "grad_norm", "lr", "eval/loss")
GONE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Soak:
    """What happened.

    Args:
        disturbances: how often each kind was done
        ends: exit codes, of the ranks that were not the victim or of the launcher
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


def soak_anywhere(folder: Path, num_steps: int, every: int, num_ranks: int, num_starts: int, seed: int = 0) -> Soak:
    """The same with disturbances at any moment of `num_starts` starts under `torchrun`.

    Raises:
        AssertionError: a disturbed start was still there after a minute, or ended without a word
    """
    workshop = make_workshop(folder)
    begin = time.monotonic()
    _end_of(_launch(workshop, "undisturbed", num_steps, every, num_ranks), 3600)
    duration = time.monotonic() - begin
    rng, run = random.Random(seed), workshop / "runs" / "disturbed-0"
    disturbances: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    differences: list[str] = []
    for start in range(num_starts):
        kind, after = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), rng.uniform(0.0, duration)
        launcher = _launch(workshop, run.name, num_steps, every, num_ranks)
        time.sleep(after)
        had_ranks = _disturb(launcher, kind, rng)
        begin = time.monotonic()
        said = _end_of(launcher, GONE_WITHIN_S)
        seconds = time.monotonic() - begin
        assert said.strip() or not had_ranks, "it ended without a word"
        disturbances[kind.name] += 1
        ends.update([launcher.returncode])
        print(f"{kind.name} after {after:.1f} s, at step {last_step(run)}: gone in {seconds:.1f} s", flush=True)
        if (run / DONE_FILE).exists():
            differences += _differences(run, workshop / "runs" / "undisturbed")
            run = run.with_name(f"disturbed-{start + 1}")
    _end_of(_launch(workshop, run.name, num_steps, every, num_ranks), 3600)
    return Soak(disturbances, ends, differences + _differences(run, workshop / "runs" / "undisturbed"))


def _launch(workshop: Path, name: str, num_steps: int, every: int, num_ranks: int) -> subprocess.Popen[str]:
    """`torchrun`, in a group of its own as in a terminal."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    argv = [*torchrun, str(ROOT / "launch" / "train.py"), *_flags(workshop, name, num_steps, every)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(argv, text=True, start_new_session=True, **output)  # type: ignore[call-overload]


def _disturb(launcher: subprocess.Popen[str], kind: signal.Signals, rng: random.Random) -> bool:
    """Ctrl-C reaches all processes of a terminal, the others one rank, or the launcher where there is none yet.

    Returns:
        whether there were ranks to say something
    """
    if launcher.poll() is not None:
        return False
    ranks = [child.pid for child in psutil.Process(launcher.pid).children()]
    if kind is signal.SIGINT:
        os.killpg(launcher.pid, kind)
    else:
        os.kill(rng.choice(ranks) if ranks else launcher.pid, kind)
    return bool(ranks)


def _end_of(launcher: subprocess.Popen[str], timeout_s: float) -> str:
    """What it said, once it and its ranks are gone."""
    ranks = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    try:
        said, _ = launcher.communicate(timeout=timeout_s)
        _, left = psutil.wait_procs(ranks, timeout=timeout_s)
        assert not left, f"ranks outlive their launcher: {left}"
        return said
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise AssertionError(f"still there after {timeout_s} s: {launcher.communicate()[0][-2000:]}") from None


def _flags(workshop: Path, name: str, num_steps: int, every: int) -> list[str]:
    settings = {
        "run.name": name,
        "train.max_steps": num_steps,
        "train.save_every": max(1, every // 4),
        "train.eval_every": every,
        "train.num_samples": 0,
        "train.hang_timeout_s": 120,
    }
    overrides = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return ["--config", str(workshop / "recipe.yaml"), "--resume", "auto", *overrides]


def _start(workshop: Path, name: str, num_steps: int, every: int, num_ranks: int) -> Ranks:
    return Ranks(*[_flags(workshop, name, num_steps, every)] * num_ranks)


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
    parser.add_argument("--starts", type=int, help="disturb this many starts at any moment, instead of at steps")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    options = parser.parse_args()
    os.environ.update(base_environment())
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        common = (Path(folder), options.steps, options.every, options.ranks)
        if options.starts is None:
            result = soak(*common, options.seed)
        else:
            result = soak_anywhere(*common, options.starts, options.seed)
    print(f"{options.steps} steps, disturbances: {dict(result.disturbances)}, {time.monotonic() - begin:.0f} s")
    print(f"exit codes of those that were not the victim: {dict(result.ends)}")
    print(f"differences from the undisturbed run: {result.differences or 'none'}")
    sys.exit(bool(result.differences))


if __name__ == "__main__":
    main()

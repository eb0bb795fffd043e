"""Programs of `launch/` as a launcher starts it: one process a rank, on a tiny model that it can train in seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

from dsmoelora.run.files import read_metrics
from tests.forked import Program
from tests.helpers import tiny_llama
from tests.helpers_distributed import free_port

ROOT = Path(__file__).parents[1]

RECIPE = """
run: {{name: tiny, dir: {folder}/runs, seed: 3}}
model: {{path: {folder}/model, dtype: fp32}}
adapter: {{num_experts: 4, top_k: 2, r: 2, lora_dropout: 0.1, target_modules: [q_proj, v_proj, down_proj]}}
optim: {{lr: 1e-2, warmup_steps: 1}}
data: {{train: [{{path: {folder}/train.jsonl}}], eval: [{{path: {folder}/eval.jsonl}}], max_length: 64}}
train: {{max_steps: 6, batch_size: 4, micro_batch_size: 1, eval_every: 4, save_every: 3, num_samples: 2,
         sample_max_new_tokens: 4}}
"""


def make_workshop(folder: Path) -> Path:
    """A folder with model, data and recipe.yaml."""
    tiny_llama(folder / "model", hidden_size=32, intermediate_size=64)
    rng = random.Random(0)
    _write_rows(folder / "train.jsonl", 30, rng)
    _write_rows(folder / "eval.jsonl", 5, rng)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder


def _write_rows(path: Path, count: int, rng: random.Random) -> None:
    letters = [rng.sample("abcdef", rng.randint(2, 5)) for _ in range(count)]
    rows = [{"instruction": "Reverse.", "input": "".join(word), "output": "".join(word[::-1])} for word in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Ranks:
    """Processes of one run.

    Args:
        argv_of_rank: the command line of every rank
        program: of launch/
    """

    def __init__(self, *argv_of_rank: list[str], program: str = "train.py") -> None:
        num_ranks, self.port = str(len(argv_of_rank)), free_port()
        shared = {
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        self.processes = [
            Program(
                [str(ROOT / "launch" / program), f"--local_rank={rank}", *argv],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                umask=0,
            )
            for rank, argv in enumerate(argv_of_rank)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def finish(self, ranks: list[int] | None = None, timeout_s: float = 120.0) -> list[subprocess.CompletedProcess]:
        """Wait for these ranks (all), and bring what they said."""
        deadline = time.monotonic() + timeout_s
        waited = [self.processes[rank] for rank in (range(len(self.processes)) if ranks is None else ranks)]
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in waited]
        return [
            subprocess.CompletedProcess(p.args, p.returncode, *said) for p, said in zip(waited, outputs, strict=True)
        ]

    def wait_for_step(self, folder: Path, step: int, timeout_s: float = 120.0) -> None:
        """Return when the run in `folder` has taken that step."""
        deadline = time.monotonic() + timeout_s
        while last_step(folder) < step:
            assert all(process.poll() is None for process in self.processes), "a rank has ended"
            assert time.monotonic() < deadline, f"step {step} did not come in {timeout_s} s"
            time.sleep(0.02)


def last_step(folder: Path) -> int:
    """The last step in a run's metrics, -1 before the first."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"] or 0) if rows else -1

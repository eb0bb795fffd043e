"""An engine without a model, for tests of what goes on around it: everything it returns can be computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch
from dsmoelora.data.chat import Prompt
from dsmoelora.data.mixing import Mixture
from dsmoelora.engine import StepResult
from dsmoelora.parallel.gradient_start import StartReport
from dsmoelora.parallel.stopping import StopRequest

Message = dict[str, str]


class FakeWatch:
    """Reports the statistics it was given."""

    def __init__(self, statistics: dict[str, dict[str, float]]) -> None:
        self.statistics, self.is_on = statistics, False

    def start(self) -> None:
        self.is_on = True

    def stop(self) -> dict[str, dict[str, float]]:
        assert self.is_on
        self.is_on = False
        return self.statistics


class FakeEngine:
    """Its loss is the sum of the sequence ids of all micro-batches plus `memory`, which every step changes.

    A step that repeats or leaves out data, or goes on without the state of before, shows in its loss.

    Args:
        recipe: of the run
        skipped: numbers of the steps (from 1) that are skipped
        statistics: what the watch reports
    """

    def __init__(
        self,
        recipe: Recipe,
        skipped: tuple[int, ...] = (),
        statistics: dict[str, dict[str, float]] | None = None,
    ) -> None:
        self.recipe = recipe
        self.step = self.skipped_steps = 0
        self.memory = 0.125
        self.not_finite: str | None = None
        self.base_fingerprint: dict[str, Any] = {"is_fp16": False, "tensors": {"model.norm.weight": "2 3f803f80"}}
        self.calls: list[str] = []
        self.stop = StopRequest()
        self.watch = FakeWatch(statistics or {"layer.experts.a": {"grad_norm": 1.0, "moved": 1.0}})
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self._skipped = skipped

    def train_step(self, micro_batches: list[MicroBatch]) -> StepResult:
        self.step += 1
        skipped = self.step in self._skipped
        self.skipped_steps += skipped
        loss = sum(float(batch.sequence_ids.sum()) for batch in micro_batches) + self.memory
        self.memory = self.memory * 1.01 + 0.1
        self.stop.look()
        num_tokens = sum(int(batch.attention_mask.sum()) for batch in micro_batches)
        return StepResult(math.nan if skipped else loss, 1.0, 1e-3, skipped, num_tokens, num_tokens // 2)

    def draw_start(self, micro_batches: list[MicroBatch]) -> StartReport:
        self.stop.check()
        rows = sorted(int(row) for batch in micro_batches for row in batch.sequence_ids)
        self.calls.append(f"draw_start of {rows} at {self.step}")
        return StartReport(12, 3)

    def check_packing(self) -> None:
        self.calls.append(f"check_packing at {self.step}")

    def evaluate(self, micro_batches: list[MicroBatch], routed: bool = True) -> float:
        self.stop.check()
        self.calls.append(f"evaluate at {self.step}" if routed else f"evaluate base at {self.step}")
        return 4.0 - self.step / 10 if routed else 3.5

    def generate(self, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
        self.stop.check()
        self.calls.append(f"generate at {self.step}")
        return [f"step {self.step}: {prompt.messages[-1]['content']}" for prompt in prompts]

    def first_not_finite(self) -> str | None:
        return self.not_finite

    def save(self, root: Path, state: dict[str, Any], keep: int) -> Path:
        self.calls.append(f"save at {self.step}")
        folder = root / f"checkpoint-{self.step}"
        folder.mkdir(parents=True)
        own = {"step": self.step, "memory": self.memory, "skipped_steps": self.skipped_steps}
        (folder / "state.json").write_text(json.dumps({"own": own, "caller": state}))
        return folder

    def load(self, folder: Path, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        state = json.loads((folder / "state.json").read_text())
        check(state["caller"])
        self.step, self.memory = state["own"]["step"], state["own"]["memory"]
        self.skipped_steps = state["own"]["skipped_steps"]
        caller: dict[str, Any] = state["caller"]
        return caller

    def save_adapter(self, folder: Path) -> None:
        self.calls.append(f"save_adapter at {self.step}")
        folder.mkdir(parents=True, exist_ok=True)


class FakeDataset:
    """`count` samples of three tokens, two of them learned."""

    def __init__(self, count: int, fingerprint: str = "data") -> None:
        self.num_tokens = np.full(count, 3)
        self.num_supervised = np.full(count, 2)
        self.mixture = Mixture([count])
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.num_tokens)

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        return [1, 2, 3], [-100, 2, 3]

    def tools(self, index: int) -> None:
        return None

    def messages(self, index: int) -> list[Message]:
        return [
            {"role": "user", "content": f"question {index}"},
            {"role": "assistant", "content": f"answer {index}"},
        ]

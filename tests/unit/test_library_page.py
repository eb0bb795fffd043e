"""The loops of docs/library.md run as they stand there, and learn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
IMPORTS = BLOCKS[0].partition("model = ")[0]


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, 260, (12,), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for _ in range(count)]


@pytest.mark.parametrize("block", BLOCKS, ids=["plain", "autocast", "trainer", "gradient", "falling_k"])
def test_a_loop_learns(block: str, tmp_path: Path) -> None:
    batches = [{name: value.unsqueeze(0) for name, value in row.items()} for row in rows(12)]
    names: dict[str, Any] = {"path": tiny_llama(tmp_path / "model"), "batches": batches, "rows": rows(40)}
    names["folder"] = str(tmp_path / "trainer")
    exec(IMPORTS + block, names)
    model = names["model"]
    with torch.no_grad():
        after = model(**batches[0]).loss.item()
        for _, layer in [pair for pair in model.named_modules() if pair[0].endswith("experts")]:
            layer.b.zero_()
        before = model(**batches[0]).loss.item()
    assert after < before - 0.01
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    assert names["optimizer"].num_steps == (4 if "Trainer" in block else 12)

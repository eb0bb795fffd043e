"""Which base model something belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dsmoelora.adapters.fingerprint import difference, fingerprint
from tests.helpers import tiny_llama


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def load(base_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_path, dtype=dtype)


def of(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(fingerprint(model.named_parameters())))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_makes_no_other_base(base_path: Path, dtype: torch.dtype) -> None:
    whole, loaded = of(load(base_path)), of(load(base_path, dtype))
    assert difference(whole, loaded) is None and difference(loaded, whole) is None


@pytest.mark.parametrize("factor", [0.995, 1.005])
def test_half_a_percent_in_any_tensor_makes_another_base(base_path: Path, factor: float) -> None:
    expected = of(load(base_path))
    for name in expected["tensors"]:
        model = load(base_path)
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
        assert difference(expected, of(model)) == f"{name} has other numbers"


def test_rows_in_another_order_make_another_base(base_path: Path) -> None:
    model = load(base_path)
    expected = of(model)
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows.copy_(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])
    assert difference(expected, of(model)) == "model.embed_tokens.weight has other numbers"


def test_other_shapes_and_tensors_make_another_base(base_path: Path) -> None:
    expected, model = of(load(base_path)), load(base_path)
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 96, bias=False)
    assert difference(expected, of(model)) == "model.layers.0.mlp.gate_proj.weight has shape [96, 64], not [128, 64]"
    model = load(base_path)
    del model.model.layers[1]
    assert difference(expected, of(model)) == "model.layers.1.self_attn.q_proj.weight is missing"
    assert difference(of(model), expected) == "model.layers.1.self_attn.q_proj.weight is new"

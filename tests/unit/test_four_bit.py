"""Linear layers in 4 bits, against bitsandbytes' own functions and plain layers with the rounded weights."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import four_bit
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.four_bit import FrozenLinear4bit, packed, packed_layers, read_before_packing, unpacked
from dsmoelora.config import DataConfig, DataSource, ModelConfig, Recipe
from dsmoelora.config.run import QUANTIZE
from dsmoelora.doctor.local import local_findings
from dsmoelora.errors import CheckpointError, ConfigError, ModelError
from dsmoelora.model import chosen_to_pack, model_for_inference, watched_loading
from dsmoelora.plan import make_plan
from dsmoelora.run.identity import check_identity, identity_of
from tests.architectures import save_model
from tests.helpers import tiny_llama
from tests.rounded import dequantised
from tests.unit.test_export import CONFIG, make_adapter

functional = pytest.importorskip("bitsandbytes.functional", reason="the extra [quant] is not installed")


def rounded(weight_OD: Tensor) -> Tensor:
    code, state = functional.quantize_4bit(weight_OD.contiguous(), blocksize=64, quant_type="nf4")
    weight: Tensor = functional.dequantize_4bit(code, state)
    return weight.view_as(weight_OD)


def layer_of(weight_OD: Tensor, bias_O: Tensor | None = None) -> FrozenLinear4bit:
    layer = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias_O is not None)
    layer.__class__ = FrozenLinear4bit
    assert isinstance(layer, FrozenLinear4bit)
    numbers = torch.empty(four_bit.num_packed(layer.shape, weight_OD.dtype), dtype=weight_OD.dtype)
    layer.weight = nn.Parameter(numbers, requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.clone(), requires_grad=False)
    layer.load_state_dict({"weight": weight_OD} | ({} if bias_O is None else {"bias": bias_O}))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (50, 32), (1, 64), (128, 7)])
def test_a_packed_weight_is_what_bitsandbytes_makes_of_it(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if weight_OD.numel() % 64:
        weight_OD = weight_OD.repeat(1, 64)
    flat = packed(weight_OD, dtype)
    size = tuple(weight_OD.shape)
    assert flat.dtype == dtype and flat.shape == (four_bit.num_packed(size, dtype),)
    assert flat.numel() * dtype.itemsize * 8 == weight_OD.numel() * four_bit.BITS
    assert torch.equal(unpacked(flat, size, dtype), rounded(weight_OD))
    there_and_back = nn.Parameter(flat.clone(), requires_grad=False).data.view(torch.uint8)
    assert torch.equal(there_and_back, flat.view(torch.uint8)), "no number of it may be touched, not-a-numbers included"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_rounded_weight(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    weight_OD, bias_O = torch.randn(48, 64, generator=rng).to(dtype), torch.randn(48, generator=rng).to(dtype)
    x = torch.randn(2, 3, 64, generator=rng).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 48, generator=rng).to(dtype)
    y = layer_of(weight_OD, bias_O)(x)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    plain = nn.functional.linear(x, rounded(weight_OD), bias_O)
    (expected,) = torch.autograd.grad(plain, x, grad)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    torch.testing.assert_close(y, plain, **tolerance)
    torch.testing.assert_close(grad_x, expected, **tolerance)


def test_a_packed_weight_is_moved_and_never_cast() -> None:
    """`float()` of a model would make other codes of its codes."""
    layer = layer_of(torch.randn(48, 64).bfloat16())
    before = layer.weight.clone()
    for cast in (nn.Module.float, nn.Module.half, lambda model: model.to(torch.float64)):
        with pytest.raises(ModelError, match=r"cannot be cast from torch.bfloat16 to torch.float\d\d: it is codes"):
            cast(nn.Sequential(layer))
    moved = nn.Sequential(layer).bfloat16().to("cpu")[0]
    assert torch.equal(moved.weight.view(torch.uint8), before.view(torch.uint8))
    assert layer.to("meta").weight.dtype == torch.bfloat16


def test_nothing_but_the_parameter_is_kept_for_the_backward_pass() -> None:
    layer, kept = layer_of(torch.randn(48, 64)), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert [tensor is layer.weight or tensor.data_ptr() == layer.weight.data_ptr() for tensor in kept] == [True]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), intermediate_size=96)


@pytest.fixture(scope="module")
def on_rounded(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dequantised(base_path, tmp_path_factory.mktemp("rounded") / "base")


@pytest.fixture
def in_four_bits(base_path: Path, computes_in_fp32: None) -> Iterator[Any]:
    yield model_for_inference(str(base_path), "", quantize="nf4")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 28).view(2, 12)).logits
    return found


def test_a_model_says_what_it_says_with_rounded_weights(in_four_bits: Any, base_path: Path, on_rounded: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(on_rounded)
    names = [name for name, _ in expected.named_parameters() if name.endswith("_proj.weight")]
    assert sorted(packed_layers(in_four_bits)) == sorted(names)
    torch.testing.assert_close(logits(in_four_bits), logits(expected), rtol=1e-5, atol=1e-5)
    assert (logits(expected) - logits(AutoModelForCausalLM.from_pretrained(base_path))).abs().max() > 1e-3


def test_its_fingerprint_is_that_of_the_model_as_it_came(in_four_bits: Any, base_path: Path) -> None:
    expected = fingerprint(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    assert fingerprint(in_four_bits.named_parameters(), read_before_packing(in_four_bits)) == expected


def test_no_weight_stays_in_more_bits(base_path: Path) -> None:
    """Not even with somebody who counts the tensors that come."""

    def whole() -> list[Any]:
        gc.collect()
        return [
            one for one in gc.get_objects() if type(one) is nn.Parameter and one.shape == (96, 64) and not one.is_meta
        ]

    before = len(whole())
    with watched_loading(str(base_path), lambda: None, speaks=False):
        model = model_for_inference(str(base_path), "", quantize="nf4")
        assert len(whole()) == before
    assert packed_layers(model)


@pytest.mark.parametrize(("quantize", "said"), [("nf4", ""), ("none", "in 16 bits or more: what it says will differ")])
@pytest.mark.usefixtures("computes_in_fp32")
def test_an_adapter_knows_what_it_was_trained_on(
    base_path: Path, on_rounded: Path, tmp_path: Path, quantize: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(base_path, tmp_path / "adapter")
    expected = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    tensors = {name: value for name, value in expected.named_parameters() if value.requires_grad}
    prints = fingerprint(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    layers = sorted({name.rpartition(".experts.")[0] for name in tensors if ".experts." in name})
    write_adapter(tmp_path / "packed", CONFIG, layers, tensors, str(base_path), prints, base_quantization="nf4")
    with caplog.at_level(logging.WARNING):
        model = load_adapter(model_for_inference(str(base_path), "", quantize=quantize), tmp_path / "packed")
    assert said in caplog.text and bool(caplog.text) == bool(said)
    if quantize == "nf4":
        rounded_base = AutoModelForCausalLM.from_pretrained(on_rounded)
        names = dict(rounded_base.named_parameters())
        inject(rounded_base, replace(CONFIG, target_modules=layers))
        with torch.no_grad():
            for name, parameter in rounded_base.named_parameters():
                if name not in names and parameter.requires_grad:
                    parameter.copy_(tensors[name])
        torch.testing.assert_close(logits(model), logits(rounded_base.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"expert": "dora"}, {"init": "svd"}], ids=str)
def test_experts_that_need_the_weight_are_refused(in_four_bits: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="on a base in 4 bits"):
        inject(in_four_bits, AdapterConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"], **changes))


def test_sizes_and_models_that_cannot_be_packed(tmp_path: Path) -> None:
    odd = tiny_llama(tmp_path / "odd", hidden_size=34, num_attention_heads=2, head_dim=16, intermediate_size=50)
    with pytest.raises(
        ModelError, match=r"packs 64 weights at a time, but the size of model\.layers\.0\.mlp\.gate_proj"
    ):
        chosen_to_pack(ModelConfig(str(odd), "fp32", quantize="nf4"))
    transposed = save_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"the model has no nn\.Linear to pack"):
        chosen_to_pack(ModelConfig(str(transposed), "fp32", quantize="nf4"))


def test_without_the_extra(base_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes\. pip install 'dsmoelora\[quant\]'"):
        chosen_to_pack(ModelConfig(str(base_path), "fp32", quantize="nf4"))


def test_the_plan_says_how_much_it_is(base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "x", "output": "y"}\n' * 4)
    recipe = Recipe(
        model=ModelConfig(str(base_path), "fp32", quantize="nf4"),
        adapter=AdapterConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"], init="loftq"),
        data=DataConfig(train=[DataSource(str(tmp_path / "rows.jsonl"))]),
    )
    recipe.run.dir = str(tmp_path / "runs")
    rows = dict(make_plan(recipe, {"zero_optimization": {"stage": 3}}, 1, "none").rows)
    said = rows["base weights"]
    assert "while weights are read, 3 for each of 2 layers" in rows["start"]
    model = AutoModelForCausalLM.from_pretrained(base_path)
    weights = sum(one.numel() for name, one in model.named_parameters() if name.endswith("_proj.weight"))
    total = sum(one.numel() for one in model.parameters())
    size = (weights * 4.5 / 8 + (total - weights) * 4) / 2**10
    assert f"{total:,} frozen, {size:.1f} KiB in fp32 and {weights / total:.0%} of them in 4 bits" in said


def test_the_doctor_looks(tmp_path: Path) -> None:
    (found,) = [finding for finding in local_findings(tmp_path, {}) if finding.what == "bases in 4 bits"]
    assert found.found.startswith("bitsandbytes 0.") and not found.problem


def test_a_run_that_goes_on_keeps_its_bits() -> None:
    base = {"is_fp16": False, "tensors": {}}
    recipes = (Recipe(model=ModelConfig("x", "fp32", quantize=quantize)) for quantize in QUANTIZE)
    then, now = (identity_of(recipe, base, "rows", None) for recipe in recipes)
    with pytest.raises(CheckpointError, match=r"model\.quantize was none, and is nf4"):
        check_identity(Path("checkpoint-1"), then, now)

"""Which dtype `model.dtype: auto` is on which machine, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmoelora.cli import parse_command
from dsmoelora.config import ModelConfig, Recipe, RunConfig, dtype
from dsmoelora.model import model_for_inference
from dsmoelora.parallel.dtype import settle_dtype
from dsmoelora.run.files import RECIPE_FILE
from dsmoelora.run.folder import dtype_before, write_description
from launch.train import run
from tests.helpers import tiny_llama
from tests.launched import make_workshop

CPU = torch.device("cpu")


@pytest.fixture(params=["AVX2", "AMX"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU without instructions for bf16, and one with them."""
    capabilities = {"amx_bf16": request.param == "AMX", "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return str(request.param)


def recipe_with(**model: Any) -> Recipe:
    return Recipe(model=ModelConfig(**model))


def test_auto_asks_the_cpu_for_its_instructions(instructions: str) -> None:
    settled = settle_dtype(recipe_with())
    assert settled.recipe.model.dtype == {"AVX2": "fp32", "AMX": "bf16"}[instructions]
    assert instructions in settled.why and not settled.notes


@pytest.mark.parametrize(
    ("capabilities", "name"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX"),
        ({"avx512_bf16": True, "avx2": True}, "AVX512_BF16"),
        ({"sve_bf16": True, "neon": True}, "SVE_BF16"),
        ({"bf16": True, "neon": True}, "BF16"),
        ({"avx512_f": True}, torch.backends.cpu.get_cpu_capability()),
    ],
)
def test_bf16_is_where_the_instructions_are(
    capabilities: dict[str, bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert dtype.instruction_set() == name
    assert dtype.has_bf16(CPU) == any(capabilities.get(key) for key in capabilities if key.endswith("bf16"))


def test_a_torch_that_does_not_tell_capabilities_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert dtype.instruction_set() == "AVX512_BF16" and dtype.has_bf16(CPU)


@pytest.mark.parametrize("emulated", [False, True])
def test_a_gpu_that_only_emulates_bf16_does_not_count(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or not emulated

    cuda = SimpleNamespace(is_bf16_supported=is_bf16_supported)
    monkeypatch.setattr(torch, "get_device_module", lambda device: cuda)
    assert dtype.has_bf16(torch.device("cuda")) is not emulated


def test_an_accelerator_that_cannot_be_asked_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert not dtype.has_bf16(torch.device("mps"))


def test_what_the_recipe_says_counts_and_slow_bf16_is_named(instructions: str) -> None:
    settled = settle_dtype(recipe_with(dtype="bf16"))
    assert settled.recipe.model.dtype == "bf16" and settled.why == "bf16, as model.dtype says"
    if instructions == "AMX":
        assert not settled.notes
    else:
        (note,) = settled.notes
        assert all(word in note for word in ("AVX2", dtype.SLOWER_WITHOUT_BF16, "model.dtype", "fp32"))


def test_auto_goes_on_in_the_dtype_of_before(instructions: str) -> None:
    settled = settle_dtype(recipe_with(), before="fp32")
    assert settled.recipe.model.dtype == "fp32" and settled.why == "fp32, as the run began" and not settled.notes


def test_another_dtype_than_before_is_said() -> None:
    settled = settle_dtype(recipe_with(dtype="fp32"), before="bf16")
    assert settled.recipe.model.dtype == "fp32"
    assert settled.notes == ["the run began in bf16 and goes on in fp32, as model.dtype says."]


def test_the_run_folder_knows_the_dtype_of_before(tmp_path: Path) -> None:
    recipe = Recipe(run=RunConfig(name="a", dir=str(tmp_path)), model=ModelConfig(dtype="bf16"))
    assert dtype_before(recipe, "auto") is None, "there is no run yet"
    write_description(tmp_path / "a", recipe, {})
    assert dtype_before(recipe, "auto") == "bf16"
    assert dtype_before(recipe, "none") is None
    other = Recipe(run=RunConfig(name="b", dir=str(tmp_path)))
    assert dtype_before(other, str(tmp_path / "a" / "checkpoint-3")) == "bf16"


@pytest.mark.parametrize("text", ["", "model: {}", "model: [", "model: {dtype: fp64}", "\xff"])
def test_a_description_that_says_no_dtype_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / RECIPE_FILE).write_bytes(text.encode("latin-1"))
    assert dtype_before(Recipe(run=RunConfig(name="a", dir=str(tmp_path))), "auto") is None


def test_a_model_of_bf16_is_read_in_fp32_where_bf16_crawls(instructions: str, tmp_path: Path) -> None:
    model = model_for_inference(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)), "")
    assert model.dtype == {"AVX2": torch.float32, "AMX": torch.bfloat16}[instructions]


def test_the_plan_says_which_dtype_and_why(tmp_path: Path, capsys: pytest.CaptureFixture, instructions: str) -> None:
    recipe = str(make_workshop(tmp_path) / "recipe.yaml")
    chosen = {"AVX2": "fp32, for this CPU (AVX2) has no bf16", "AMX": "bf16, for this CPU (AMX) has bf16"}[instructions]
    run(parse_command(["--config", recipe, "--dry-run", "--model.dtype", "auto"]))
    assert chosen in capsys.readouterr().out
    command = parse_command(["--config", recipe, "--dry-run", "--resume", "auto", "--model.dtype", "auto"])
    write_description(command.recipe.run.folder, recipe_with(dtype="bf16"), {})
    run(command)
    said = capsys.readouterr().out
    assert "bf16, as the run began" in said
    assert ("no instructions for it" in said) == (instructions == "AVX2")

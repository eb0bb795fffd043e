"""Merged adapters: what PEFT merges, the base with the update in it, and what does not belong together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsmoelora import AdapterConfig, load_adapter
from dsmoelora.adapters.given import open_folders
from dsmoelora.errors import UserError
from dsmoelora.export import merge as merging
from launch import merge
from tests.architectures import save_model
from tests.given_adapters import dense_updates, expert_updates, logits, other_base, our_adapter, peft_adapter, with_peft
from tests.helpers import tiny_llama

ONE = AdapterConfig(r=2, lora_alpha=12, num_experts=1, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of PEFT, with other ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    one = peft_adapter(base_path, folder / "one", seed=1)
    return [one, peft_adapter(base_path, folder / "two", 2, r=5, use_rslora=True, target_modules=["q_proj", "v_proj"])]


def run(monkeypatch: pytest.MonkeyPatch, adapters: list[Path], *flags: object) -> None:
    words = ["merge.py", "--adapters", *adapters, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    merge.main()


def sums(base_path: Path, adapters: list[Path], weights: list[float]) -> dict[str, Tensor]:
    """The weighed sum of the adapters' updates, fp64."""
    found: dict[str, Tensor] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        for name, update in dense_updates(with_peft(base_path, folder)).items():
            found[name] = found.get(name, 0) + weight * update
    return found


def merged_by_peft(base_path: Path, adapters: list[Path], method: str, weights: list[float], **more: Any) -> Any:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), str(adapters[0]), "0")
    model.load_adapter(str(adapters[1]), "1")
    model.add_weighted_adapter(["0", "1"], weights, "default", combination_type=method, **more)
    return model


@pytest.mark.parametrize(("method", "flags"), [("cat", {}), ("svd", {"--rank": 4}), ("svd", {})])
def test_what_peft_merges(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, flags: dict[str, int]
) -> None:
    """PEFT merges adapters of the same layers alone."""
    adapters = [peft_adapter(base_path, tmp_path / str(seed), seed, r=3, lora_alpha=3 * seed) for seed in (1, 2)]
    more = {"svd_rank": flags["--rank"]} if flags else {}
    theirs = dense_updates(merged_by_peft(base_path, adapters, method, [0.7, 0.4], **more))
    words = [word for pair in flags.items() for word in pair]
    run(monkeypatch, adapters, "--weights", 0.7, 0.4, "--method", method, *words, "--out", tmp_path / "out")
    merged = with_peft(base_path, tmp_path / "out")
    assert merged.peft_config["default"].r == {"cat": 6}.get(method, flags.get("--rank", 3))
    for name, update in dense_updates(merged).items():
        torch.testing.assert_close(update, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.5, -0.5], []], ids=["given", "mean"])
def test_other_ranks_scales_and_layers_are_the_dense_sum(
    base_path: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[float]
) -> None:
    run(monkeypatch, adapters, *(["--weights", *weights] if weights else []), "--out", tmp_path / "out")
    found = dense_updates(with_peft(base_path, tmp_path / "out"))
    wanted = sums(base_path, adapters, weights or [0.5, 0.5])
    assert found.keys() == wanted.keys() and len(wanted) == 2 * 3
    for name, update in found.items():
        torch.testing.assert_close(update, wanted[name], rtol=1e-5, atol=1e-7)


def test_the_best_update_of_a_rank(
    base_path: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eckart & Young: what is left over are the smaller singular values."""
    run(monkeypatch, adapters, "--method", "svd", "--rank", 2, "--out", tmp_path / "out")
    wanted = sums(base_path, adapters, [0.5, 0.5])
    for name, update in dense_updates(with_peft(base_path, tmp_path / "out")).items():
        left_over = torch.linalg.svdvals(wanted[name])[2:].norm()
        assert (wanted[name] - update).norm() <= left_over * (1 + 1e-4)


def test_an_average_of_b_is_that_of_the_updates_where_a_is_the_same(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFA-LoRA's round; of `a` not a bit changes."""
    sites = [peft_adapter(base_path, tmp_path / str(seed), seed, lora_alpha=3 * seed) for seed in (1, 2)]
    tensors = [load_file(site / "adapter_model.safetensors") for site in sites]
    same = {name: tensors[0][name] if "lora_A" in name else value for name, value in tensors[1].items()}
    save_file(same, sites[1] / "adapter_model.safetensors")
    run(monkeypatch, sites, "--method", "average", "--weights", 0.25, 0.75, "--out", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = sums(base_path, sites, [0.25, 0.75])
    for name, update in dense_updates(with_peft(base_path, tmp_path / "out")).items():
        a_name = f"base_model.model.{name}.lora_A.weight"
        assert torch.equal(merged[a_name], tensors[0][a_name])
        torch.testing.assert_close(update, wanted[name], rtol=1e-6, atol=1e-8)


def test_a_folder_of_ours(
    base_path: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours and PEFT's, into one of ours: load_adapter knows it, and its base."""
    ours = our_adapter(base_path, tmp_path / "ours", ONE)
    run(monkeypatch, [ours, adapters[0]], "--weights", 1, 1, "--format", "dsmoelora", "--out", tmp_path / "out")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), tmp_path / "out")
    wanted = dense_updates(with_peft(base_path, adapters[0]))
    for name, update in expert_updates(load_adapter(AutoModelForCausalLM.from_pretrained(base_path), ours)).items():
        wanted[name] = wanted.get(name, 0) + update[0]
    for name, update in expert_updates(model).items():
        torch.testing.assert_close(update[0], wanted[name], rtol=1e-5, atol=1e-7)
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_a_plain_model_with_the_update_in_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, targets: list[str]
) -> None:
    base_path = save_model(architecture, tmp_path / "base")
    conv = architecture == "gpt2"
    folder = peft_adapter(base_path, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=conv)
    run(monkeypatch, [folder], "--into-base", tmp_path / "model")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(merged, logits(with_peft(base_path, folder)), rtol=1e-5, atol=1e-5)
    assert (merged - logits(AutoModelForCausalLM.from_pretrained(base_path))).abs().max() > 1e-3
    AutoTokenizer.from_pretrained(tmp_path / "model")


def test_a_base_in_bf16_is_rounded_once(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    folder = peft_adapter(base, tmp_path / "adapter")
    run(monkeypatch, [folder], "--weights", 1, "--into-base", tmp_path / "model")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "model"))
    for name, update in dense_updates(with_peft(base, folder)).items():
        wanted = (before[f"{name}.weight"].double() + update).bfloat16()
        assert (after[f"{name}.weight"] != wanted).float().mean() < 1e-3  # but for ties of fp32 and fp64
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(after[untouched], before[untouched])


def test_one_layer_of_factors_at_a_time(
    base_path: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the base: no layer's factors are read before the one before it is done."""
    events: list[str] = []
    read, model = merging._factors, AutoModelForCausalLM.from_pretrained(base_path)
    monkeypatch.setattr(merging, "_factors", lambda folder, name: events.append(name) or read(folder, name))
    plan = merging.plan_merge(open_folders(adapters), None, "cat", None)
    for layer in plan.layers():
        assert set(events) == {layer.name}
        events.clear()
    assert merging.add_to_base(model, plan) < 1e-5


def mixture(base_path: Path, folder: Path) -> Path:
    return our_adapter(base_path, folder, AdapterConfig(r=2, num_experts=3, target_modules=["q_proj"]))


def test_what_cannot_be_merged_is_refused(
    base_path: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", tmp_path / "out"]
    ours = our_adapter(base_path, tmp_path / "ours", ONE)
    elsewhere = our_adapter(other_base(base_path, tmp_path / "other"), tmp_path / "elsewhere", ONE)
    wide = tiny_llama(tmp_path / "wide", hidden_size=32)
    cases: list[tuple[list[Path], list[object], str]] = [
        (adapters, [], "Give one of --out"),
        (adapters, [*out, "--into-base", "x"], "Give one of --out"),
        (adapters, [*out, "--rank", 3], "--rank is 3, but it must be left out with --method cat"),
        (adapters, [*out, "--method", "svd", "--rank", 0], "--rank is 0"),
        (adapters, ["--into-base", "x", "--format", "peft"], "--format is 'peft'"),
        (adapters, [*out, "--weights", 1], r"--weights is \[1.0\], but it must be 2 numbers"),
        (adapters, [*out, "--method", "average"], "an average of both factors is no average of the updates"),
        ([mixture(base_path, tmp_path / "mixture")], out, "3 experts that are routed"),
        ([ours, elsewhere], out, "belong to different base models: model.embed_tokens.weight has other numbers"),
        ([adapters[0], peft_adapter(wide, tmp_path / "narrow")], out, "belong to different base models"),
        ([ours], ["--into-base", tmp_path / "m", "--model", tmp_path / "other"], "belongs to another base model"),
        ([adapters[0]], [*out, "--model", wide], "Give the right one with --model"),
        ([tmp_path / "gone"], out, "is no adapter folder"),
        (adapters, ["--out", adapters[0]], "which exists already"),
    ]
    for folders, flags, message in cases:
        with pytest.raises(UserError, match=message):
            run(monkeypatch, folders, *flags)
        assert not (tmp_path / "out").exists()


def test_a_weight_that_others_share_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    folder = our_adapter(base, tmp_path / "adapter", AdapterConfig(num_experts=1, target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"shares its weight with model\.embed_tokens"):
        run(monkeypatch, [folder], "--into-base", tmp_path / "model")
    assert not (tmp_path / "model").exists()

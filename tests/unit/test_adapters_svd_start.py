"""Experts that start from the base weight's singular vectors, on plain models."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.folder_files import START_FILE, WEIGHTS_FILE
from dsmoelora.adapters.starts.svd import start_names, svd_start, uniform_gates
from dsmoelora.config.adapter_options import RouterName
from dsmoelora.errors import CheckpointError, ConfigError, ModelError
from tests.architectures import save_model
from tests.fixed_gate import fix_gates
from tests.helpers import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config_of(**settings: Any) -> AdapterConfig:
    return AdapterConfig(
        **{"r": 2, "num_experts": 4, "lora_alpha": 6, "target_modules": TARGETS, "init": "svd"} | settings
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 28).view(2, 12)).logits
    return found.float()


def reference(weight_OD: Tensor, num_experts: int, rank: int) -> list[Any]:
    """`U_k S_k V_k^T` of every expert's segment, by numpy in fp64."""
    u, s, vt = np.linalg.svd(weight_OD.double().numpy(), full_matrices=False)
    length = min(weight_OD.shape) // num_experts
    places = [slice(e * length, e * length + rank) for e in range(num_experts)]
    return [u[:, k] @ np.diag(s[k]) @ vt[k] for k in places]


@pytest.mark.parametrize(("shape", "num_experts", "rank"), [((12, 9), 1, 4), ((7, 11), 3, 2), ((8, 8), 4, 2)])
def test_every_expert_starts_from_its_segment_split_evenly(shape: tuple[int, int], num_experts: int, rank: int) -> None:
    weight_OD = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    start = svd_start(weight_OD, num_experts, rank, scale=1.7)
    for a_DR, b_OR, expected in zip(start.a_EDR, start.b_EOR, reference(weight_OD, num_experts, rank), strict=True):
        np.testing.assert_allclose((1.7 * b_OR @ a_DR.t()).numpy(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(a_DR.t() @ a_DR, b_OR.t() @ b_OR, rtol=0, atol=1e-5)  # S / s, both diagonal


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_inject_shifts_the_base_by_the_average_of_the_starts(tmp_path: Path, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(architecture, tmp_path))
    before = copy.deepcopy(model)
    targets = "all-linear" if architecture == "gpt2" else TARGETS  # GPT-2's weights lie the other way round
    names = inject(model, config_of(target_modules=targets, use_rslora=True))
    for name in names:
        old, new = (m.get_submodule(name) for m in (before, model))
        old_OD, new_OD = old.weight.detach(), new.base.weight.detach()
        if architecture == "gpt2":
            old_OD, new_OD = old_OD.t(), new_OD.t()
        expected = old_OD.double().numpy() - sum(reference(old_OD, 4, 2)) / 4
        np.testing.assert_allclose(new_OD.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_one_expert_leaves_the_model_as_it_was(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path), dtype=dtype)
    expected = logits(model)
    inject(model, config_of(num_experts=1, r=8))
    found = logits(model)
    assert (found - expected).norm() <= tolerance * expected.norm()
    for _, layer in adapted_layers(model):
        layer.experts.b.data.zero_()
    assert (logits(model) - expected).norm() > 0.2 * expected.norm(), "the base has been shifted"


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_on_the_average_over_uniform_choices_a_layer_says_what_the_base_said(tmp_path: Path, top_k: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path))
    name = "model.layers.0.mlp.down_proj"
    base = copy.deepcopy(model.get_submodule(name))
    inject(model, config_of(target_modules=[name]))
    layer: Any = model.get_submodule(name)
    x_TD = torch.randn(5, base.in_features, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(5, base.out_features)
    choices = list(combinations(range(4), top_k))
    for choice in choices:
        gate_E = torch.zeros(4)
        gate_E[list(choice)] = 1 / top_k
        fix_gates(layer, gate_E)
        total += layer(x_TD).detach()
    torch.testing.assert_close(total / len(choices), base(x_TD).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", get_args(RouterName))
def test_gates_sum_to_one_so_that_a_uniform_choice_means_1_of_e_each(tmp_path: Path, router: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path)).eval()
    inject(model, config_of(router=router))
    sums: list[Tensor] = []
    for _, layer in adapted_layers(model):
        layer.router.register_forward_hook(lambda _, __, out: sums.append(out.sum(-1)))
        layer.context.hooked = True
    logits(model)
    assert len(sums) == 6
    torch.testing.assert_close(torch.cat(sums), torch.ones(6 * 24))


def save(model: Any, config: AdapterConfig, base: Any, start: dict[str, Tensor], folder: Path) -> Path:
    tensors = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    layers = [name for name, _ in adapted_layers(model)]
    prints = fingerprint(base.named_parameters())
    write_adapter(folder, config, layers, tensors, "models/tiny", prints, start=start)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Path]:
    """An untouched base, the model that was trained on it, and the adapter's folder."""
    base = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / "base")).eval()
    model, config = copy.deepcopy(base), config_of()
    inject(model, config)
    start = {
        n: dict(model.named_parameters())[n].detach().clone()
        for name, _ in adapted_layers(model)
        for n in start_names(name)
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return base, model, save(model, config, base, start, tmp_path / "adapter")


def test_a_loaded_adapter_shifts_an_untouched_base_and_gives_the_same_logits(saved: tuple[Any, Any, Path]) -> None:
    base, model, folder = saved
    expected = logits(model.eval())
    assert (logits(base) - expected).norm() > 0.01 * expected.norm()
    assert torch.equal(logits(load_adapter(base, folder)), expected)
    with pytest.raises(ModelError, match="has routed experts already"):
        load_adapter(base, folder)


def test_blocks_with_one_router_beside_plain_lora_start_so_too(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path / "base")).eval()
    config = config_of(style="ffn_block", target_modules=["up_proj", "down_proj"], lora_modules=["q_proj"])
    model, expected = copy.deepcopy(base), logits(base)
    inject(model, config)
    assert {layer.experts.a.shape[0] for _, layer in adapted_layers(model)} == {1, 4}
    with uniform_gates(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (logits(model) - expected).abs().max() > 1e-3, "the routers choose"
    start = {
        factor: model.get_parameter(factor).detach().clone()
        for name, _ in adapted_layers(model)
        for factor in start_names(name)
    }
    folder = save(model, config, base, start, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(base, folder)), logits(model))


def test_a_base_that_is_shifted_already_is_refused(saved: tuple[Any, Any, Path]) -> None:
    _, model, folder = saved
    for name, layer in list(adapted_layers(model)):
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        load_adapter(model, folder)


def test_a_folder_without_its_start_is_refused_before_the_model_is_touched(saved: tuple[Any, Any, Path]) -> None:
    base, _, folder = saved
    before = logits(base)
    start = (folder / START_FILE).read_bytes()
    (folder / START_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no start\.safetensors.*Copy the whole adapter folder"):
        load_adapter(base, folder)
    (folder / START_FILE).write_bytes(start[: len(start) // 2])
    with pytest.raises(CheckpointError, match=r"start\.safetensors cannot be read"):
        load_adapter(base, folder)
    (folder / START_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())  # has routers too
    with pytest.raises(CheckpointError, match=r"start\.safetensors does not fit"):
        load_adapter(base, folder)
    assert not list(adapted_layers(base))
    assert torch.equal(logits(base), before)


def test_more_singular_values_than_there_are_is_an_error_that_names_the_layer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path))
    smallest = min(model.model.layers[0].self_attn.v_proj.weight.shape)
    count = f"num_experts x r = {smallest // 2 + 1} x 2 = {smallest + 2}"
    words = rf"{count} is above.*= {smallest} of .*layers\.0\.self_attn\.v_proj"
    with pytest.raises(ConfigError, match=words):
        inject(model, config_of(num_experts=smallest // 2 + 1))
    assert not list(adapted_layers(model))
    inject(model, config_of(num_experts=smallest // 2))


def test_a_weight_that_another_module_has_too_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, tie_word_embeddings=True))
    with pytest.raises(ModelError, match=r"weight of lm_head, but model\.embed_tokens has the same one"):
        inject(model, config_of(target_modules=["q_proj"], lora_modules=["lm_head"]))
    inject(model, config_of(target_modules=["q_proj"]))


def test_experts_with_a_mixer_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.init is 'svd'.*kaiming, gaussian or gradient with adapter\.expert = moslora"
    ):
        config_of(expert="moslora")


def test_a_weight_with_numbers_that_are_not_finite_is_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path))
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj has no singular value decomposition"):
        inject(model, config_of())

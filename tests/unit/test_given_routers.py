"""Routers for experts that exist: `constant` is one LoRA, `arrow` does what PEFT's Arrow does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.given import settings_of
from dsmoelora.adapters.routers.given import prototypes
from dsmoelora.config import LossesConfig, Recipe, TrainConfig
from dsmoelora.errors import ConfigError
from dsmoelora.optim.rows import adapter_tensors, trainables
from launch import export, merge
from tests.given_adapters import (
    dense_updates,
    expert_updates,
    logits,
    our_adapter,
    peft_adapter,
    started_from,
    with_peft,
)
from tests.helpers import tiny_llama


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [peft_adapter(base_path, folder / str(seed), seed, lora_alpha=3 * seed) for seed in (1, 2, 3)]


STARTS = {"softmax": [1 / 3] * 3, "mean": [1 / 3] * 3, "sum": [1.0] * 3}


@pytest.mark.parametrize(("init", "start"), [("kaiming", "mean"), ("svd", "softmax"), ("loftq", "softmax")])
def test_free_gates_are_the_default_but_beside_a_shifted_base(init: Any, start: str) -> None:
    assert AdapterConfig(num_experts=3, router="constant", init=init).router_start == start


@pytest.mark.parametrize("start", STARTS)
def test_a_constant_router_starts_as_the_weighed_sum(base_path: Path, adapters: list[Path], start: str) -> None:
    model = started_from(base_path, *adapters, router="constant", router_start=start)
    merged = AutoModelForCausalLM.from_pretrained(base_path)
    with torch.no_grad():
        for folder, gate in zip(adapters, STARTS[start], strict=True):
            for name, update in dense_updates(with_peft(base_path, folder)).items():
                merged.get_submodule(name).weight += (gate * update).float()
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_its_numbers_get_the_gradient_of_the_loss(start: str) -> None:
    """As autograd finds it for the dense sum in fp64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7))
    inject(model, AdapterConfig(r=2, num_experts=3, router="constant", router_start=start, target_modules=["0"]))
    router, bank, x_TD = model[0].router, model[0].experts, torch.randn(9, 12)
    with torch.no_grad():
        bank.b.normal_()
        router.weight += torch.tensor([[0.3], [-0.2], [0.1]])
    model(x_TD).square().sum().backward()
    weight_E = router.weight.detach().flatten().double().requires_grad_()
    gate_E = weight_E.softmax(0) if start == "softmax" else weight_E
    update_EOD = bank.scale * bank.b.detach().double() @ bank.a.detach().double().mT
    y_TO = model[0].base(x_TD).detach().double() + x_TD.double() @ torch.einsum("e,eod->do", gate_E, update_EOD)
    y_TO.square().sum().backward()
    torch.testing.assert_close(router.weight.grad.flatten().double(), weight_E.grad, rtol=1e-5, atol=1e-5)


def trained(base_path: Path, folder: Path, adapters: list[Path], **settings: Any) -> tuple[Path, Any]:
    """A folder with a constant router that has learned something, and the model."""
    model = started_from(base_path, *adapters, router="constant", **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for of, parameter in adapter_tensors(model):
            if of.factor.value == "router":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layers = [name for name, _ in adapted_layers(model)]
    config = AdapterConfig(
        num_experts=3, r=3, lora_alpha=3, router="constant", target_modules=["q_proj", "up_proj"], **settings
    )
    prints = fingerprint(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    tensors = {of.name: parameter.detach() for of, parameter in adapter_tensors(model)}
    write_adapter(folder, config, layers, tensors, str(base_path), prints)
    return folder, model.eval()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("program", [export, merge], ids=["export", "merge"])
def test_the_mixture_is_one_lora(
    base_path: Path,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    program: Any,
) -> None:
    """Exactly, without data, by either program."""
    folder, model = trained(base_path, tmp_path / "adapter", adapters, router_start=start)
    words = {export: ["--adapter", folder, "--format", "average"], merge: ["--adapters", folder]}[program]
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words), "--out", str(tmp_path / "out")])
    program.main()
    expected = logits(model)
    torch.testing.assert_close(logits(with_peft(base_path, tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"shared_experts": 2}, 5 * 2), ({"init": "svd"}, 2 * 3 * 2), ({"lora_modules": ["k_proj"]}, 3 * 2)],
    ids=str,
)
def test_an_average_of_such_a_mixture_is_exact(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], rank: int
) -> None:
    """With what has gate 1, and what was taken from the base, in it once."""
    config = AdapterConfig(r=2, num_experts=3, router="constant", target_modules=["q_proj", "up_proj"], **settings)
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    argv = ["export.py", "--adapter", str(folder), "--format", "average", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    export.main()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank
    expected = logits(load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder))
    found = logits(with_peft(base_path, tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sys, "argv", [*argv[:-1], str(tmp_path / "other"), "--fit"])
    with pytest.raises(ConfigError, match="Add --data"):
        export.main()


def test_the_mixture_of_blocks_is_one_lora(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router for each feed-forward block, plain layers beside them, a lower rank than all, into the base."""
    config = AdapterConfig(
        r=2,
        num_experts=3,
        router="constant",
        style="ffn_block",
        target_modules=["gate_proj", "up_proj", "down_proj"],
        lora_modules=["q_proj"],
    )
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    monkeypatch.setattr(sys, "argv", ["merge.py", "--adapters", str(folder), "--into-base", str(tmp_path / "out")])
    merge.main()
    expected = logits(load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_numbers_of_one_folder(base_path: Path, adapters: list[Path], tmp_path: Path) -> None:
    folder, model = trained(base_path, tmp_path / "adapter", adapters, router_start="mean")
    again = started_from(base_path, folder, router="constant", router_start="mean")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    other = started_from(base_path, folder, router="constant", router_start="softmax")
    for _, layer in adapted_layers(other):
        assert not layer.router.weight.any(), "the same tensor means something else there"


def test_prototypes_are_leading_right_singular_vectors() -> None:
    torch.manual_seed(0)
    a_EDR, b_EOR = torch.randn(4, 20, 3), torch.randn(4, 15, 3)
    b_EOR[3] = 0
    found_ED = prototypes(a_EDR, b_EOR)
    for expert in range(3):
        right = torch.linalg.svd((b_EOR[expert] @ a_EDR[expert].T).double()).Vh[0]
        assert (found_ED[expert] @ right.float()).abs() == pytest.approx(1, abs=1e-5)
        assert found_ED[expert].norm() == pytest.approx(1, abs=1e-5)
        assert found_ED[expert].max() == found_ED[expert].abs().max()
    assert not found_ED[3].any()


def far_apart(base_path: Path, folder: Path, seed: int) -> Path:
    """An adapter whose first singular value leads by far, for PEFT takes fifteen steps of power iteration."""
    peft_adapter(base_path, folder, seed, lora_alpha=6)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    spread = torch.tensor([1.0, 0.2, 0.04])
    for name, value in tensors.items():
        orthogonal = torch.linalg.qr(value.T if "lora_A" in name else value).Q
        tensors[name] = (orthogonal.T if "lora_A" in name else orthogonal * spread).contiguous()
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("options", [{"top_k": 2, "router_temperature": 0.5}, {"top_k": 3}, {"top_k": 1}], ids=str)
def test_arrow_is_that_of_peft(base_path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Prototypes up to their sign, gates, and what the model says."""
    folders = [far_apart(base_path, tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    ours = started_from(base_path, *folders, router="arrow", **options)
    settings = {"top_k": options["top_k"], "router_temperature": options.get("router_temperature", 1.0)}
    base = AutoModelForCausalLM.from_pretrained(base_path)
    theirs = create_arrow_model(base, [str(folder) for folder in folders], arrow_config=ArrowConfig(**settings)).eval()
    gates: list[Tensor] = []
    for _, layer in adapted_layers(ours):
        layer.router.register_forward_hook(lambda _, __, output: gates.append(output))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    for name, layer in adapted_layers(ours):
        of_peft = theirs.get_submodule(f"base_model.model.{name}").lora_arrow["arrow_router"].prototypes
        cosines = (layer.router.weight * of_peft).sum(-1)
        torch.testing.assert_close(cosines.abs(), torch.ones(3), rtol=0, atol=1e-5)
    assert all(((gate_TE > 0).sum(-1) == options["top_k"]).all() for gate_TE in gates)


def test_arrow_learns_nothing_and_is_kept(base_path: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Its directions are no trainable tensors, but tensors of the adapter."""
    model = started_from(base_path, *adapters, router="arrow", top_k=2)
    assert not [of for of, _ in trainables(model) if of.factor.value == "router"]
    tensors = {of.name: parameter.detach() for of, parameter in adapter_tensors(model)}
    config = AdapterConfig(
        num_experts=3, r=3, lora_alpha=3, router="arrow", top_k=2, target_modules=["q_proj", "up_proj"]
    )
    prints = fingerprint(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    layers = [name for name, _ in adapted_layers(model)]
    write_adapter(tmp_path / "adapter", config, layers, tensors, str(base_path), prints)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_arrow_goes_by_what_the_experts_are_now(base_path: Path, tmp_path: Path) -> None:
    """From one folder that was routed so too, whose experts have moved since."""
    config = AdapterConfig(r=2, num_experts=3, top_k=2, router="arrow", target_modules=["q_proj"])
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    for _, layer in adapted_layers(started_from(base_path, folder, router="arrow", top_k=2)):
        directions_ED = prototypes(layer.experts.a.detach(), layer.experts.b.detach())
        torch.testing.assert_close(layer.router.weight.detach(), directions_ED, rtol=1e-5, atol=1e-6)


def test_ranks_with_some_experts_know_the_directions_of_all(base_path: Path, adapters: list[Path]) -> None:
    paths = [str(folder) for folder in adapters[:2]]
    config = AdapterConfig(experts_from=paths, router="arrow", **settings_of(paths, {}))
    whole, part = (AutoModelForCausalLM.from_pretrained(base_path) for _ in range(2))
    inject(whole, config)
    inject(part, config, range(1, 2))
    for (_, own), (_, all_) in zip(adapted_layers(part), adapted_layers(whole), strict=True):
        assert torch.equal(own.router.weight, all_.router.weight) and own.router.weight.any(-1).all()


def test_experts_of_arrow_are_those_given(base_path: Path, adapters: list[Path]) -> None:
    found = expert_updates(started_from(base_path, *adapters, router="arrow"))
    for expert, folder in enumerate(adapters):
        for name, update in dense_updates(with_peft(base_path, folder)).items():
            torch.testing.assert_close(found[name][expert], update, rtol=1e-5, atol=1e-7)


GIVEN = {"experts_from": ["x", "y"], "num_experts": 2}


@pytest.mark.parametrize(
    ("adapter", "others", "message"),
    [
        ({"router": "arrow"}, {}, "adapter.router is 'arrow'"),
        ({"router": "arrow", "router_temperature": 0.0, **GIVEN}, {}, "adapter.router_temperature is 0.0"),
        ({"router": "arrow", "freeze": ["router"], **GIVEN}, {}, "some of a, b "),
        ({"router": "arrow", **GIVEN}, {"losses": LossesConfig(balance=0.1)}, "it learns nothing"),
        ({"router": "arrow", **GIVEN}, {"losses": LossesConfig(z=0.1)}, "losses.z is 0.1"),
        ({"router": "constant"}, {"losses": LossesConfig(balance=0.1)}, "every token uses every expert"),
        ({"router": "constant", "top_k": 2}, {}, "adapter.top_k is 2"),
        ({"router": "softmax", "router_start": "sum"}, {}, "Drop it, or set adapter.router to one that does: constant"),
        ({"router": "constant", "router_start": "sum", "init": "svd"}, {}, "adapter.router_start is 'sum'"),
        ({"router": "constant"}, {"train": TrainConfig(max_steps=0)}, "train.max_steps is 0"),
        ({"router": "softmax", **GIVEN}, {"train": TrainConfig(max_steps=0)}, "adapter.router is arrow or constant"),
    ],
)
def test_what_these_routers_cannot_be_is_refused(adapter: dict[str, Any], others: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(adapter=AdapterConfig(**adapter), **others)

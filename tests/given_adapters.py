"""Adapters that exist already, as PEFT and training would leave them, and what they do to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.experts.function import outgoing
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.starts.svd import start_experts

IDS_BS = torch.arange(4, 28).view(2, 12)


def peft_adapter(base_path: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A LoRA adapter as PEFT saves it, which has learned something."""
    options: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), LoraConfig(**options | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    model.save_pretrained(str(folder))
    return folder


def our_adapter(base_path: Path, folder: Path, config: AdapterConfig, seed: int = 0) -> Path:
    """An adapter folder of ours, whose experts and routers have learned something."""
    model = AutoModelForCausalLM.from_pretrained(base_path)
    prints = fingerprint(model.named_parameters())
    inject(model, config, start=lambda _: None)
    start = None
    if config.init == "svd":
        start_experts(model)
        start = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith((".experts.a", ".experts.b"))}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".router." in name:
            moved = torch.randn(parameter.shape, generator=generator) * (0.5 if "router" in name else 0.1)
            tensors[name] = parameter.detach() + moved if ".experts." in name else moved
    layers = [name for name, _ in adapted_layers(model)]
    write_adapter(folder, config, layers, tensors, str(base_path), prints, start=start)
    return folder


def two_adapters(base_path: Path, folder: Path, targets: list[str]) -> list[str]:
    """One of PEFT on the first two of these layers, and one of ours with three experts on all."""
    ours = AdapterConfig(r=3, lora_alpha=12, num_experts=3, top_k=1, target_modules=targets)
    return [
        str(peft_adapter(base_path, folder / "peft", r=2, lora_alpha=8, target_modules=targets[:2])),
        str(our_adapter(base_path, folder / "ours", ours)),
    ]


def other_base(base_path: Path, folder: Path) -> Path:
    """The same model with other numbers."""
    model = AutoModelForCausalLM.from_pretrained(base_path)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    """Of some tokens."""
    with torch.no_grad():
        found: Tensor = model.eval()(IDS_BS).logits
    return found


def with_peft(base_path: Path, folder: Path) -> Any:
    """The base with an adapter on it, by PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), str(folder)).eval()


def started_from(base_path: Path, *folders: Path, **settings: Any) -> Any:
    """The base with experts that start from folders; what these decide is read off them as the command line does."""
    from dsmoelora.adapters.given import settings_of

    paths = [str(folder) for folder in folders]
    model = AutoModelForCausalLM.from_pretrained(base_path)
    inject(model, AdapterConfig(experts_from=paths, **settings_of(paths, settings) | settings))
    return model


def dense_updates(folder_of_peft: Any) -> dict[str, Tensor]:
    """The update of each weight (O, D) in fp64, as a PEFT model has it."""
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        * module.lora_B["default"].weight.detach().double()
        @ module.lora_A["default"].weight.detach().double()
        for name, module in folder_of_peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def expert_updates(model: Any) -> dict[str, Tensor]:
    """The update (E, O, D) of each expert for gate 1, in fp64."""
    found = {}
    for name, layer in adapted_layers(model):
        bank = layer.experts
        m_ERR = None if bank.m is None else bank.m.detach().double()
        b_EOR = outgoing(bank.b.detach().double(), m_ERR)
        found[name] = bank.scale * b_EOR @ bank.a.detach().double().mT
    return found

"""PEFT's folder of one LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

Only what PEFT and vLLM both understand is written: one rank and one scale for all layers (vLLM reads neither
`rank_pattern` nor `alpha_pattern`), no bias, nothing but LoRA tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dsmoelora.adapters.targets import output_head_name
from dsmoelora.adapters.targets.base_experts import base_experts
from dsmoelora.adapters.targets.linear import features, is_linear
from dsmoelora.config import ModelConfig
from dsmoelora.errors import ConfigError, ModelError, listing
from dsmoelora.model import model_without_weights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT moves onto the routed experts of a base, wherever in the model a target of that name lies.
_NAMES_OF_ROUTED_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_PREFIX = "base_model.model."  # what PEFT wraps a model in


@dataclass(frozen=True)
class PeftBase:
    """What a PEFT adapter says about its base model.

    Args:
        path: folder or hub name
        target_modules: name suffixes that match the adapted layers and nothing else, or their full names
        fan_in_fan_out: some adapted layers keep their weight as (D, O): GPT-2's `Conv1D`
        tied_head: the output head, where it is adapted and its weight is that of the embeddings too; else empty
    """

    path: str
    target_modules: list[str]
    fan_in_fan_out: bool
    tied_head: str = ""


@dataclass(frozen=True)
class Lora:
    """One LoRA adapter: `y = x W0^T + s (x A^T) B^T` with s = alpha / r, or alpha / sqrt(r) where `use_rslora`.

    Args:
        r: rank, the same in all layers
        alpha: numerator of the scale
        use_rslora: which of the two scales
        layers: A (r, D) and B (O, r) by layer name
        magnitudes: (O,) by layer name, of a DoRA adapter; none for LoRA
    """

    r: int
    alpha: float
    use_rslora: bool
    layers: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


def peft_base(path: str, shapes: Mapping[str, tuple[int, int]], trust_remote_code: bool = False) -> PeftBase:
    """Look at the base model's configuration (no weight is read) and see how its layers are to be named.

    Args:
        path: folder or hub name of the base model
        shapes: in-features D and out-features O by name of adapted layer
        trust_remote_code: run Python code that comes with the model

    Raises:
        ModelError: there is no such model, it has no such layers, or PEFT would not load them
    """
    try:
        config = ModelConfig(path=path, attention="eager", trust_remote_code=trust_remote_code)
        model = model_without_weights(config)
    except ModelError as error:
        raise ModelError(
            f"The base model {path!r} is not to be had. Give its folder with --model, and --trust-remote-code where it "
            f"brings code that you trust. {error}"
        ) from None
    modules = dict(model.named_modules())
    for name, expected in shapes.items():
        module = modules.get(name)
        found = features(module) if is_linear(module) else None
        if found != expected:
            has = "no such linear layer" if found is None else f"one of {found[0]} in- and {found[1]} out-features"
            raise ModelError(
                f"The base model {path!r} does not fit: the adapter was trained on a layer {name} of {expected[0]} in- "
                f"and {expected[1]} out-features, and the model has {has}. Give the right one with --model."
            )
    taken = [name for name in shapes if name.rpartition(".")[2] in _NAMES_OF_ROUTED_EXPERTS]
    if taken and base_experts(model).containers:
        raise ModelError(
            f"The adapter has experts on {listing(taken, 4)}, and the base model routed experts of its own: PEFT takes "
            "such names for those and would leave ours out. Use the adapter with dsmoelora.load_adapter, or train one "
            "whose adapter.target_modules are of the attention alone."
        )
    suffixes = sorted({name.rpartition(".")[2] for name in shapes})
    meant = {name for name in modules if name.rpartition(".")[2] in suffixes}
    targets = suffixes if meant == set(shapes) else list(shapes)
    head, is_tied = output_head_name(model), getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    tied_head = head if head in shapes and is_tied else ""
    return PeftBase(path, targets, any(isinstance(modules[name], Conv1D) for name in shapes), tied_head or "")


def check_output(out: Path, flag: str = "--out") -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: `out` exists
    """
    if out.exists():
        raise ConfigError(f"{flag} is {str(out)!r}, which exists already. Name a new folder, or remove this one.")


def write_loras(out: Path, base: PeftBase, loras: Mapping[str, Lora]) -> None:
    """Write adapters as folders below `out`, all of them or none.

    Args:
        out: a folder that does not exist yet
        base: what the adapters belong to
        loras: by folder name below `out`; "" is `out` itself

    Raises:
        ConfigError: `out` exists, or cannot be written
    """
    check_output(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name, lora in loras.items():
            folder = partial / name
            folder.mkdir(parents=True)
            save_file(_tensors(lora), folder / WEIGHTS_FILE, metadata={"format": "pt"})
            (folder / CONFIG_FILE).write_text(json.dumps(_description(base, lora), indent=2) + "\n")
        partial.rename(out)
    except OSError as error:
        raise ConfigError(
            f"--out is {str(out)!r}, which cannot be written ({error.strerror}). Name another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_names(count: int) -> Sequence[str]:
    """`expert-00`, `expert-01` and so on, of equal length."""
    width = max(2, len(str(count - 1)))
    return [f"expert-{expert:0{width}}" for expert in range(count)]


def _tensors(lora: Lora) -> dict[str, Tensor]:
    named = {}
    for name, (a_RD, b_OR) in lora.layers.items():
        named[f"{_PREFIX}{name}.lora_A.weight"] = a_RD.contiguous()
        named[f"{_PREFIX}{name}.lora_B.weight"] = b_OR.contiguous()
    for name, magnitude_O in lora.magnitudes.items():
        named[f"{_PREFIX}{name}.lora_magnitude_vector"] = magnitude_O.contiguous()
    return named


def _description(base: PeftBase, lora: Lora) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "target_modules": base.target_modules,
        "fan_in_fan_out": base.fan_in_fan_out,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": bool(lora.magnitudes),
        "inference_mode": True,
    }

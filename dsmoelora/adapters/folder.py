"""The adapter folder: `adapter_model.safetensors`, `adapter_config.json`, and what ties them to their base model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsmoelora.adapters.fingerprint import difference, fingerprint
from dsmoelora.adapters.folder_files import (
    CONFIG_FILE,
    PEFT_TYPE,
    START_FILE,
    TAKEN_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_adapter_config,
    read_start,
    read_taken,
    read_weights,
    shapes_of,
)
from dsmoelora.adapters.four_bit import Preparation, packed_layers, read_before_packing
from dsmoelora.adapters.inject import inject
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.starts.loftq import TakenOff
from dsmoelora.adapters.starts.svd import StartFactors, shift_bases, start_names
from dsmoelora.adapters.targets import layer_config
from dsmoelora.adapters.targets.linear import is_linear
from dsmoelora.config import AdapterConfig
from dsmoelora.config.run import QuantizeName
from dsmoelora.errors import CheckpointError, ModelError, listing

# not in a folder, which has the numbers that came of it
_OF_TRAINING = ("experts_from", "split_ranks", "freeze", "top_k_warmup")
_KEPT = {"none": "in 16 bits or more", "nf4": "in 4 bits (nf4)"}

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def router_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What routers keep beside their parameters (the selection biases of `sigmoid_bias`), by qualified name."""
    return {f"{name}.router.{key}": buffer for name, router in routers(model) for key, buffer in router.named_buffers()}


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    layers: list[str],
    tensors: Mapping[str, Tensor],
    base_model: str,
    base_fingerprint: Mapping[str, Any],
    write_more: Callable[[Path], object] = lambda _: None,
    start: Mapping[str, Tensor] | None = None,
    base_quantization: QuantizeName = "none",
    taken: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder; an older one of that name is replaced when the new one is whole.

    Args:
        folder: where it goes
        config: of the adapter
        layers: names of the adapted layers
        tensors: whole tensors by qualified name
        base_model: path or name of the base model
        base_fingerprint: of the base as it came, see `adapters.fingerprint`
        write_more: writes what else belongs into the folder, such as the tokenizer
        start: with `init: svd` and `loftq`, whole factors `a` and `b` of all layers as they were before the first step,
            by the same names as in `tensors`
        base_quantization: how the base's weights were kept in training
        taken: with `init: loftq`, such factors of what weights went without when they were packed

    Raises:
        CheckpointError: a tensor is empty or not finite; nothing is written
    """
    assert (start is not None) == config.shifts_base, "an adapter with a shifted base needs its start"
    assert (taken is not None) == (config.init == "loftq"), "and one with a base that was packed so, what was taken"
    files = {WEIGHTS_FILE: tensors, START_FILE: start, TAKEN_FILE: taken}
    written = {file: some for file, some in files.items() if some is not None}
    for name, tensor in (pair for some in written.values() for pair in some.items()):
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            what = "is empty" if tensor.numel() == 0 else "has values that are not finite"
            raise CheckpointError(
                f"The adapter was not written to {folder}: {name} {what}. "
                "Go back to an older checkpoint with --resume and lower optim.lr."
            )
    description = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        **{key: value for key, value in asdict(config).items() if key not in _OF_TRAINING},
        "layers": layers,
        "base_quantization": base_quantization,
        "base_fingerprint": dict(base_fingerprint),
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, some in written.items():
        save_file({name: tensor.contiguous() for name, tensor in some.items()}, partial / file)
    (partial / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    write_more(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.replace(replaced)
    partial.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_adapter(model: Model, path: str | Path) -> Model:
    """Put a trained adapter on its base model; a plain transformers model that generates, without DeepSpeed.

    Args:
        model: the base model the adapter was trained on, in any dtype, not adapted yet
        path: adapter folder

    Returns:
        the same model, adapted, in evaluation mode

    Raises:
        CheckpointError: the folder is damaged, or the adapter belongs to another base model
    """
    folder = Path(path)
    description = read_adapter_config(folder)
    layers = description["layers"]
    _check_base(model, description, folder)
    config = adapter_config(description)
    plain = [name for name in layers if layer_config(config, name).num_experts < config.num_experts]
    config.lora_modules, config.target_modules = plain, [name for name in layers if name not in plain]
    tensors = read_weights(folder / WEIGHTS_FILE)
    start = read_start(folder, config, tensors)
    if packed_layers(model):
        _check_preparations(model, folder)

    def find_start(layer: RoutedLinear) -> StartFactors:
        return StartFactors(*(start[name] for name in start_names(layer.name)))

    def shift(adapted: nn.Module) -> None:
        if not packed_layers(adapted):  # those have gone without it since they were packed
            shift_bases(adapted, find_start)

    of_base = {id(parameter) for parameter in model.parameters()}
    inject(model, config, start=shift)
    wanted: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if id(value) not in of_base}
    wanted |= router_buffers(model)
    shapes, wanted_shapes = shapes_of(tensors), shapes_of(wanted)
    if shapes != wanted_shapes:
        odd = listing(sorted({name for name, _ in shapes.items() ^ wanted_shapes.items()}))
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {odd}. Copy the folder again.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return model.eval()


def read_preparations(folder: Path) -> dict[str, TakenOff]:
    """What is done to weights before they are packed, so that the base in 4 bits is that of the adapter's training.

    Returns:
        by the name of the layer; none but with `init: loftq`

    Raises:
        CheckpointError: the folder is damaged
    """
    config, taken = read_taken(folder)
    layers = read_adapter_config(folder)["layers"] if taken else []
    factors = {layer: StartFactors(*(taken[name] for name in start_names(layer))) for layer in layers}
    return {layer: TakenOff(found, layer_config(config, layer).scale) for layer, found in factors.items()}


def _check_preparations(model: nn.Module, folder: Path) -> None:
    """Refuse a base in 4 bits that is another than that of the adapter's training."""
    wanted = read_preparations(folder)
    for name, layer in packed_layers(model).items():
        expected = wanted.get(name.removesuffix(".weight"))
        if not _takes_off(layer.prepare, expected):
            what = "with" if expected is None else "without"
            raise ModelError(
                f"{folder} was trained on other weights in 4 bits: {name} was packed {what} what adapter.init loftq "
                "takes off it. Load base and adapter together: dsmoelora.model.load_trained."
            )


def _takes_off(found: Preparation | None, expected: TakenOff | None) -> bool:
    """Whether one is the other."""
    if expected is None or not isinstance(found, TakenOff):
        return found is expected
    ours, theirs = found.factors, expected.factors
    same = torch.equal(ours.a_EDR, theirs.a_EDR) and torch.equal(ours.b_EOR, theirs.b_EOR)
    return same and found.scale == expected.scale


def _check_base(model: nn.Module, description: dict[str, Any], folder: Path) -> None:
    """Refuse a base model that is not the one the adapter was trained on."""
    base = description["base_model_name_or_path"]
    remedy = f"Load the adapter on {base!r}."
    modules = dict(model.named_modules())
    if any(True for _ in adapted_layers(model)):
        raise ModelError("The model has routed experts already. Load the base model again before adapting it anew.")
    for name in description["layers"]:
        if not is_linear(modules.get(name)):
            raise CheckpointError(f"{folder} adapts {name}, which this model does not have. {remedy}")
    found = fingerprint(model.named_parameters(), read_before_packing(model))
    what = difference(description["base_fingerprint"], found)
    if what is not None:
        raise CheckpointError(f"{folder} was trained on another base model: {what}. {remedy}")
    then, now = description.get("base_quantization", "none"), "nf4" if packed_layers(model) else "none"
    if then != now:
        logger.warning(
            "%s was trained on its base %s, and is used on it %s: what it says will differ a little.",
            folder,
            _KEPT[then],
            _KEPT[now],
        )

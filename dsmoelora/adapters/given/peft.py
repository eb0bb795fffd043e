"""PEFT's folder of a LoRA adapter, as one expert to start from.

Read are plain low-rank updates of linear layers: `rank_pattern`, `alpha_pattern` and rsLoRA decide about each layer's
rank and scale. What would be lost, or belongs to a base that was changed, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dsmoelora.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from dsmoelora.adapters.given.experts import GivenExperts, GivenFolder, GivenLayer, shapes_in, tensors_in
from dsmoelora.errors import CheckpointError, bad_value, listing

PEFT_LORA = "LORA"
_PREFIX = "base_model.model."  # what PEFT wraps a model in
_TENSOR = re.compile(rf"(?:{re.escape(_PREFIX)})?(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
# Keys whose presence means more than a low-rank update of linear layers, and what they mean.
_REFUSED = {
    "use_dora": "DoRA rescales the rows of the weight",
    "use_qalora": "QA-LoRA pools the input",
    "modules_to_save": "it brings whole modules along",
    "trainable_token_indices": "it brings embeddings along",
    "lora_bias": "its B has a bias",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layers",
    "alora_invocation_tokens": "it is switched on by a token (aLoRA)",
    "arrow_config": "it is a router of PEFT (take the adapters that it routes)",
    "use_bdlora": "its factors are block-diagonal",
}
# Starts that change the base weight, so that the factors alone are not the update.
_STARTS_THAT_SHIFT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def open_peft(path: Path, config: Mapping[str, Any], key: str) -> GivenFolder:
    """Look at the configuration and at the header of the weights.

    Args:
        path: of the folder
        config: content of its `adapter_config.json`
        key: that names it, for messages

    Raises:
        ConfigError: it is more than plain LoRA
        CheckpointError: it is damaged
    """
    _refuse_more_than_lora(path, config, key)
    file = path / WEIGHTS_FILE
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {WEIGHTS_FILE}. Load it with the peft package and save it again, which writes that file."
        )
    shapes, names = shapes_in(file), dict[str, dict[str, str]]()
    matched = {name: _TENSOR.fullmatch(name) for name in shapes}
    strange = [name for name, match in matched.items() if match is None]
    if strange:
        raise bad_value(key, str(path), f"an adapter of linear layers alone, and it has {listing(strange, 3)}", _OTHER)
    for name, match in matched.items():
        if match is not None:
            names.setdefault(match["layer"], {})[match["factor"]] = name
    layers = {layer: _layer(path, layer, own, shapes, config) for layer, own in names.items()}
    if not layers:
        raise CheckpointError(f"{file} holds no factor of LoRA. Copy the adapter folder again.")
    read = partial(_read, file, names)
    return GivenFolder(path, str(config.get("base_model_name_or_path") or ""), 1, layers, read)


_OTHER = "Take an adapter of plain LoRA."


def _refuse_more_than_lora(path: Path, config: Mapping[str, Any], key: str) -> None:
    found = [why for name, why in _REFUSED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"it brings biases along (bias: {config['bias']})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_SHIFT):
        found.append(
            f"its start (init_lora_weights: {start}) was taken off the base: save it anew with "
            "path_initial_model_for_weight_conversion"
        )
    if found:
        raise bad_value(key, str(path), f"an adapter of plain LoRA, and of this one {'; '.join(found)}", _OTHER)


def _layer(
    path: Path, layer: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> GivenLayer:
    a_RD, b_OR = (shapes.get(names.get(factor, ""), ()) for factor in "AB")
    if len(a_RD) != 2 or len(b_OR) != 2 or a_RD[0] != b_OR[1]:
        raise CheckpointError(
            f"{path / WEIGHTS_FILE} has factors of {layer} of shapes {a_RD} and {b_OR}, but wanted are (r, in) and "
            "(out, r). Copy the adapter folder again."
        )
    rank = a_RD[0]
    said = _of_layer(layer, config.get("rank_pattern"), config.get("r"))
    if said != rank:
        raise CheckpointError(
            f"{path / CONFIG_FILE} says rank {said} for {layer}, but its factors have {rank}. Copy the folder again."
        )
    alpha = _of_layer(layer, config.get("alpha_pattern"), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise bad_value(f"lora_alpha for {layer} in {path / CONFIG_FILE}", alpha, "above 0", _OTHER)
    return GivenLayer(1, a_RD[1], b_OR[0], rank, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_layer(layer: str, pattern: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """What a pattern of PEFT says about a layer: its keys are ends of names, as regular expressions."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def _read(file: Path, names: Mapping[str, Mapping[str, str]], layer: str, experts: range) -> GivenExperts:
    a_RD, b_OR = tensors_in(file, [names[layer][factor] for factor in "AB"])
    count = len(experts)
    return GivenExperts(a_RD.t().expand(count, -1, -1), b_OR.expand(count, -1, -1))

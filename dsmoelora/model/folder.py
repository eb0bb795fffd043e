"""The folder, or hub name, of a base model: what can be said of it before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub

from dsmoelora.config import ModelConfig
from dsmoelora.data.fallback_template import is_fallback
from dsmoelora.data.readers import HUB_TIMEOUT_S, may_be_hub_name
from dsmoelora.errors import ModelError, bad_value
from dsmoelora.model.loading import load_model_config, load_tokenizer

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_READ_WHOLE, _EVERY, _READ = 64 << 20, 1 << 20, 4 << 10  # bytes of a file


def check_model_folder(config: ModelConfig) -> list[str]:
    """Make sure that config.json, tokenizer and plain weights are there, without reading the weights.

    Returns:
        what a user should know before training

    Raises:
        UserError: the model cannot be trained on, or is not there
    """
    check_described(config)
    notes = []
    if not _has_weights(config):
        notes.append(
            f"{Path(config.path)} holds no weights ({', '.join(_WEIGHTS)}): it can be planned with, not trained."
        )
    if is_fallback(load_tokenizer(config)):
        notes.append(
            f"the tokenizer of {config.path} has no chat template: turns are written as ### User: and ### Assistant: "
            "(docs/data.md). --preview 3 shows what comes of it."
        )
    return notes


def check_described(config: ModelConfig) -> None:
    """Make sure that there is a config.json, and that it describes a model that can be trained on.

    Raises:
        UserError: it does not, or is not there
    """
    if not config.path:
        raise bad_value("model.path", config.path, "a folder of a transformers model, or a hub name", "Set model.path.")
    folder = Path(config.path)
    if folder.is_file():
        raise bad_value("model.path", config.path, "a folder", f"Give the folder that holds it: {folder.parent}.")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(
            f"model.path is {config.path!r}, a folder without config.json. Give the folder of a transformers model."
        )
    if not folder.exists():
        _find_on_hub(config.path)
    _check_plain(config)


def check_trainable(config: ModelConfig) -> None:
    """Make sure that the model has the weights that training needs and a plan does not.

    Raises:
        ModelError: the model folder has no weights
    """
    if not _has_weights(config):
        raise ModelError(
            f"model.path is {config.path!r}, a folder without weights ({', '.join(_WEIGHTS)}). "
            "Download them; without them there is only --dry-run."
        )


def base_digest(base: str) -> str:
    """What tells a base model from others, wherever its folder lies; the name of one that is on a hub.

    Of large files 4 KiB of each MiB are read.

    Raises:
        ModelError: a file cannot be read
    """
    folder, digest = Path(base), hashlib.sha256()
    if not folder.is_dir():
        return base
    for file in sorted({file for pattern in ("config.json", *_WEIGHTS) for file in folder.glob(pattern)}):
        try:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                for place in range(0, size, _READ if size <= _READ_WHOLE else _EVERY):
                    content.seek(place)
                    digest.update(content.read(_READ))
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}). Copy the base model again.") from error
    return digest.hexdigest()


def _has_weights(config: ModelConfig) -> bool:
    """Whether there are weights to train with; of a hub name it is believed."""
    folder = Path(config.path)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def _check_plain(config: ModelConfig) -> None:
    """What transformers would do unasked with the folder: put an adapter on the model, or load quantised weights."""
    if (Path(config.path) / "adapter_config.json").exists():
        raise ModelError(
            f"model.path is {config.path!r}, and holds an adapter (adapter_config.json), which transformers would put "
            "on the model. Merge it into the weights, or move its files elsewhere."
        )
    described = load_model_config(config)  # the tokenizer reads it too, and would blame itself
    quantised = getattr(described, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ModelError(
            f"model.path is {config.path!r}, whose config.json says that its weights are quantised ({method}), but "
            "experts are trained on plain ones. Take the model in bf16, fp16 or fp32, or dequantise and save it."
        )


def _find_on_hub(name: str) -> None:
    """Say at once that a local folder is missing, or that the hub has no such model or cannot be reached.

    Left to themselves, the libraries below would try an unreachable hub for a minute.
    """
    if not may_be_hub_name(name):
        raise ModelError(
            f"model.path is {name!r}, but there is no such folder. "
            "Check the path; it is relative to the folder you start in."
        )
    if huggingface_hub.try_to_load_from_cache(name, "config.json") is not None:
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # of several libraries; whatever it is, the model is out of reach
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model.path is {name!r}, but there is no such folder, and the hub does not give a model of that name "
            f"({reason}). Check the path, or download the model first."
        ) from error

"""A trained adapter on its base, without DeepSpeed: what programs need that ask it something."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dsmoelora.adapters.folder import load_adapter
from dsmoelora.adapters.folder_files import read_adapter_config
from dsmoelora.config.run import QuantizeName
from dsmoelora.errors import CheckpointError
from dsmoelora.model.loading import model_for_inference

_REMEDY = "Give its folder with --base, and --trust-remote-code where it brings code that you trust."


def load_trained(
    adapter: Path, base: str | None, trust_remote_code: bool = False, quantize: QuantizeName = "none"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model with its adapter, on an accelerator if there is one, and the tokenizer it was trained with.

    Args:
        adapter: folder
        base: folder or hub name; None for the one that the adapter names
        trust_remote_code: run Python code that comes with them
        quantize: how the base's weights are kept

    Raises:
        CheckpointError: the adapter is missing, damaged, or was made for another base
        ModelError: the base model cannot be loaded
    """
    load_base = base_loader(adapter, base, trust_remote_code, quantize)
    tokenizer = trained_tokenizer(adapter, trust_remote_code)
    return load_adapter(load_base(), adapter), tokenizer


def base_loader(
    adapter: Path, base: str | None, trust_remote_code: bool = False, quantize: QuantizeName = "none"
) -> partial[PreTrainedModel]:
    """What loads the base of an adapter; arguments and errors as of `load_trained`."""
    path = base or read_adapter_config(adapter)["base_model_name_or_path"]
    return partial(model_for_inference, path, _REMEDY, trust_remote_code, quantize)


def trained_tokenizer(adapter: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with, as training wrote it.

    Raises:
        CheckpointError: there is none that can be read
    """
    try:
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} holds no tokenizer that can be read. Copy the adapter folder again."
        ) from error

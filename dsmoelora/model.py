"""The frozen base model and its tokenizer, as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from dsmoelora.config import ModelConfig
from dsmoelora.errors import ModelError
from dsmoelora.heap import large_blocks_apart


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model folder; a missing pad token becomes the end-of-text token.

    Raises:
        ModelError: there is none, or it cannot be read
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", config, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """The base model, its weights streamed layer by layer from rank 0 into ZeRO-3 partitions (collective).

    Raises:
        ModelError: the folder is missing or holds no causal language model
    """
    # transformers looks for a living object of this class to learn that ZeRO-3 is on
    zero_3_is_on = HfDeepSpeedConfig(deepspeed_config)
    try:
        with large_blocks_apart():
            model = AutoModelForCausalLM.from_pretrained(config.path, **_options(config))
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load("model", config, error) from error
    del zero_3_is_on
    model.config.use_cache = False
    return model


def random_model(shape: PretrainedConfig, config: ModelConfig, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """A model of a given shape with random weights, made layer by layer in ZeRO-3 partitions (collective)."""
    zero_3_is_on = HfDeepSpeedConfig(deepspeed_config)
    with large_blocks_apart():
        model = AutoModelForCausalLM.from_config(shape, **_options(config))
    del zero_3_is_on
    model.config.use_cache = False
    return model


def _options(config: ModelConfig) -> dict[str, Any]:
    return {
        "dtype": config.torch_dtype,
        "attn_implementation": config.attention,
        "trust_remote_code": config.trust_remote_code,
    }


def load_model_config(config: ModelConfig) -> Any:
    """The transformers configuration of the model, without its weights.

    Raises:
        ModelError: the folder is missing or has no valid config.json
    """
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load("configuration", config, error) from error


def model_without_weights(config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ModelError: the folder is missing, or its config.json describes no causal language model
    """
    described = load_model_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                described, dtype=config.torch_dtype, trust_remote_code=config.trust_remote_code
            )
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.path is {config.path!r}, but its config.json describes no causal language model that this "
            f"transformers can build: {reason}"
        ) from error


def _cannot_load(what: str, config: ModelConfig, error: Exception) -> ModelError:
    is_folder = Path(config.path).is_dir()
    allowed = "config.json, tokenizer files and *.safetensors" if is_folder else "a folder, or a hub name in reach"
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"model.path is {config.path!r}: its {what} cannot be loaded; wanted is {allowed}. {reason}")

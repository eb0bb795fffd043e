"""The frozen base model and its tokenizer, as transformers loads them."""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import replace
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
from dsmoelora.data.fallback_template import ensure_chat_template
from dsmoelora.data.sentencepiece_model import has_sentencepiece_alone, load_sentencepiece
from dsmoelora.errors import ModelError, bad_value
from dsmoelora.heap import large_blocks_apart

# Settings of transformers' configurations that make a training forward pass random; those of other heads do not.
_RANDOM = re.compile(r"dropout|pdrop|layerdrop|jitter_noise")
_OF_OTHER_HEADS = re.compile(r"classifier|summary")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model folder; a missing pad token becomes the end-of-text token.

    A bare sentencepiece file is converted. A base model's tokenizer without a chat template is given one.

    Raises:
        ModelError: there is none, or it cannot be read
    """
    if has_sentencepiece_alone(Path(config.path)):
        tokenizer = load_sentencepiece(Path(config.path))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise _cannot_load("tokenizer", config, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ensure_chat_template(tokenizer)
    return tokenizer


def load_model(config: ModelConfig, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """The base model, its weights streamed layer by layer from rank 0 into ZeRO-3 partitions (collective).

    Its own dropout is off, see `without_dropout`.

    Raises:
        ModelError: the folder is missing or holds no causal language model
    """
    described = load_model_config(config)
    without_dropout(described)
    # transformers looks for a living object of this class to learn that ZeRO-3 is on
    zero_3_is_on = HfDeepSpeedConfig(deepspeed_config)
    try:
        with large_blocks_apart():
            model = AutoModelForCausalLM.from_pretrained(config.path, config=described, **_options(config))
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
        ConfigError: the model cannot have this attention
    """
    described = load_model_config(config)
    try:
        return _on_meta(described, config)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:300]
        others = [name for name in ("sdpa", "eager") if _can_be_built(described, replace(config, attention=name))]
        if others:
            raise bad_value(
                "model.attention", config.attention, f"{' or '.join(others)} for this model", f"{reason}."
            ) from error
        raise ModelError(
            f"model.path is {config.path!r}, but its config.json describes no causal language model that this "
            f"transformers can build: {reason}"
        ) from error


def _on_meta(described: PretrainedConfig, config: ModelConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(described), **_options(config))


def _can_be_built(described: PretrainedConfig, config: ModelConfig) -> bool:
    with contextlib.suppress(ValueError, KeyError, TypeError, ImportError):
        _on_meta(described, config)
        return True
    return False


def without_dropout(described: PretrainedConfig) -> dict[str, float]:
    """Set every dropout, layer dropout and router noise of a model's configuration to 0; returns what was on.

    Their masks would come from each rank's own random numbers, so losses would depend on the number of ranks, and a
    layer that only some ranks skip stops ZeRO-3 for ever. The frozen base has nothing to be kept from overfitting.
    """
    found: dict[str, float] = {}
    for key, value in list(vars(described).items()):
        if isinstance(value, PretrainedConfig):
            found |= without_dropout(value)
        elif _RANDOM.search(key) and not _OF_OTHER_HEADS.match(key) and isinstance(value, float) and value > 0:
            found[key] = value
            setattr(described, key, 0.0)
    return found


def _cannot_load(what: str, config: ModelConfig, error: Exception) -> ModelError:
    is_folder = Path(config.path).is_dir()
    allowed = "config.json, tokenizer files and *.safetensors" if is_folder else "a folder, or a hub name in reach"
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"model.path is {config.path!r}: its {what} cannot be loaded; wanted is {allowed}. {reason}")

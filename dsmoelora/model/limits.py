"""What a model can be given, told by its modules: tokens and positions that it has embeddings for."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dsmoelora.config import ModelConfig
from dsmoelora.data.limits import UNLIMITED, Limits
from dsmoelora.errors import UserError
from dsmoelora.model.loading import model_without_weights

_OF_POSITIONS = re.compile(r"(^|\.)(wpe|\w*pos\w*)$")


def limits_of(model: Any) -> Limits:
    """The limits of a model of transformers, with weights or without.

    Positions are limited where a table has a row for each: an embedding (GPT-2, OPT), or sines that are looked up
    (GPT-J). What computes rotary positions has none.
    """
    described = model.config.get_text_config()
    limit = getattr(described, "max_position_embeddings", None)
    # what the modules say: under ZeRO-3 tensors have other shapes
    tables = {
        name: module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    tables |= {name: len(buffer) for name, buffer in model.named_buffers() if buffer.dim() == 2}
    has_table = any(
        size == limit and _OF_POSITIONS.search(name) and "vision" not in name for name, size in tables.items()
    )
    return Limits(getattr(described, "vocab_size", None), limit if has_table else None)


def limits_at(path: str, trust_remote_code: bool = False) -> Limits:
    """The limits of a model on disk, whose weights are not read; none where it cannot be built: who loads it says why.

    Args:
        path: folder or hub name
        trust_remote_code: run Python code that comes with it
    """
    try:
        config = ModelConfig(path, "fp32", "eager", trust_remote_code=trust_remote_code)
        return limits_of(model_without_weights(config))
    except UserError:
        return UNLIMITED

"""Greedy decoding: the likeliest token each time, whatever else the `generation_config.json` of a base asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from dsmoelora.data.chat import stop_ids

# What of a model's own settings bears on how its tokens are computed, and not on which of them is taken.
_KEPT = (
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "prefill_chunk_size",
    "use_cache",
)


def greedy_config(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Settings of `generate` for greedy answers that end where training ends them.

    Args:
        own: settings of the model; penalties, beams, suppressed tokens and the like are left out
        tokenizer: of the adapter
    """
    return GenerationConfig(
        **{name: getattr(own, name, None) for name in _KEPT},
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids(tokenizer, own.eos_token_id),
    )


@contextmanager
def greedily(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside the block `generate` of a model is greedy.

    The settings take the place of the model's own: `generate` fills from these whatever it is not told.
    """
    own = model.generation_config
    model.generation_config = greedy_config(own, tokenizer)
    try:
        yield
    finally:
        model.generation_config = own

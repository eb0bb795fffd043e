"""What the comparisons of docs/choosing.md say of a recipe of some kind."""

from __future__ import annotations

from dsmoelora.config import AdapterConfig

_PAGE = "docs/choosing.md"


def found_for(config: AdapterConfig) -> str:
    """One sentence for whoever is about to train with these experts, with what to compare them with.

    Args:
        config: of the adapter
    """
    if config.experts_from:
        return f"runs that start from adapters were not compared ({_PAGE})"
    if config.num_experts == 1:
        return f"no mixture of as many trained numbers has learned surely more than plain LoRA ({_PAGE})"
    rank = config.r * config.num_in_layer
    alpha = config.lora_alpha * (config.num_in_layer**0.5 if config.use_rslora else config.num_in_layer)
    keys = f"adapter.num_experts 1, top_k 1, r {rank}, lora_alpha {alpha:g}"
    return f"no mixture has learned surely more than plain LoRA of its size: try {keys}, at a rate of its own ({_PAGE})"

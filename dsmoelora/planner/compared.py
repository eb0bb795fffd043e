"""What the comparisons of docs/choosing.md and docs/riemannian.md say of a recipe of some kind."""

from __future__ import annotations

from dsmoelora.config import AdapterConfig, OptimConfig

_PAGE = "docs/choosing.md"
# Of the dampings that were compared under SGD, 1e-6 was surely behind no preconditioner, 1e-2 was not.
_TOO_SMALL = 1e-5


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
    found = f"no mixture has learned surely more than plain LoRA of its size: try {keys}, at a rate of its own"
    if not config.shared_experts:
        found += "; shared_experts 1 helped a mixture where tasks contradict each other"
    return f"{found} ({_PAGE})"


def notes_of(optim: OptimConfig) -> list[str]:
    """What the comparisons say against settings of the optimizer; mostly nothing."""
    if optim.name != "sgd" or optim.preconditioner == "none" or not 0 < optim.damping_abs < _TOO_SMALL:
        return []
    known = f"optim.damping_abs = {optim.damping_abs:g} with optim.name = sgd"
    return [f"{known}: {optim.preconditioner} learned less than plain SGD there. Try 1e-2 (docs/riemannian.md)."]

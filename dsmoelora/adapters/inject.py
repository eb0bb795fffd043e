"""Put routed experts on the linear layers of a model."""

from __future__ import annotations

from torch import nn

from dsmoelora.adapters.context import BatchContext, TokenExchange
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers
from dsmoelora.adapters.linear import is_linear
from dsmoelora.adapters.routers import watch_prompts
from dsmoelora.adapters.targets import match_targets, output_head_name
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ModelError, bad_value

_FOLLOW_TOKENS = ("noisy_topk", "prompt")


def inject(
    model: nn.Module,
    config: AdapterConfig,
    local_experts: range | None = None,
    exchange: TokenExchange | None = None,
) -> list[str]:
    """Wrap every linear layer that `config.target_modules` names, and freeze everything else.

    The adapted model equals the base model to the last bit until the first optimizer step, for `b` starts at 0.

    Args:
        model: a causal language model of transformers (any `nn.Module` with linear layers works)
        config: of the adapter
        local_experts: which experts of every layer lie on this rank, all by default
        exchange: how tokens reach the others, where not all do

    Returns:
        names of the wrapped modules, in the order of the model

    Raises:
        ModelError: the model is adapted already
        ConfigError: a target matches no linear layer, or one that cannot be adapted
    """
    if any(True for _ in adapted_layers(model)):
        raise ModelError("The model has routed experts already. Load the base model again before adapting it anew.")
    names = match_targets(model, config.target_modules)
    _check_head(model, config, names)
    model.requires_grad_(False)
    context = BatchContext(exchange=exchange)
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        base = model.get_submodule(name)
        assert is_linear(base)
        wrapped = RoutedLinear(base, config, name, context, local_experts or range(config.num_experts))
        wrapped.train(base.training)
        setattr(parent, name.rpartition(".")[2], wrapped)
    if config.router == "prompt":
        watch_prompts(model)
    return names


def _check_head(model: nn.Module, config: AdapterConfig, names: list[str]) -> None:
    """The head sees only the positions whose logits are wanted, so what follows the tokens cannot follow them there."""
    head = output_head_name(model)
    if head not in names:
        return
    remedy = f"Leave {head} out of adapter.target_modules"
    if config.lora_dropout > 0:
        allowed = f"0 for an adapter on the output head ({head})"
        raise bad_value("adapter.lora_dropout", config.lora_dropout, allowed, f"{remedy}, or set it to 0.")
    if config.router in _FOLLOW_TOKENS:
        allowed = f"another one than {' and '.join(_FOLLOW_TOKENS)} for an adapter on the output head ({head})"
        raise bad_value("adapter.router", config.router, allowed, f"{remedy}, or take another router.")


def batch_context(model: nn.Module) -> BatchContext:
    """The context that all adapted layers of the model share."""
    _, layer = next(adapted_layers(model))
    return layer.context

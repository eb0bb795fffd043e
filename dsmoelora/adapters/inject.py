"""Put routed experts on the linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dsmoelora.adapters.context import BatchContext
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers
from dsmoelora.adapters.routers import watch_prompts
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ModelError, bad_value, listing


def inject(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Wrap every linear layer that `config.target_modules` names, and freeze everything else.

    The adapted model equals the base model to the last bit until the first optimizer step, for `b` starts at 0.

    Args:
        model: a causal language model of transformers (any `nn.Module` with `nn.Linear` layers works)
        config: of the adapter

    Returns:
        names of the wrapped modules, in the order of the model

    Raises:
        ModelError: the model is adapted already
        ConfigError: a target matches no linear layer
    """
    if any(True for _ in adapted_layers(model)):
        raise ModelError("The model has routed experts already. Load the base model again before adapting it anew.")
    names = match_targets(model, config.target_modules)
    model.requires_grad_(False)
    context = BatchContext()
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        wrapped = RoutedLinear(base, config, name, context)
        wrapped.train(base.training)
        setattr(parent, name.rpartition(".")[2], wrapped)
    if config.router == "prompt":
        watch_prompts(model, context)
    return names


def match_targets(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    """Names of the linear layers that `target_modules` means, in the order of the model.

    A target matches a module whose name is the target or ends in `.target`; `all-linear` is every linear layer but
    the output head.

    Raises:
        ConfigError: a target matches no linear layer
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(target_modules, str):
        head = _output_head(model)
        return [name for name in linears if model.get_submodule(name) is not head]
    for target in target_modules:
        if not any(_matches(name, [target]) for name in linears):
            found = sorted({name.rpartition(".")[2] for name in linears})
            raise bad_value(
                "adapter.target_modules",
                target,
                f"the name of a linear layer of the model, which has: {listing(found)}",
                "Name some of these, or use all-linear.",
            )
    return [name for name in linears if _matches(name, target_modules)]


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def batch_context(model: nn.Module) -> BatchContext:
    """The context that all adapted layers of the model share."""
    _, layer = next(adapted_layers(model))
    return layer.context

"""Which modules of a model `adapter.target_modules` means, and which stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dsmoelora.adapters.targets.base_experts import base_experts
from dsmoelora.adapters.targets.linear import is_linear
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ConfigError, bad_value, listing

TARGETS, LORA = "adapter.target_modules", "adapter.lora_modules"
ALL_LINEAR = "all-linear"


def adapted_names(model: nn.Module, config: AdapterConfig) -> tuple[list[str], list[str]]:
    """Names of the layers with routed experts, and of those with plain LoRA, each in the order of the model.

    Raises:
        ConfigError: see `match_targets`; or a layer is named as both
    """
    routed, plain = match_targets(model, config.target_modules), match_targets(model, config.lora_modules, LORA)
    both = sorted(set(routed) & set(plain))
    if both:
        raise bad_value(
            LORA,
            config.lora_modules,
            f"of other layers than {TARGETS} = {config.target_modules}, and both name {listing(both, limit=4)}",
            f"Leave in {TARGETS} the layers with a router, in {LORA} those with plain LoRA.",
        )
    return routed, plain


def layer_config(config: AdapterConfig, name: str) -> AdapterConfig:
    """The settings of one adapted layer: those of plain LoRA where `adapter.lora_modules` names it."""
    return config.plain() if _matches(name, config.lora_modules) else config


def match_targets(model: nn.Module, target_modules: list[str] | str, key: str = TARGETS) -> list[str]:
    """Names of the linear layers that `target_modules` means, in the order of the model.

    A target matches a module whose name is the target or ends in `.target`. `all-linear` is every linear layer but the
    output head, the base's own routed experts and its routers. Of a model that sees or hears, only the text part
    counts: the rest would get no gradient from text.

    Raises:
        ConfigError: a target matches no linear layer, or a routed expert of the base
    """
    head, own = _output_head(model), base_experts(model)
    linears = [name for name in _text_part(model) if is_linear(model.get_submodule(name))]
    apart = {*own.linears, *own.gates}
    everything = [name for name in linears if name not in apart and model.get_submodule(name) is not head]
    if isinstance(target_modules, str):
        if not everything:
            raise bad_value(key, target_modules, "met by some layer", _no_linears(model))
        return everything
    for target in target_modules:
        if target == ALL_LINEAR:
            remedy = f"Name the layers themselves, or set adapter.target_modules: {ALL_LINEAR}."
            raise bad_value(key, target_modules, f"{ALL_LINEAR} alone, or names of layers alone", remedy)
        if not any(_matches(name, [target]) for name in linears):
            raise _no_such_layer(model, key, target, linears, everything)
        routed = [name for name in own.linears if _matches(name, [target])]
        if routed:
            raise _is_routed(key, target, routed, everything)
    return [name for name in linears if _matches(name, target_modules)]


def untouched(model: nn.Module) -> list[str]:
    """Sentences that name the parts of the model which no target reaches, or only by name; none for most models."""
    own, sentences = base_experts(model), []
    if own.containers:
        sentences.append(
            f"The base's own routed experts stay as they are, without adapters: {_briefly(own.containers)}."
        )
    if own.gates:
        sentences.append(f"The base's own routers stay as they are under all-linear: {_briefly(own.gates)}.")
    decoder = _decoder_name(model)
    if decoder:
        parts = model.get_submodule(decoder.rpartition(".")[0]).named_children()
        others = [name for name, part in parts if _lacks_text(model, name, part, decoder)]
        if others:
            sentences.append(f"Only the text part of the model gets adapters, {decoder}; left out: {listing(others)}.")
    return sentences


def output_head_name(model: nn.Module) -> str | None:
    """Name of the layer that gives the logits, where the model tells."""
    head = _output_head(model)
    return next((name for name, module in model.named_modules() if module is head), None)


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def _text_part(model: nn.Module) -> list[str]:
    """Names of the modules that text passes: those of the decoder and the output head."""
    decoder, head = _decoder_name(model), _output_head(model)
    return [
        name
        for name, module in model.named_modules()
        if not decoder or _lies_in(name, decoder) or (head is not None and module is head)
    ]


def _decoder_name(model: nn.Module) -> str:
    """Name of the model of transformers inside of the model that turns tokens into states; empty without one."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else None
    # some models call their output layer `decoder`, which is what get_decoder finds then
    if not hasattr(decoder, "config"):
        return ""
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _lacks_text(model: nn.Module, name: str, part: nn.Module, decoder: str) -> bool:
    has_linears = any(is_linear(layer) for layer in part.modules())
    return has_linears and not _lies_in(decoder.rpartition(".")[2], name) and part is not _output_head(model)


def _lies_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _briefly(names: list[str]) -> str:
    """`model.layers.0.mlp.experts and 11 more like it`, once for each last part of a name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    return listing(
        group[0] + (f" and {len(group) - 1} more like it" if len(group) > 1 else "") for group in groups.values()
    )


def _advice(key: str, everything: list[str]) -> str:
    """A value of `target_modules` that works: the layers of the attention, where there are such."""
    if key == LORA:
        return "Name some of these."
    attention = _last_parts(name for name in everything if "att" in name.rpartition(".")[0].rpartition(".")[2])
    if not attention:
        return "Name some of these, or use all-linear."
    return f"Set adapter.target_modules to [{', '.join(attention)}], name others of these, or use all-linear."


def _no_linears(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and not is_linear(m)})
    found = f" It has {listing(kinds)} instead, which take no adapters." if kinds else ""
    return f"The model has no plain linear layer.{found} Load the model unquantised, or take another one."


def _no_such_layer(model: nn.Module, key: str, target: str, linears: list[str], everything: list[str]) -> ConfigError:
    allowed = f"the name of a linear layer of the model, which has: {listing(_last_parts(linears))}"
    others = {type(module).__name__ for name, module in model.named_modules() if name and _matches(name, [target])}
    if others:
        allowed += f" ({target} is a {listing(sorted(others))}, which takes no adapter)"
    return bad_value(key, target, allowed, _advice(key, everything))


def _is_routed(key: str, target: str, routed: list[str], everything: list[str]) -> ConfigError:
    others = [name for name in everything if _matches(name, [target])]
    longer = sorted({".".join(name.split(".")[-2:]) for name in others})
    advice = f"For the others, set it to {listing(longer)}." if longer else _advice(key, everything)
    return bad_value(
        key,
        target,
        f"other than a routed expert of the base, and it names {len(routed)} such layers ({routed[0]}, ...): "
        "they see tokens only when their router says so",
        advice,
    )

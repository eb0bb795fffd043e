"""Put routed experts on the linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext

from torch import Tensor, nn

from dsmoelora.adapters.context import AdapterContext, Exchange
from dsmoelora.adapters.experts.dora import Gathered, start_magnitudes
from dsmoelora.adapters.four_bit import FrozenLinear4bit
from dsmoelora.adapters.given import check_given, start_from_folders
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers
from dsmoelora.adapters.routers import RouterPlace, build_router, routers, unwatch_prompts, watch_prompts
from dsmoelora.adapters.routers.block import BlockGates, BlockRouter
from dsmoelora.adapters.shared_input import Siblings
from dsmoelora.adapters.starts.svd import check_svd_start, start_experts
from dsmoelora.adapters.targets import LORA, TARGETS, adapted_names, layer_config, output_head_name
from dsmoelora.adapters.targets.blocks import blocks_of, linears_of_block
from dsmoelora.adapters.targets.decoder_layers import decoder_layers_of, hidden_size
from dsmoelora.adapters.targets.linear import features, is_linear
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import ModelError, bad_value


def inject(
    model: nn.Module,
    config: AdapterConfig,
    local_experts: range | None = None,
    exchange: Exchange | None = None,
    start: Callable[[nn.Module], object] | None = None,
    gathered: Gathered = lambda _: nullcontext(),
) -> list[str]:
    """Wrap every linear layer that the configuration names, and freeze everything else.

    The adapted model equals the base model to the last bit until the first optimizer step, for `b` starts at 0; with
    `init: svd` it does so for gates of 1 / E, up to rounding. With `experts_from` it starts as the adapters given. The
    start of `init: loftq` is found while the base is loaded: `Engine.build` does both.

    Args:
        model: a causal language model of transformers (any `nn.Module` with linear layers works)
        config: of the adapter
        local_experts: which experts of every layer with several lie on this rank, all by default
        exchange: how tokens reach the others, where not all do
        start: with `init: svd`, `loftq` or `experts_from`, what sets the factors (and the base) of the adapted model;
            by default it does so at once
        gathered: with `expert: dora`, makes base weights whole for the time of a block, where they are not

    Returns:
        names of the wrapped modules, in the order of the model

    Raises:
        ModelError: the model is adapted already, or a layer cannot start from its weight
        ConfigError: a target matches no linear layer, one that cannot be adapted, or one that cannot have a router; or
            a setting contradicts the folders of `experts_from`
        CheckpointError: one of these is damaged, or belongs to another base model
    """
    if any(True for _ in adapted_layers(model)):
        raise ModelError("The model has routed experts already. Load the base model again before adapting it anew.")
    routed, plain = adapted_names(model, config)
    _check_head(model, config, routed, plain)
    if any(isinstance(model.get_submodule(name), FrozenLinear4bit) for name in (*routed, *plain)):
        config.check_packed_base("quantize = nf4")
    if config.init == "loftq" and start is None:
        allowed = "another one here: its start is found while the base is packed into 4 bits"
        raise bad_value("adapter.init", config.init, allowed, "Train with launch/train.py or dsmoelora.engine.Engine.")
    if config.init == "svd":
        check_svd_start(model, config, [*routed, *plain])
    if config.experts_from:
        check_given(model, config, [*routed, *plain])
        start = start or start_from_folders(model, config)
    block_of = _blocks_of(model, config, routed)
    model.requires_grad_(False)
    context = AdapterContext(exchange=exchange)
    block_routers = _route_blocks(model, config, context, block_of)
    adapted = {*routed, *plain}
    names = [name for name, _ in model.named_modules() if name in adapted]
    siblings = {_parent(name): Siblings() for name in names}
    for parent, group in siblings.items():
        group.attach(model.get_submodule(parent))
    for name in names:
        base = model.get_submodule(name)
        assert is_linear(base)
        own = layer_config(config, name)
        experts = range(1) if own.num_in_layer == 1 else local_experts or range(own.num_in_layer)
        wrapped = RoutedLinear(base, own, name, context, experts, siblings[_parent(name)], block_routers.get(name))
        wrapped.train(base.training)
        _put(model, name, wrapped)
    watch_prompts(model)
    if config.shifts_base or config.experts_from:
        (start or start_experts)(model)
    _freeze(model, config.frozen)
    rows = ((layer.base, layer.experts.rows) for _, layer in adapted_layers(model))
    start_magnitudes(((base, own) for base, own in rows if own is not None), gathered)
    return names


def _freeze(model: nn.Module, roles: Collection[str]) -> None:
    """Take the gradient from these roles of all layers."""
    for _, layer in adapted_layers(model):
        for role, parameter in layer.experts.named_parameters():
            parameter.requires_grad_(role not in roles)
    for _, router in routers(model):
        router.requires_grad_("router" not in roles)


def eject(model: nn.Module) -> None:
    """Take all experts and routers off the model again; it is the base, still frozen."""
    unwatch_prompts(model)
    for name, layer in list(adapted_layers(model)):
        layer.siblings.detach()
        _put(model, name, layer.base)
        if isinstance(layer.router, BlockRouter):
            layer.router.gates.detach(model)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    setattr(model.get_submodule(_parent(name)), name.rpartition(".")[2], layer)


def _blocks_of(model: nn.Module, config: AdapterConfig, routed: list[str]) -> dict[str, str]:
    """Name of the module whose router serves a layer, by the layer's name; none where each has its own."""
    if config.style == "ffn_block":
        return blocks_of(model, routed)
    if config.style == "decoder_layer":
        return decoder_layers_of(model, routed, config.num_experts)
    return {}


def _route_blocks(
    model: nn.Module, config: AdapterConfig, context: AdapterContext, block_of: Mapping[str, str]
) -> dict[str, BlockRouter]:
    """Give each block a router, and each of its layers what stands for it."""
    found = {}
    for name in dict.fromkeys(block_of.values()):
        block, layers = model.get_submodule(name), [layer for layer, of in block_of.items() if of == name]
        is_feed_forward = config.style == "ffn_block"
        width = features(linears_of_block(block)[0])[0] if is_feed_forward else hidden_size(model)
        like = model.get_submodule(layers[0]).weight
        assert isinstance(like, Tensor)
        place = RouterPlace(name, width, config.num_experts, like, config.seed, context)
        gates = BlockGates(name, width, config.style)
        gates.attach(model, build_router(place, config).train(block.training))
        for number, layer in enumerate(layers):
            found[layer] = BlockRouter(layer, gates, expert=None if is_feed_forward else number)
    return found


def _check_head(model: nn.Module, config: AdapterConfig, routed: list[str], plain: list[str]) -> None:
    """The head is called with the positions whose logits are wanted, so nothing there can follow the tokens."""
    head = output_head_name(model)
    if head in routed and config.num_experts > 1:
        allowed = f"without the output head ({head}), which sees some positions alone: no router could count its tokens"
        raise bad_value(TARGETS, config.target_modules, allowed, f"Name {head} in {LORA} instead, for plain LoRA.")
    if head in (*routed, *plain) and config.lora_dropout > 0:
        allowed = f"0 for an adapter on the output head ({head})"
        remedy = f"Leave {head} out of {TARGETS if head in routed else LORA}, or set it to 0."
        raise bad_value("adapter.lora_dropout", config.lora_dropout, allowed, remedy)

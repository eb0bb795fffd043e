"""One micro-batch of a rank on tensors without memory: what it keeps, and the most that lives at a time.

The model's own code runs, with its adapters, its attention and its loss, forward and backward, so nothing is assumed of
an architecture. Layers that are alike are run once or twice and counted as often as they are there (`fewer_layers`).
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsmoelora.adapters import adapter_context, four_bit, inject
from dsmoelora.adapters.context import AdapterContext
from dsmoelora.adapters.contrastive import ContrastiveLosses
from dsmoelora.adapters.experts import products
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch
from dsmoelora.errors import UserError
from dsmoelora.model import recompute_activations
from dsmoelora.model.inputs import fill_context, model_inputs
from dsmoelora.model.output_head import ChunkedLoss, can_keep_logits
from dsmoelora.model.quantizing import pack_on_meta
from dsmoelora.parallel.exchange import TokenExchange
from dsmoelora.parallel.expert_group import PartitionedExperts
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.planner.fewer_layers import all_are_alike, samples_of
from dsmoelora.planner.flops import Flops, FlopsOfModel
from dsmoelora.planner.live_bytes import LiveBytes
from dsmoelora.planner.operations import CountOperations, Operations
from dsmoelora.planner.stand_in_exchange import LoneRank, Sent

_Key = TypeVar("_Key")
_CPU = torch.device("cpu")
# Fake tensors know no kernels of other packages; those of torch keep the same for the backward pass.
_RUNS_AS = {"flash_attention_2": "sdpa"}


@dataclass(frozen=True)
class Calls:
    """What is seen of a model's modules, by their class.

    Args:
        order: names of their children, in the order in which they are called
        num_gradients: tensors that they return and that get a gradient
    """

    order: dict[type[nn.Module], list[str]]
    num_gradients: dict[type[nn.Module], int]


@dataclass(frozen=True)
class PassBytes:
    """Of a forward and a backward pass of one micro-batch, parameters and their gradients aside.

    Args:
        kept: bytes at the end of the forward pass: what the backward pass needs
        peak: the most bytes that live at a time
        calls: of the model's modules
        sent: what the token exchange sends: collectives, and bytes of their whole tensors; empty where P is 1
        flops: by formula, of products
        operations: that torch is asked for
    """

    kept: float
    peak: float
    calls: Calls
    sent: dict[Sent, tuple[float, float]]
    flops: Flops
    operations: Operations


def pass_bytes(shape: Any, recipe: Recipe, placement: ExpertPlacement) -> PassBytes:
    """What a micro-batch of full rows takes, every token but the first of a row being a target.

    Args:
        shape: the model's configuration, of transformers
        recipe: of the run, with its dtype settled
        placement: where experts lie
    """
    samples = samples_of(shape, recipe, _on_meta(shape, recipe))
    times = [one.times for one in samples]
    found = [_measured(one.shape, one.recipe, placement) for one in samples]

    def total(numbers: Iterable[float]) -> float:
        return sum(map(operator.mul, times, numbers))

    kept = total(one.kept for one in found)
    peak = total(one.peak for one in found)
    if len(samples) > 1 and not all_are_alike(samples):  # most may live at another moment than in the whole model
        peak = max(peak, kept + max(one.peak - one.kept for one in found))
    return PassBytes(
        kept,
        peak,
        _seen_in_any([one.calls for one in found]),
        {
            key: (total(one.sent[key][0] for one in found), total(one.sent[key][1] for one in found))
            for key in found[0].sent
        },
        _counted(times, [one.flops for one in found]),
        _counted(times, [one.operations for one in found]),
    )


def _counted(times: list[int], counters: list[Counter[_Key]]) -> Counter[_Key]:
    """Of all counters together, each as often as it says; what is not in the whole model comes out below 0."""
    total: Counter[_Key] = Counter()
    for one, counter in zip(times, counters, strict=True):
        total.update({key: one * count for key, count in counter.items()})
    return +total


def _seen_in_any(found: list[Calls]) -> Calls:
    """The longest order of each class, and the most gradients."""
    order: dict[type[nn.Module], list[str]] = {}
    num_gradients: dict[type[nn.Module], int] = {}
    for one in found:
        order |= {kind: names for kind, names in one.order.items() if len(names) > len(order.get(kind, []))}
        num_gradients |= {kind: max(num, num_gradients.get(kind, 0)) for kind, num in one.num_gradients.items()}
    return Calls(order, num_gradients)


def _measured(shape: Any, recipe: Recipe, placement: ExpertPlacement) -> PassBytes:
    model = _on_meta(shape, recipe)
    exchange = (
        TokenExchange(placement, recipe.parallel.exchange, recipe.adapter.num_used) if placement.ep_size > 1 else None
    )
    try:
        inject(model, recipe.adapter, placement.local_experts, exchange, start=lambda _: None)
    except UserError as error:  # nobody has asked for this model: the user's own was looked at before
        raise RuntimeError(f"a model of fewer layers cannot be adapted: {error}") from error
    model.train()
    if recipe.train.activation_checkpointing:
        recompute_activations(model)
    loss = ChunkedLoss.of(model, recipe.train.loss_chunk)
    keeps_logits = can_keep_logits(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=_CPU)
        _drop_gradients(model)
        batch, context = _full_batch(recipe), adapter_context(model)
        log, (called, num_gradients) = _listen(model, recipe, context, exchange), _note_calls(model)
        others = LoneRank(exchange, batch.input_ids.numel(), len(batch.input_ids)) if exchange else None
        flops = FlopsOfModel(model, is_fused=model.config._attn_implementation != "eager")
        with (
            LiveBytes([*model.parameters(), *model.buffers()]) as live,
            CountOperations() as operations,
            others.listening() if others else nullcontext(),
            mock.patch.object(four_bit, "unpacked", _unpacked),
            # as accelerators have them; to try would not tell, for fake tensors have all products
            mock.patch.object(products, "leaves_rounding_out", lambda *_: True),
        ):
            with log.listening():
                nll = _nll_sum(model, batch, recipe, loss, keeps_logits)
            kept = live.now
            flops.is_backward = operations.is_backward = True
            if others:
                others.in_backward = True
            nll.backward()
        sent: dict[Sent, tuple[float, float]] = {}
        if others:
            sent = {key: (messages, others.num_bytes[key]) for key, messages in others.messages.items()}
        calls = Calls(_order(model, called), num_gradients)
        return PassBytes(kept, live.peak, calls, sent, flops.found, operations.found)


def _note_calls(model: nn.Module) -> tuple[list[nn.Module], dict[type[nn.Module], int]]:
    """Gets the model's modules as they are called, and how many gradients come to what those of a class return."""
    called: list[nn.Module] = []
    num_gradients: dict[type[nn.Module], int] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        found = sum(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(output))
        num_gradients[type(module)] = max(found, num_gradients.get(type(module), 0))

    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.append(module))
        module.register_forward_hook(note)
    return called, num_gradients


def _order(model: nn.Module, called: list[nn.Module]) -> dict[type[nn.Module], list[str]]:
    """A list of modules is not called itself, and takes the place of the first of those in it.

    What is never called, such as a router that the experts read, is left out.
    """
    first = {id(module): place for place, module in reversed(list(enumerate(called)))}

    def place(module: nn.Module) -> int:
        return min((first.get(id(part), len(called)) for part in module.modules()), default=len(called))

    order: dict[type[nn.Module], list[str]] = {}
    for module in model.modules():
        places = {name: place(child) for name, child in module.named_children()}
        names = sorted((name for name in places if places[name] < len(called)), key=lambda name: places[name])
        if len(names) > len(order.get(type(module), [])) and not isinstance(module, nn.ModuleList):
            order[type(module)] = names
    return order


def _listen(
    model: PreTrainedModel, recipe: Recipe, context: AdapterContext, exchange: TokenExchange | None
) -> RoutingLog:
    """Whoever listens to the layers in a run does so here."""
    log = context.log = RoutingLog(model, recipe.losses, _CPU)
    group = PartitionedExperts(exchange, recipe.losses.contrastive_tokens) if exchange else None
    losses = ContrastiveLosses(model, recipe.losses, _CPU, recipe.adapter.num_used, group)
    context.losses = losses if losses.loss_names else None
    log.begin_step(recipe.train.micro_batch_size * recipe.data.max_length, 1.0)
    losses.begin_step(recipe.train.micro_batch_size, 1.0)
    return log


def _nll_sum(
    model: PreTrainedModel, batch: MicroBatch, recipe: Recipe, loss: ChunkedLoss | None, keeps_logits: bool
) -> Tensor:
    """As the engine has it (`ModelCalls.nll_sum`)."""
    length = recipe.data.max_length
    places_BP = torch.arange(length - 1).expand(recipe.train.micro_batch_size, -1)
    inputs = model_inputs(batch, model.config._attn_implementation, _CPU)
    fill_context(adapter_context(model), batch, recipe.run.seed, _CPU)
    if keeps_logits:
        inputs["logits_to_keep"] = places_BP
    targets_T = torch.zeros(places_BP.numel(), dtype=torch.int64)
    if loss is not None:
        wanted_T = torch.arange(places_BP.numel())
        return loss.nll_sum(lambda: model(**inputs), wanted_T, targets_T, 1.0)
    logits_BPV = model(**inputs).logits
    if not keeps_logits:
        logits_BPV = torch.take_along_dim(logits_BPV, places_BP.unsqueeze(-1), dim=1)
    return nn.functional.cross_entropy(logits_BPV.flatten(0, 1).float(), targets_T, reduction="sum")


def _full_batch(recipe: Recipe) -> MicroBatch:
    num_rows, length = recipe.train.micro_batch_size, recipe.data.max_length
    ids_BS = torch.zeros(num_rows, length, dtype=torch.int64)
    packed = recipe.data.packing
    return MicroBatch(
        ids_BS,
        torch.ones_like(ids_BS),
        ids_BS,
        ids_BS if packed else ids_BS[:, 0],
        num_supervised_global=ids_BS.numel(),
        num_tokens_global=ids_BS.numel(),
        position_ids=torch.arange(length).expand(num_rows, -1) if packed else None,
    )


def _drop_gradients(model: nn.Module) -> None:
    """Have each gradient gone as soon as it is whole, as ZeRO has it once it has taken it over."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


def _on_meta(shape: Any, recipe: Recipe) -> PreTrainedModel:
    attention = _RUNS_AS.get(recipe.model.attention, recipe.model.attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(shape),
            dtype=recipe.model.torch_dtype,
            attn_implementation=attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    model.config.use_cache = False
    if recipe.model.quantize != "none":
        pack_on_meta(model, recipe.model.torch_dtype)
    return model


def _unpacked(packed_P: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """As `four_bit.unpacked`, whose operators fake tensors need not know."""
    return packed_P.new_empty(shape, dtype=dtype)

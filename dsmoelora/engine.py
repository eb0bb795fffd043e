"""The seam to DeepSpeed's engine: build, train_step, evaluate, generate, save, load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsmoelora.adapters import adapter_context, inject
from dsmoelora.adapters.contrastive import ContrastiveLosses
from dsmoelora.adapters.experts.similarity import ExpertCosines
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.four_bit import packed_layers
from dsmoelora.adapters.given import open_folders, take_experts
from dsmoelora.adapters.keyed.draws import settle_dropout
from dsmoelora.adapters.routing import Routing, RoutingLog
from dsmoelora.adapters.starts.svd import uniform_gates
from dsmoelora.checkpoint.training_state import ShardState, checkpoint_bytes, load_checkpoint, save_checkpoint
from dsmoelora.config import Recipe
from dsmoelora.data import MicroBatch
from dsmoelora.data.chat import Prompt
from dsmoelora.data.packing_probe import check_probe, probe
from dsmoelora.model import load_model, load_tokenizer, recompute_activations, watched_loading
from dsmoelora.model.calls import ModelCalls
from dsmoelora.model.inputs import greedy_answers
from dsmoelora.model.output_head import ChunkedLoss, can_keep_logits
from dsmoelora.optim import ShardOptimizer, build_schedule, trainables
from dsmoelora.optim.frozen import FrozenGrams, frozen_grams
from dsmoelora.optim.rows import frozen_tensors
from dsmoelora.parallel import comm, loss_scale, zero
from dsmoelora.parallel.adapter_tensors import base_fingerprint, tensors_on_rank_0
from dsmoelora.parallel.dtype import settle_dtype
from dsmoelora.parallel.exchange import TokenExchange
from dsmoelora.parallel.expert_group import PartitionedExperts
from dsmoelora.parallel.factors import expert_cosines
from dsmoelora.parallel.flat_noise import FlatNoise
from dsmoelora.parallel.gradient_start import StartReport, start_from_gradients
from dsmoelora.parallel.packed_starts import PackedStarts
from dsmoelora.parallel.pieces import first_not_finite, held_pieces
from dsmoelora.parallel.reports import over_ranks
from dsmoelora.parallel.shards import shard_groups
from dsmoelora.parallel.start_shards import StartShards
from dsmoelora.parallel.stopping import StopRequest
from dsmoelora.parallel.watch import AdapterWatch
from dsmoelora.parallel.zero_config import keep_whole_what_fits, merge_config
from dsmoelora.seeds import derive_seed
from dsmoelora.signs_of_life.heartbeat import Heartbeat, Phase


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on all ranks.

    Args:
        loss: mean negative log likelihood per supervised token of the global batch
        grad_norm: global norm of the raw gradient
        lr: learning rate of this step
        skipped: loss or gradient was not finite on some rank, so nothing moved on any
        num_tokens: tokens of the global batch without padding
        num_supervised: tokens of the global batch that count in the loss
        preconditioning: what the Riemannian preconditioner reports, empty without one: `preconditioned_norm` of the
            gradient after it, `condition` (largest condition number of a Gram matrix, estimated from below),
            `eigh_fallbacks` (matrices that Cholesky could not take)
        router_losses: values, without their weights, of the losses that are switched on; `loss` does not hold them
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    num_tokens: int
    num_supervised: int
    preconditioning: dict[str, float] = field(default_factory=dict)
    router_losses: dict[str, float] = field(default_factory=dict)


class Engine:
    """An adapted model under ZeRO-3 and everything that changes as it learns (all methods are collective).

    Args:
        recipe: of the run
        deepspeed_config: content of the DeepSpeed file, see `merge_config`
        model: causal language model of transformers, not adapted yet, best built under ZeRO-3
        tokenizer: of the model
        heartbeat: gets a beat for every forward pass and every part of a file; None for one that nobody looks at
        stop: looked at in every forward; None for one that nobody asks. An engine that has raised `Stopped` can still
            save, and nothing else
        resumes: `load` comes next; with `adapter.init: svd` it is the checkpoint that says where the experts started

    Attributes:
        step: optimizer steps taken, skipped ones included
        skipped_steps: steps dropped because loss or gradient was not finite
        adapted_layers: names of the layers with experts
        num_trainable: trainable numbers, of all experts; those of `adapter.freeze` are not among them
        base_fingerprint: see `adapters.fingerprint`
        awaits_start: neither `draw_start` nor `load` has given the experts the start that `adapter.init: gradient` asks
            for
    """

    def __init__(
        self,
        recipe: Recipe,
        deepspeed_config: dict[str, Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        heartbeat: Heartbeat | None = None,
        stop: StopRequest | None = None,
        resumes: bool = False,
    ) -> None:
        self.recipe, self.tokenizer, self.model = recipe, tokenizer, model
        self._heartbeat = heartbeat or Heartbeat()
        self.stop = stop or StopRequest()
        # In training, evaluation and generation alike every rank calls the model equally often.
        model.register_forward_pre_hook(lambda *_: self._heartbeat.beat())
        model.register_forward_pre_hook(lambda *_: self.stop.poll())
        self.step = self.skipped_steps = 0
        self.awaits_start = recipe.adapter.init == "gradient"
        self.placement = zero.make_placement(recipe)
        keeps_logits = can_keep_logits(model)
        self._adapt(resumes)
        dropout = recipe.adapter.lora_dropout
        comm.together(lambda: settle_dropout(recipe.train.compile, dropout, self.device, recipe.model.torch_dtype))
        chunked_loss = ChunkedLoss.of(model, recipe.train.loss_chunk)
        self._initialise(deepspeed_config)
        self._calls = ModelCalls(self._deepspeed, self._context, recipe.run.seed, keeps_logits, chunked_loss)
        self.watch = AdapterWatch(self.optimizer)
        self._noise = FlatNoise(model, recipe, self.placement)
        self._routing = self._context.log = RoutingLog(model, recipe.losses, self.device)
        comm.set_timeout(recipe.train.hang_timeout_s)  # of the groups that DeepSpeed has made

    def _adapt(self, resumes: bool) -> None:
        """Put experts on the layers that the recipe chooses, before DeepSpeed knows of the model."""
        recipe, model, exchange, group = self.recipe, self.model, None, None
        self.base_fingerprint = base_fingerprint(model)
        if self.placement.ep_size > 1:
            exchange = TokenExchange(self.placement, recipe.parallel.exchange, recipe.adapter.num_used)
            group = PartitionedExperts(exchange, recipe.losses.contrastive_tokens)
            model.register_forward_pre_hook(exchange.announce_call, with_kwargs=True)
        comm.together(lambda: open_folders(recipe.adapter.experts_from))  # one node may not see them
        held = self.placement.local_experts
        self.adapted_layers = inject(model, recipe.adapter, held, exchange, lambda _: None, zero.gathered)
        if recipe.adapter.experts_from and not resumes:
            # each rank reads the experts that it holds
            given = (recipe.adapter, self.base_fingerprint, self._heartbeat.beat)
            comm.together(lambda: take_experts(model, *given))
        self._start = StartShards(model, resumes, self._heartbeat.beat) if recipe.adapter.init == "svd" else None
        is_packed_apart = recipe.adapter.init == "loftq"
        self._packed_starts = PackedStarts(model, self._heartbeat.beat) if is_packed_apart else None
        if recipe.train.activation_checkpointing:
            recompute_activations(model)
        self._context = adapter_context(model)
        self._contrast = ContrastiveLosses(model, recipe.losses, self.device, recipe.adapter.num_used, group)
        self._context.losses = self._contrast if self._contrast.loss_names else None

    def _initialise(self, deepspeed_config: dict[str, Any]) -> None:
        """Hand the adapted model to DeepSpeed, and bind the optimizer to what this rank holds of it then."""
        found = trainables(self.model)
        self.num_trainable = sum(math.prod(trainable.shape) for trainable, _ in found)
        self._frozen = frozen_tensors(self.model)
        self.optimizer = ShardOptimizer(found, self.recipe.optim, self._frozen_grams())
        self.schedule = build_schedule(self.optimizer, self.recipe.optim, self.recipe.train.max_steps)
        config = merge_config(self.recipe, deepspeed_config, comm.world_size())
        if self.placement.ep_size == 1:  # experts of an expert-parallel group are no one's to keep whole
            adapters = [parameter for _, parameter in (*found, *self._frozen)]
            known = set(map(id, adapters))
            base = [zero.full_numel(one) for one in self.model.parameters() if id(one) not in known]
            keep_whole_what_fits(config, [parameter.numel() for parameter in adapters], base)
        zero.place_experts([*found, *self._frozen], self.placement)
        zero.gather_joined_parameters(self.model)
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, model_parameters=[p for _, p in found], config=config
        )
        self.optimizer.bind(shard_groups(self._deepspeed, found, self.placement))
        if self._start is not None:
            self._start.bind(self.optimizer.shards)

    def _frozen_grams(self) -> FrozenGrams:
        """What the preconditioner, if there is one, has to know of the factors that are not trained."""
        return {} if self.recipe.optim.preconditioner == "none" else frozen_grams(self._frozen, zero.gathered)

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        deepspeed_config: dict[str, Any],
        heartbeat: Heartbeat | None = None,
        stop: StopRequest | None = None,
        resumes: bool = False,
    ) -> Engine:
        """Load tokenizer and weights (streamed into ZeRO-3 partitions), adapt, initialise; arguments as of the class.

        Raises:
            UserError: the recipe, the DeepSpeed file or the model cannot work together
        """
        heartbeat = heartbeat or Heartbeat()
        heartbeat.enter(Phase.BUILD, 0)
        recipe = settle_dtype(recipe).recipe
        config = merge_config(recipe, deepspeed_config, comm.world_size())
        tokenizer = comm.together(lambda: load_tokenizer(recipe.model))
        with watched_loading(recipe.model.path, heartbeat.beat, speaks=comm.rank() == 0):
            model = load_model(recipe.model, config, recipe.adapter)
        return cls(recipe, deepspeed_config, model, tokenizer, heartbeat, stop, resumes)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return torch.device(get_accelerator().current_device_name())

    def draw_start(self, micro_batches: list[MicroBatch]) -> StartReport:
        """With `adapter.init: gradient`: let `a` start from the gradient of these rows, and `b` at 0.

        The base, routers, moments, and everything that is counted stay as they are.

        Args:
            micro_batches: of this rank, as many on every rank

        Raises:
            HopelessError: the gradient is not finite
            Stopped: between two micro-batches; there is no start then
        """
        self._heartbeat.enter(Phase.TRAIN, self.step)
        self._deepspeed.train()
        with self._context.unheard():
            passes = [partial(self._backward, micro_batch) for micro_batch in micro_batches]
            report = start_from_gradients(self._deepspeed, self.optimizer, passes, self.recipe)
        self._calls.forget()
        self.awaits_start = False
        return report

    def train_step(self, micro_batches: list[MicroBatch]) -> StepResult:
        """One optimizer step on this rank's share of a global batch.

        The loss is the mean over all supervised tokens of the global batch, whatever the split over ranks and
        micro-batches: each micro-batch contributes `W * sum(nll) / N_global`, and ZeRO averages over the W ranks.

        Raises:
            Stopped: between two micro-batches; no weight has moved and `step` is that of before
        """
        assert not self.awaits_start, "with adapter.init = gradient a run begins with `draw_start`, or with `load`"
        self._heartbeat.enter(Phase.TRAIN, self.step)
        torch.manual_seed(derive_seed("step", self.recipe.run.seed, self.step, comm.rank()))
        self._deepspeed.train()
        lr = float(self.schedule.get_last_lr()[0])
        with self._noise.during(self.step):
            own = self._accumulate(micro_batches)
        parts = (own, self._routing.sums, self._contrast.sums)
        sums, routing, contrast = comm.sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        losses = (self._routing.loss_values(routing), self._contrast.loss_values(contrast))
        nll_sum, num_tokens, *values = torch.cat((sums, *losses)).tolist()
        skipped, grad_norm = self._apply(math.isfinite(nll_sum))
        report = {} if skipped else over_ranks(self.optimizer.reports)
        if not skipped:
            self._routing.finish_step(routing)
        self._calls.forget()
        named = dict(zip(self._routing.loss_names + self._contrast.loss_names, values, strict=True))
        num_supervised = micro_batches[0].num_supervised_global
        loss = nll_sum / num_supervised
        return StepResult(loss, grad_norm, lr, skipped, int(num_tokens), num_supervised, report, named)

    def _accumulate(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Gradients of a step.

        Returns:
            (2,) of this rank: sum of negative log likelihoods, and real tokens
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        scale = comm.world_size() * loss_scale.of(self._deepspeed)
        self._routing.begin_step(micro_batches[0].num_tokens_global, scale)
        self._contrast.begin_step(self.recipe.train.batch_size, scale)
        for micro_batch in micro_batches:
            sums[0] += self._backward(micro_batch)
            sums[1] += micro_batch.real_tokens.sum()
            if micro_batch is not micro_batches[-1]:
                zero.step(self._deepspeed)  # counts the micro-batch
        return sums

    def _backward(self, micro_batch: MicroBatch) -> Tensor:
        """Forward and backward pass; returns the sum of negative log likelihoods."""
        weight = comm.world_size() / micro_batch.num_supervised_global
        with self._routing.listening():
            more_experts = self.recipe.adapter.more_experts(self.step)
            nll = self._calls.nll_sum(micro_batch, weight * loss_scale.of(self._deepspeed), more_experts)
        self._deepspeed.backward(nll * weight, scale_wrt_gas=False)
        return nll.detach()

    def _apply(self, loss_is_finite: bool) -> tuple[bool, float]:
        """Let weights move by the gradients at hand, where these and the loss are finite on all ranks.

        Returns:
            whether the step was skipped, and the norm of the raw gradient
        """
        own_norm = zero.unchecked_grad_norm(self._deepspeed)
        self.optimizer.skip = not (loss_is_finite and math.isfinite(own_norm or 0.0))
        zero.step(self._deepspeed)
        skipped = self.optimizer.skip or not zero.step_was_applied(self._deepspeed)
        self.optimizer.skip = False
        self.schedule.step()
        self.step += 1
        self.skipped_steps += skipped
        return skipped, zero.global_grad_norm(self._deepspeed) if own_norm is None else own_norm

    def take_routing(self) -> Routing:
        """How routers have used their experts since the last call, on all ranks together; the same on all."""
        return self._routing.take_window()

    def expert_cosines(self) -> ExpertCosines:
        """How alike the experts' updates are, the same on all ranks; see `parallel.factors`."""
        return expert_cosines(self.model, self.placement)

    def evaluate(self, micro_batches: list[MicroBatch], routed: bool = True) -> float:
        """Mean negative log likelihood per supervised token, in nats, over all ranks' micro-batches.

        Args:
            micro_batches: of this rank
            routed: by the routers; otherwise all gates are 1 / E, with which `adapter.init: svd` starts as the base was
        """
        self._heartbeat.enter(Phase.EVALUATE, self.step)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._calls.inference(), nullcontext() if routed else uniform_gates(self.model):
            for micro_batch in micro_batches:
                total += self._calls.nll_sum(micro_batch)
        return comm.all_reduce_sum([total.item()])[0] / micro_batches[0].num_supervised_global

    def nlls(self, micro_batches: Iterable[MicroBatch]) -> list[list[float]]:
        """For each row the negative log likelihoods of its targets, in nats.

        Args:
            micro_batches: of this rank, as many as of every other
        """
        self._heartbeat.enter(Phase.EVALUATE, self.step)
        with self._calls.inference():
            return [row for micro_batch in micro_batches for row in self._calls.nlls(micro_batch)]

    def check_packing(self) -> None:
        """Make sure, in one short forward pass, that samples of a packed row do not see each other.

        Raises:
            ModelError: they do in this model, with this attention implementation
        """
        micro_batch = probe(self.model.config.get_text_config().vocab_size)
        places_BP = torch.arange(micro_batch.input_ids.shape[1]).expand_as(micro_batch.input_ids)
        with self._calls.inference():
            logits_BSV = self._calls.logits(micro_batch, places_BP)
        comm.together(lambda: check_probe(self.model, logits_BSV))

    def generate(self, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers of the assistant; all ranks must ask, whatever they ask."""
        self._heartbeat.enter(Phase.GENERATE, self.step)
        options: dict[str, Any] = {"use_cache": True, "synced_gpus": comm.world_size() > 1}
        with self._calls.inference():
            return greedy_answers(self.model, self.tokenizer, prompts, max_new_tokens, **options)

    def first_not_finite(self) -> str | None:
        """Name of the first tensor, of the base and the adapters, that is not finite; the same on all ranks."""
        packed = packed_layers(self.model)  # whose numbers mean nothing, and were looked at when they were read
        return first_not_finite(pair for pair in self.model.named_parameters() if pair[0] not in packed)

    def save(self, root: Path, state: dict[str, Any], keep: int) -> Path:
        """Write `root/checkpoint-{step}`: adapters, moments, counters and the caller's state.

        Random numbers and learning rate need no saving: they derive from the recipe and the step.

        Args:
            root: folder of the run
            state: JSON-able, the same on all ranks, given back by `load`
            keep: how many of the newest checkpoints stay
        """
        self._heartbeat.enter(Phase.SAVE, self.step)
        own = {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "optimizer_steps": self.optimizer.num_steps,
            "routing": self._routing.state(),
            "loss_scaler": loss_scale.state(self._deepspeed),
        }
        kept = {"engine": own, "caller": state}
        return save_checkpoint(root, self.step, self._shard_states(), kept, keep, self._heartbeat.beat)

    def checkpoint_bytes(self) -> int:
        """Bytes of the numbers in a checkpoint: adapters and moments in fp32, nothing of the base."""
        return checkpoint_bytes(self._shard_states())

    def load(self, folder: Path, check: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
        """Go on from a checkpoint, whatever the number of ranks it was written with; returns the caller's state.

        Args:
            folder: of the checkpoint
            check: gets the caller's state before anything is taken from the checkpoint, and may refuse it

        Raises:
            ModelError: `adapter.init` is svd, and the base has been shifted already
        """
        if self._start is not None:
            self._start.check_untouched(folder)
        self._heartbeat.enter(Phase.LOAD, self.step)
        state = load_checkpoint(folder, self._shard_states(), lambda state: check(state["caller"]))
        own = state["engine"]
        self.awaits_start = False
        if self._start is not None:
            self._start.shift()
        zero.push_master_weights(self._deepspeed)
        self.optimizer.set_frozen(self._frozen_grams())
        self.step, self.skipped_steps = own["step"], own["skipped_steps"]
        self.optimizer.num_steps = own["optimizer_steps"]
        self._routing.load_state(own["routing"])
        loss_scale.load_state(self._deepspeed, own.get("loss_scaler"))
        self.schedule = build_schedule(self.optimizer, self.recipe.optim, self.recipe.train.max_steps, self.step)
        caller_state: dict[str, Any] = state["caller"]
        return caller_state

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter folder: weights in the model's dtype, configuration, tokenizer (rank 0 writes).

        Raises:
            CheckpointError: a tensor is empty or not finite; on all ranks, and nothing is written
        """
        self._heartbeat.enter(Phase.SAVE, self.step)
        tensors = tensors_on_rank_0(self.model, self.placement)
        start = None if self._start is None else self._start.on_rank_0()
        taken = None
        if self._packed_starts is not None:
            start, taken = self._packed_starts.start, self._packed_starts.taken
        comm.together(lambda: self._write_adapter(folder, tensors, start, taken) if comm.rank() == 0 else None)

    def _write_adapter(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        start: dict[str, Tensor] | None,
        taken: dict[str, Tensor] | None,
    ) -> None:
        base = self.recipe.model.path
        base = str(Path(base).resolve()) if Path(base).exists() else base
        more = (self.tokenizer.save_pretrained, start, self.recipe.model.quantize, taken)
        write_adapter(folder, self.recipe.adapter, self.adapted_layers, tensors, base, self.base_fingerprint, *more)

    def _shard_states(self) -> list[ShardState]:
        states = []
        for k, shard in enumerate(self.optimizer.shards):
            start = {} if self._start is None else {"start": self._start.flat[k]}
            value = {"value": shard.tensor.detach().view(-1)}
            states.append(ShardState(shard.segments, value | self.optimizer.state[shard.tensor] | start))
        frozen = held_pieces(self._frozen, self.placement)
        return states + [ShardState(segments, {"value": piece}) for segments, piece in frozen]

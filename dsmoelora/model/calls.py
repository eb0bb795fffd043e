"""The forward passes of a model under DeepSpeed: what they are given, and what is made of what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsmoelora.adapters.context import AdapterContext, BatchTokens
from dsmoelora.data import MicroBatch
from dsmoelora.data.dataset import IGNORED
from dsmoelora.model.inputs import fill_context, model_inputs, sent
from dsmoelora.model.output_head import ChunkedLoss, nll_of_rows


class ModelCalls:
    """Calls an adapted model with micro-batches.

    Few tokens are targets, and logits are large: the output head computes what is asked for, nothing else.

    Args:
        engine: DeepSpeed's, around a causal language model of transformers
        context: of the model's adapters
        seed: of the run
        keeps_logits: the model can compute logits of some places alone
        chunked_loss: None to have all logits of a micro-batch at once
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        context: AdapterContext,
        seed: int,
        keeps_logits: bool,
        chunked_loss: ChunkedLoss | None,
    ) -> None:
        self._engine, self._context, self._seed = engine, context, seed
        self._keeps_logits, self._chunked_loss = keeps_logits, chunked_loss

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return torch.device(get_accelerator().current_device_name())

    def nll_sum(self, micro_batch: MicroBatch, gradient: float = 1.0, more_experts: int = 0) -> Tensor:
        """Sum of the negative log likelihoods of a micro-batch's supervised tokens (fp32 scalar).

        Args:
            micro_batch: of this rank
            gradient: that the sum will get in the backward pass
            more_experts: than K that a token uses (`adapter.top_k_warmup`)
        """
        places_BP, targets_BP = micro_batch.targets()
        if self._chunked_loss is None:
            logits_BPV = self.logits(micro_batch, places_BP, more_experts)
            logits_TV, targets_T = logits_BPV.flatten(0, 1).float(), sent(targets_BP, self.device).flatten()
            return nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
        wanted_T = (targets_BP != IGNORED).flatten().nonzero().squeeze(-1)
        targets_T = sent(targets_BP.flatten()[wanted_T], self.device)
        call = partial(self._call, micro_batch, places_BP, more_experts)
        return self._chunked_loss.nll_sum(call, sent(wanted_T, self.device), targets_T, gradient)

    def nlls(self, micro_batch: MicroBatch) -> list[list[float]]:
        """For each row the negative log likelihoods of its targets, in nats."""
        places_BP, targets_BP = micro_batch.targets()
        return nll_of_rows(self.logits(micro_batch, places_BP), sent(targets_BP, self.device))

    def logits(self, micro_batch: MicroBatch, places_BP: Tensor, more_experts: int = 0) -> Tensor:
        """(B, P, V): the logits at `places_BP`, a tensor of the host, of each row."""
        logits: Tensor = self._call(micro_batch, places_BP, more_experts).logits
        if self._keeps_logits:
            return logits
        return torch.take_along_dim(logits, sent(places_BP, self.device).unsqueeze(-1), dim=1)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside the block the model is evaluated, without gradients; nothing of a micro-batch is known after it."""
        was_training = self._engine.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(was_training)
            self.forget()

    def forget(self) -> None:
        """Know nothing of the last micro-batch's tokens any more."""
        self._context.tokens = BatchTokens()

    def _call(self, micro_batch: MicroBatch, places_BP: Tensor, more_experts: int) -> Any:
        """What the model says, at `places_BP` alone where it can."""
        config: Any = self._engine.module.config
        inputs = model_inputs(micro_batch, config._attn_implementation, self.device)
        fill_context(self._context, micro_batch, self._seed, self.device, more_experts)
        if self._keeps_logits:
            inputs["logits_to_keep"] = sent(places_BP, self.device)
        return self._engine(**inputs)

"""What a model makes of texts: how likely it finds them, what it answers, and which experts read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.data import MicroBatch
from dsmoelora.data.chat import Prompt
from dsmoelora.data.loader import Row, collate
from dsmoelora.model.inputs import fill_context, greedy_answers, model_inputs, sent
from dsmoelora.model.output_head import can_keep_logits, nll_of_rows

Some = TypeVar("Some")
Tokens = tuple[list[int], list[int]]  # ids and labels (-100 where no likelihood is asked for) of one text


class Reader:
    """A whole model of transformers, with or without experts on it, in evaluation mode.

    Args:
        model: causal language model on its device
        tokenizer: of the model
        batch_size: texts that go through it at once
        max_new_tokens: of an answer at most
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_new_tokens: int = 256
    ) -> None:
        self.model, self._tokenizer = model.eval(), tokenizer
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._can_keep_logits = can_keep_logits(model)
        self._context = adapter_context(model) if any(True for _ in adapted_layers(model)) else None

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers of the assistant."""
        return [
            text
            for some in in_batches(prompts, self._batch_size)
            for text in greedy_answers(self.model, self._tokenizer, some, self._max_new_tokens)
        ]

    def nlls(self, texts: Sequence[Tokens]) -> list[list[float]]:
        """For each text the negative log likelihoods of its labelled tokens, in nats."""
        found: list[list[float]] = []
        for batch in self._batches(texts):
            places_BP, targets_BP = batch.targets()
            found += nll_of_rows(self._logits(batch, places_BP), sent(targets_BP, self.model.device))
        return found

    def read(self, texts: Sequence[Tokens]) -> Iterator[Tensor]:
        """Put texts through the model for what listens to its modules.

        Yields:
            (B, S) bool before each forward pass: the real tokens of the next texts, which go through it next
        """
        for batch in self._batches(texts):
            yield batch.attention_mask.bool()
            self._logits(batch, batch.targets()[0])

    def _batches(self, texts: Sequence[Tokens]) -> Iterator[MicroBatch]:
        return batches_of(texts, self._batch_size, self._tokenizer)

    @torch.no_grad()
    def _logits(self, batch: MicroBatch, places_BP: Tensor) -> Tensor:
        """(B, P, V): the logits at these places of each row."""
        device = self.model.device
        inputs = model_inputs(batch, self.model.config._attn_implementation, device)
        if self._can_keep_logits:
            inputs["logits_to_keep"] = sent(places_BP, device)
        if self._context is not None:
            fill_context(self._context, batch, 0, device)
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            if self._context is not None:
                self._context.tokens = BatchTokens()
        if self._can_keep_logits:
            return logits
        return torch.take_along_dim(logits, sent(places_BP, device).unsqueeze(-1), dim=1)


def batches_of(texts: Sequence[Tokens], size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[MicroBatch]:
    """Texts in micro-batches, padded on the right."""
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int), "load_tokenizer sets a pad token"
    rows = [Row(np.array([i]), i, len(ids)) for i, (ids, _) in enumerate(texts)]
    for some in in_batches(rows, size):
        yield collate(_Texts(texts), some, pad_token_id, (1, 1), packed=False)


def in_batches(things: Sequence[Some], size: int) -> list[list[Some]]:
    """Neighbours together, `size` of them, at the end fewer."""
    return [list(things[begin : begin + size]) for begin in range(0, len(things), size)]


class _Texts:
    """Texts as `collate` takes samples."""

    def __init__(self, texts: Sequence[Tokens]) -> None:
        self._texts = texts

    def sample(self, index: int) -> Tokens:
        return self._texts[index]

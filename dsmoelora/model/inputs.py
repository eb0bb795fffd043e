"""A micro-batch as models of transformers and their adapters want it.

Position ids that restart tell transformers where a sample begins (`masking_utils.find_packed_sequence_indices`). Given
no attention mask *and no cache* it builds the block-diagonal causal mask, for sdpa and eager attention, for full and
sliding windows. Flash attention looks at position ids in batches of a single row only, so it gets the borders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsmoelora.adapters.context import AdapterContext, BatchTokens
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.adapters.routers.prompt import prompt_tokens
from dsmoelora.data import MicroBatch
from dsmoelora.data.chat import Prompt, prompt_ids
from dsmoelora.data.limits import UNLIMITED, Limits
from dsmoelora.model.greedy import greedily
from dsmoelora.model.limits import limits_of


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the accelerator, which takes it when it comes to it: the host does not wait.

    For that it must lie in pinned memory, as `collate` makes it; a copy out of any other waits for all that the
    accelerator has to compute.
    """
    if device.type == "cpu":
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def model_inputs(batch: MicroBatch, attention: str, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    Args:
        batch: micro-batch
        attention: name of the attention implementation
        device: of the model
    """
    if batch.position_ids is None:
        tensors = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    else:
        tensors = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    more: dict[str, Any] = {"use_cache": False}
    if batch.position_ids is not None and attention.startswith("flash_attention"):
        borders, longest = _borders(batch.position_ids)
        tensors |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        more |= {"max_length_q": longest, "max_length_k": longest}
    return {name: sent(tensor, device) for name, tensor in tensors.items()} | more


def prompt_inputs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    device: torch.device,
    limits: Limits = UNLIMITED,
    max_new_tokens: int = 0,
) -> dict[str, Tensor]:
    """Token ids and mask (B, S) of what comes before an answer, padded on the left, for `generate`.

    Args:
        tokenizer: of the model
        prompts: of one batch
        device: of the model
        limits: of the model
        max_new_tokens: of an answer at most

    Raises:
        RowProblem: the chat template refuses one
        LimitProblem: one is beyond the limits, with its answer or without
    """
    ids = [prompt_ids(tokenizer, prompt.messages, prompt.tools) for prompt in prompts]
    for each in ids:
        limits.check(tokenizer, each, max_new_tokens)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    tokenizer.padding_side = side
    return {name: sent(tensor, device) for name, tensor in batch.items()}


def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], max_new_tokens: int, **options: Any
) -> list[str]:
    """The assistant's greedy answers, without special tokens and blanks around them.

    Args:
        model: a causal language model of transformers, in evaluation mode
        tokenizer: of the model
        prompts: answered in one batch
        max_new_tokens: of an answer at most
        options: more of `generate`

    Raises:
        RowProblem: the chat template refuses a prompt
        LimitProblem: the model has no embedding for a token, or for its position
    """
    batch = prompt_inputs(tokenizer, prompts, model.device, limits_of(model), max_new_tokens)
    with torch.no_grad(), greedily(model, tokenizer):
        output = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
    answers = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def fill_context(
    context: AdapterContext, batch: MicroBatch, seed: int, device: torch.device, more_experts: int = 0
) -> None:
    """Tell the adapted layers what the model is about to be called with.

    Args:
        context: of the model
        batch: micro-batch
        seed: of the run
        device: of the model
        more_experts: than K that a token uses
    """
    # what follows from the batch is computed on the device: only what `collate` has pinned is sent
    batch = batch.with_tensors(lambda tensor: sent(tensor, device))
    ids_BS, mask_BS = batch.sequence_ids, batch.attention_mask
    context.tokens = BatchTokens(
        keys_BS=token_keys(seed, ids_BS, mask_BS, batch.position_ids),
        real_BS=batch.real_tokens,
        sequences_BS=ids_BS if ids_BS.dim() == 2 else None,
        prompt_BS=prompt_tokens(mask_BS, batch.labels),
        more_experts=more_experts,
    )


def _borders(position_ids_BS: Tensor) -> tuple[Tensor, int]:
    """Where samples begin in the rows laid end to end, and the longest, as kernels for uneven lengths take it."""
    flat_T = position_ids_BS.flatten()
    begins = (flat_T == 0).nonzero().flatten()
    borders = torch.cat([begins, begins.new_tensor([len(flat_T)])]).int()
    return borders, int(borders.diff().max())

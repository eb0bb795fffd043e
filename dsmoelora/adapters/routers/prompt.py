"""Experts are chosen once for a prompt and serve all its tokens and the whole answer.

As in MiLoRA (Zhang et al. 2024, arXiv 2410.18035), whose experts however are the modules of a decoder layer. The router
sees the mean of the prompt's states. In training the prompt is what comes before the first supervised token; in a call
without labels it is the whole input; while `generate` runs, or where the call goes on from a key-value cache, the last
prompt's gates hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from dsmoelora.adapters.experts.products import product_fp32
from dsmoelora.adapters.routers.base import Report, RouterPlace
from dsmoelora.adapters.routers.rules import Rule
from dsmoelora.errors import ModelError

_IGNORED = -100


def prompt_tokens(attention_mask_BS: Tensor, labels_BS: Tensor | None) -> Tensor:
    """(B, S) bool: the real tokens before the first supervised one, and at least the first real token.

    Args:
        attention_mask_BS: 1 for real tokens
        labels_BS: -100 where not supervised; None where nothing is: all real tokens are the prompt
    """
    real_BS = attention_mask_BS.bool()
    if labels_BS is None:
        return real_BS
    before_BS = (labels_BS != _IGNORED).cumsum(-1) == 0
    return real_BS & (before_BS | (real_BS.cumsum(-1) == 1))


class PromptLogits(torch.autograd.Function):
    """`logits_BE = mean over the prompt of x, times W^T`, in fp32."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, weight_ED: Tensor, prompt_BS: Tensor) -> Tensor:
        """(B, E), for `x_TD` with T = B S."""
        num_B1 = prompt_BS.sum(-1, keepdim=True).clamp(min=1).float()
        pooled_BD = product_fp32(x_TD.t(), _of_sequence(prompt_BS, x_TD)).t() / num_B1
        ctx.dtype = x_TD.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(pooled_BD, weight_ED, prompt_BS)
        return pooled_BD @ weight_ED.to(pooled_BD.dtype).t()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_BE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and of the weight in their dtypes."""
        pooled_BD, weight_ED, prompt_BS = ctx.saved_tensors  # type: ignore[attr-defined]
        need_x, need_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = grad_weight = None
        if need_x:
            num_B1 = prompt_BS.sum(-1, keepdim=True).clamp(min=1).float()
            grad_pooled_BD = (grad_BE @ weight_ED.to(grad_BE.dtype) / num_B1).to(ctx.dtype)  # type: ignore[attr-defined]
            grad_x = _of_sequence(prompt_BS, grad_pooled_BD) @ grad_pooled_BD
        if need_weight:
            grad_weight = (grad_BE.t() @ pooled_BD).to(weight_ED.dtype)
        return grad_x, grad_weight, None


def _of_sequence(mask_BS: Tensor, like: Tensor) -> Tensor:
    """(T, B): 1 where a token is in the mask, in the column of its sequence."""
    eye_BB = torch.eye(mask_BS.shape[0], dtype=like.dtype, device=like.device)
    return (mask_BS.unsqueeze(-1) * eye_BB.unsqueeze(1)).flatten(0, 1)


@dataclass
class PromptMemory:
    """The last prompt that a model was called with, shared by its routers.

    Args:
        prompt_BS: bool, which tokens of the call at hand are the prompt
        gates: by layer, the gates (B, E) and selected experts (B, E) of that prompt, once it was routed
        goes_on: the call at hand goes on from the prompt: its gates hold
        is_generating: `generate` runs, all whose calls but the first go on
        watch: the hook of the model that fills this in
    """

    prompt_BS: Tensor | None = None
    gates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    goes_on: bool = False
    is_generating: bool = False
    watch: RemovableHandle | None = None


class PromptRouter(nn.Module):
    """One choice of experts for a sequence, from the mean state of its prompt.

    Args:
        place: where it stands
        rule: from logits to gates

    Attributes:
        memory: set by `watch_prompts`
    """

    def __init__(self, place: RouterPlace, rule: Rule) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape}
        self.weight = place.uniform_start()
        self._layer, self._context = place.layer, place.context
        self._rule, self._report = rule, Report(place)
        self.memory = PromptMemory()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (T, E) fp32 that sum to 1, and the selected experts (T, E) bool, the same for a sequence."""
        memory = self.memory
        if self._context.tokens.prompt_BS is None and memory.goes_on:
            gate_BE, selected_BE = memory.gates[self._layer]
        else:
            logits_BE = PromptLogits.apply(x_TD, self.weight, self._prompt(x_TD))
            gate_BE, selected_BE = self._report.decide(logits_BE, self._rule, self.training)
            if not self.training:
                memory.gates[self._layer] = gate_BE.detach(), selected_BE
        num_tokens = len(x_TD) // len(gate_BE)
        return _for_all_tokens(gate_BE, num_tokens), _for_all_tokens(selected_BE, num_tokens)

    def _prompt(self, x_TD: Tensor) -> Tensor:
        prompt_BS = self._context.tokens.prompt_BS
        if prompt_BS is None:
            prompt_BS = self.memory.prompt_BS
        if prompt_BS is None or prompt_BS.numel() != len(x_TD):
            raise ModelError(
                f"{self._layer} has the router `prompt`, but does not know which of its {len(x_TD)} tokens are the "
                "prompt. Call the model that was adapted as a whole, not a part of it."
            )
        return prompt_BS


def _for_all_tokens(value_BE: Tensor, num_tokens: int) -> Tensor:
    return value_BE.unsqueeze(1).expand(-1, num_tokens, -1).flatten(0, 1)


def watch_prompts(model: nn.Module) -> None:
    """Let routers know, whenever the model is called, which tokens are the prompt or that they go on from one.

    Args:
        model: a causal language model of transformers, with this router in it or without
    """
    routers = _prompt_routers(model)
    if not routers:
        return
    memory = PromptMemory()
    for router in routers:
        router.memory = memory
    memory.watch = model.register_forward_pre_hook(partial(_before_call, memory), with_kwargs=True)
    if hasattr(model, "generate"):
        # Of this model alone: a copy of the model gets one of its own.
        model.generate = partial(_generate_from_one_prompt, memory, model)  # type: ignore[assignment]


def unwatch_prompts(model: nn.Module) -> None:
    """Undo `watch_prompts`."""
    for router in _prompt_routers(model):
        if router.memory.watch is not None:
            router.memory.watch.remove()
            vars(model).pop("generate", None)  # that of its class is there again


def _prompt_routers(model: nn.Module) -> list[PromptRouter]:
    return [module for module in model.modules() if isinstance(module, PromptRouter)]


def _before_call(memory: PromptMemory, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    cache = inputs.get("past_key_values")
    has_past = cache is not None and cache.get_seq_length() > 0
    memory.goes_on = bool(memory.gates) and (has_past or memory.is_generating)
    if memory.goes_on:
        return
    memory.gates.clear()
    tokens = args[0] if args else inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None, "a language model is called with tokens or embeddings"
    mask_BS = inputs.get("attention_mask")
    if mask_BS is None or mask_BS.dim() != 2:
        mask_BS = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    memory.prompt_BS = prompt_tokens(mask_BS, inputs.get("labels"))


def _generate_from_one_prompt(memory: PromptMemory, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, in which the gates of the first call hold for all others."""
    memory.gates.clear()
    memory.is_generating = True
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        memory.is_generating = False
        memory.gates.clear()

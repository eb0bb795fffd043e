"""Experts are chosen once for a prompt and serve all its tokens and the whole answer.

The prompt-aware routing of MiLoRA (Zhang et al. 2024, arXiv 2410.18035). The router sees the prompt's states, pooled.
In training the prompt is what comes before the first supervised token; in a call without labels it is the whole input;
while `generate` runs, or where the call goes on from a key-value cache, the last prompt's gates hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsmoelora.adapters.routers.base import Report, RouterPlace, logits_of
from dsmoelora.adapters.routers.pooling import PooledLogits, last_of, softmax_weights
from dsmoelora.adapters.routers.rules import Rule
from dsmoelora.config.adapter_options import Pooling
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


@dataclass
class PromptMemory:
    """The last prompt that a model was called with, shared by its routers.

    Args:
        prompt_BS: bool, which tokens of the call at hand are the prompt
        gates: by layer, the gates (B, E) of that prompt, once it was routed
        goes_on: the call at hand goes on from the prompt: its gates hold
        is_generating: `generate` runs, all whose calls but the first go on
        watch: the hook of the model that fills this in
    """

    prompt_BS: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    goes_on: bool = False
    is_generating: bool = False
    watch: RemovableHandle | None = None


class PromptRouter(nn.Module):
    """One choice of experts for a sequence, from the pooled states of its prompt.

    Args:
        place: where it stands
        rule: from logits to gates
        pooling: of the prompt's states; the vector of `attention` starts at 0, which is their mean

    Attributes:
        memory: set by `watch_prompts`
    """

    def __init__(self, place: RouterPlace, rule: Rule, pooling: Pooling) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {"weight": place.shape}
        self.weight = place.uniform_start()
        if pooling == "attention":
            self.shapes["pooling_weight"] = (1, place.in_features)
            self.pooling_weight = place.zero_start(1, place.in_features)
        self._pooling = pooling
        self._layer, self._context = place.layer, place.context
        self._rule, self._report = rule, Report(place)
        self.memory = PromptMemory()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gates (T, E) fp32 that sum to 1, the same for a sequence."""
        memory = self.memory
        if self._context.tokens.prompt_BS is None and memory.goes_on:
            gate_BE = memory.gates[self._layer]
        else:
            prompt_BS = self._prompt(x_TD)
            logits_BE = PooledLogits.apply(x_TD, self.weight, self._shares(x_TD, prompt_BS))
            gate_BE = self._report.decide(logits_BE, self._rule, self.training)
            if not self.training:
                memory.gates[self._layer] = gate_BE.detach()
        num_tokens = len(x_TD) // len(gate_BE)
        return gate_BE.unsqueeze(1).expand(-1, num_tokens, -1).flatten(0, 1)

    def _shares(self, x_TD: Tensor, prompt_BS: Tensor) -> Tensor:
        """(B, S): what each token weighs in the pooled state of its prompt."""
        if self._pooling == "mean":
            return prompt_BS
        if self._pooling == "last":
            return last_of(prompt_BS)
        return softmax_weights(logits_of(x_TD, self.pooling_weight).view(prompt_BS.shape), prompt_BS)

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

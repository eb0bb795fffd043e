"""What the adapted layers of one model know about the micro-batch at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class BatchContext:
    """Shared by all adapted layers of a model; whoever runs the model fills it in before the forward pass.

    It must stay as it is until the backward pass is over, for a layer may be computed again there.

    Args:
        token_keys: (B, S) int32 from `dropout.token_keys`; None falls back to torch's own dropout and noise, which
            depend on how a batch is split
        prompt_BS: bool, the tokens that router `prompt` looks at; None leaves it to what the model is called with
        prompts: what router `prompt` remembers of that
    """

    token_keys: Tensor | None = None
    prompt_BS: Tensor | None = None
    prompts: PromptMemory = field(default_factory=lambda: PromptMemory())

    def clear(self) -> None:
        """Forget the micro-batch."""
        self.token_keys = self.prompt_BS = None


@dataclass
class PromptMemory:
    """The last prompt that a model was called with, see `routers.prompt`.

    Args:
        prompt_BS: bool, which tokens of the call at hand are the prompt
        gates: by layer, the gates (B, E) and selected experts (B, E) of that prompt, once it was routed
        goes_on: the call at hand goes on from the prompt: its gates hold
    """

    prompt_BS: Tensor | None = None
    gates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    goes_on: bool = False

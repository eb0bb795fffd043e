"""Tiny models of every architecture that is tested, and what `all-linear` means for each.

Sizes are odd where the architecture lets them be. What a layer's name stands for is written here by hand, from the
architectures' papers and code, and not asked of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers
from tests.helpers import tiny_tokenizer

VOCAB_SIZE = 260  # of `tiny_tokenizer`
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
HEAD = {"head_dim": 10}  # 3 x 10 is not the hidden size
# grouped products of experts want rows of a multiple of 16 bytes, in bf16 too
MOE: dict[str, Any] = SIZES | {"hidden_size": 40, "num_attention_heads": 4, "num_experts_per_tok": 2}
MOE |= {"intermediate_size": 56, "moe_intermediate_size": 24}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2: dict[str, Any] = {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64, "initializer_range": 0.1}
SPECIAL = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
FUSED_MLP = ["down_proj", "gate_up_proj"]


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Args:
        config: makes the configuration of a tiny model
        layers: last parts of the names that `all-linear` adapts, sorted
        attention: last parts of the names of the attention's layers, sorted
        num_layers: layers that `all-linear` adapts, of the whole model
        left_out: beginnings of the names of linear layers that stay as they are
        implementation: of the attention
    """

    config: Callable[[], PretrainedConfig]
    layers: list[str]
    attention: list[str]
    num_layers: int
    left_out: tuple[str, ...] = ("lm_head",)
    implementation: str = "sdpa"


def _llama_like(config: Callable[[], PretrainedConfig], **more: Any) -> Architecture:
    return Architecture(config, sorted(ATTENTION + MLP), ATTENTION, 2 * 7, **more)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like(lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-tied": _llama_like(lambda: LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": _llama_like(lambda: MistralConfig(**SIZES | HEAD, sliding_window=4)),
    "qwen2": _llama_like(lambda: Qwen2Config(**SIZES)),  # biases on q, k and v
    "qwen3": _llama_like(lambda: Qwen3Config(**SIZES | HEAD)),
    # its scores are capped, which sdpa cannot do
    "gemma2": _llama_like(lambda: Gemma2Config(**SIZES | HEAD, sliding_window=4), implementation="eager"),
    "gemma3": _llama_like(lambda: Gemma3TextConfig(**SIZES | HEAD, sliding_window=4)),
    "gemma3-vision": _llama_like(
        lambda: Gemma3Config(
            text_config=SIZES | HEAD | {"sliding_window": 4},
            vision_config=VISION | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        left_out=("lm_head", "model.vision_tower."),
    ),
    "phi3": Architecture(
        lambda: Phi3Config(**SIZES), ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], ["o_proj", "qkv_proj"], 2 * 4
    ),
    "glm4": Architecture(
        lambda: Glm4Config(**SIZES | HEAD, attention_bias=True), sorted(ATTENTION + FUSED_MLP), ATTENTION, 2 * 6
    ),
    "gpt-neox": Architecture(
        lambda: GPTNeoXConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
        ["dense", "query_key_value"],
        2 * 4,
    ),
    "gpt2": Architecture(
        lambda: GPT2Config(**GPT2 | SPECIAL), ["c_attn", "c_fc", "c_proj"], ["c_attn", "c_proj"], 2 * 4
    ),
    "mixtral": Architecture(lambda: MixtralConfig(**MOE, num_local_experts=4), ATTENTION, ATTENTION, 2 * 4),
    "qwen2-moe": Architecture(
        lambda: Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=26),
        sorted(ATTENTION + MLP),
        ATTENTION,
        2 * 7,
        left_out=("lm_head", "model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate"),
    ),
    "qwen3-moe": Architecture(
        # the first block is a plain one
        lambda: Qwen3MoeConfig(**MOE | HEAD, num_experts=4, mlp_only_layers=[0]),
        sorted(ATTENTION + MLP),
        ATTENTION,
        2 * 4 + 3,
    ),
}
ROUTED_BASES = [name for name in ARCHITECTURES if name.startswith("mixtral") or name.endswith("-moe")]


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights, in evaluation mode; the caller's random state is left as it was."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            architecture.config(), dtype=dtype, attn_implementation=architecture.implementation
        )
    return model.eval()


def save_model(name: str, folder: Path) -> Path:
    """Save a tiny model in fp32 and the tiny tokenizer to `folder`, and return the folder."""
    tiny_tokenizer(folder)
    make_model(name).save_pretrained(folder)
    return folder


def adapt(model: Any, trained: bool = True, **config: Any) -> Any:
    """Adapt a model; `trained` gives `b` random values, so that the experts say something."""
    settings: dict[str, Any] = {"r": 3, "num_experts": 5, "top_k": 2, "target_modules": "all-linear"}
    inject(model, AdapterConfig(**settings | config))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.experts.b.normal_(std=0.05, generator=generator)
    return model


def token_ids(num_sequences: int = 2, length: int = 9) -> Tensor:
    """(num_sequences, length), the same at every call."""
    return torch.randint(4, VOCAB_SIZE, (num_sequences, length), generator=torch.Generator().manual_seed(5))

"""Rows of the table: runs that are planned, and measured, on this machine's processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from dsmoelora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)

# fp32, which all processors compute well; weights are random, for nothing here depends on them
_LLAMA: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    # as SmolLM2-135M
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # as Llama-3.2-1B: 1.24 billion parameters
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
}
_SECTIONS: dict[str, Any] = {
    "model": ModelConfig(dtype="fp32"),
    "adapter": AdapterConfig(num_experts=8, top_k=2, r=4, target_modules="all-linear"),
    "optim": OptimConfig(warmup_steps=0),
    "data": DataConfig(max_length=64),
    "train": TrainConfig(micro_batch_size=2),
    "parallel": ParallelConfig(),
}


@dataclass(frozen=True)
class Row:
    """A run.

    Args:
        shape: of the model, of `SHAPES`
        ranks: W
        zero: section `zero_optimization` of the DeepSpeed file
        sections: keys of a recipe that differ from those of the other rows, by section
        micro_batches: of a rank in a step
    """

    shape: str
    ranks: int
    zero: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    micro_batches: int = 1

    def deepspeed(self) -> dict[str, Any]:
        """Content of the DeepSpeed file."""
        return {"zero_optimization": dict(self.zero)}

    def recipe(self, folder: Path) -> Recipe:
        """Of the run, on the model in this folder."""
        changed: dict[str, Any] = {
            name: replace(section, **self.sections.get(name, {})) for name, section in _SECTIONS.items()
        }
        size = self.ranks * self.micro_batches * changed["train"].micro_batch_size
        changed["model"] = replace(changed["model"], path=str(folder))
        changed["train"] = replace(changed["train"], batch_size=size)
        return Recipe(**changed)

    def settings(self) -> dict[str, Any]:
        """What a cell is remembered by."""
        return asdict(self) | {"shape": SHAPES[self.shape]}


def write_shape(name: str, folder: Path) -> Path:
    """The `config.json` of a shape, below the folder; returns where."""
    made = folder / name
    LlamaConfig(**SHAPES[name], **_LLAMA).save_pretrained(made)
    return made


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 2_000_000} | more


def _stage_3(**more: Any) -> dict[str, Any]:
    """As of a model that is too large for its weights to stay from one pass to the next."""
    return _zero(
        3,
        stage3_param_persistence_threshold=10_000,
        stage3_prefetch_bucket_size=4_000_000,
        stage3_max_live_parameters=60_000_000,
        stage3_max_reuse_distance=10_000_000,
        **more,
    )


_KEPT = _zero(3, stage3_prefetch_bucket_size=50_000_000)  # DeepSpeed's other sizes: all of a small model stays
_HOST = {"device": "cpu"}
_AGAIN = {"train": {"activation_checkpointing": True, "micro_batch_size": 4}}
_SHORT = {"data": {"max_length": 32}, "train": {"micro_batch_size": 1}}


def _experts_on_two(exchange: str) -> dict[str, Any]:
    return {"parallel": {"ep_size": 2, "exchange": exchange}}


ROWS: dict[str, Row] = {
    "stage 0": Row("135M", 1, _zero(0)),
    "stage 0, W 2, two micro-batches": Row("135M", 2, _zero(0), micro_batches=2),
    "stage 1, W 2": Row("135M", 2, _zero(1)),
    "stage 2, W 2": Row("135M", 2, _zero(2)),
    "stage 2, W 2, tangent, optimizer on the host": Row(
        "135M", 2, _zero(2, offload_optimizer=_HOST), {"optim": {"preconditioner": "tangent"}}
    ),
    "stage 3": Row("135M", 1, _KEPT),
    "stage 3, W 2, all gathered": Row("135M", 2, _KEPT),
    "stage 3, W 2": Row("135M", 2, _stage_3()),
    "stage 3, W 4": Row("135M", 4, _stage_3()),
    "stage 3, W 2, 8 rows": Row("135M", 2, _stage_3(), {"train": {"micro_batch_size": 8}}),
    "stage 3, W 2, 4 rows, checkpointing": Row("135M", 2, _stage_3(), _AGAIN),
    "stage 3, W 2, all on the host": Row("135M", 2, _stage_3(offload_param=_HOST, offload_optimizer=_HOST)),
    "stage 3, W 2, packed rows": Row("135M", 2, _stage_3(), {"data": {"packing": True}}),
    "stage 3, W 2, nf4": Row("135M", 2, _stage_3(), {"model": {"quantize": "nf4"}}),
    "stage 3, W 2, ep_size 2, gather": Row("135M", 2, _stage_3(), _experts_on_two("gather")),
    "stage 3, W 2, ep_size 2, all_to_all": Row("135M", 2, _stage_3(), _experts_on_two("all_to_all")),
    "1B, stage 0": Row("1B", 1, _zero(0), _SHORT),
    "1B, stage 3, W 2": Row("1B", 2, _stage_3(), _SHORT),
}

"""The sections `run`, `model`, `parallel` and `train`: what is trained, where, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from dsmoelora.config.checks import expanded, require, require_positive, require_unset
from dsmoelora.config.dtype import DTYPES

CompileChoice = Literal["auto", "on", "off"]
QuantizeName = Literal["none", "nf4"]
QUANTIZE: tuple[QuantizeName, ...] = get_args(QuantizeName)
TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of the package that it needs


@dataclass
class RunConfig:
    """Where a run lies and what it starts from.

    Args:
        name: folder of the run below `dir`
        dir: folder that holds all runs
        seed: decides adapter initialisation, order of samples and dropout
    """

    name: str = "run"
    dir: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        ok = bool(self.name) and "/" not in self.name and self.name not in (".", "..")
        require(ok, "run.name", self.name, "a plain folder name", "Give run.name without slashes.")
        self.dir = expanded("run.dir", self.dir)

    @property
    def folder(self) -> Path:
        """`<dir>/<name>`, where everything of the run lies."""
        return Path(self.dir) / self.name


@dataclass
class ModelConfig:
    """The frozen base model.

    Args:
        path: folder of a transformers model (config.json, tokenizer, safetensors), or a hub name
        dtype: dtype of weights and activations; masters and gradients are fp32 either way. `auto` is bf16 where the
            accelerator or CPU has instructions for it, else fp32. fp16 scales the loss, and the accelerator must
            know it
        attention: attention implementation of transformers
        trust_remote_code: run Python code that comes with the model
        quantize: keep the linear layers' weights in 4 bits, `nf4` (QLoRA), a third to a quarter of their memory; head,
            embeddings and routers of the base stay as they are
    """

    path: str = ""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    quantize: QuantizeName = "none"

    def __post_init__(self) -> None:
        self.path = expanded("model.path", self.path)
        ok = self.quantize == "none" or self.dtype != "fp16"
        reason = "none with model.dtype fp16: on a base in 4 bits experts are trained in bf16 or fp32"
        require(ok, "model.quantize", self.quantize, reason, "Set model.dtype to auto or bf16.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """What `dtype` names, once `parallel.dtype.settle_dtype` has put a name in the place of `auto`."""
        assert self.dtype != "auto", "settle_dtype comes first"
        return DTYPES[self.dtype]


@dataclass
class ParallelConfig:
    """Where experts lie.

    Args:
        ep_size: ranks over which the experts of a layer are partitioned; 1 has ZeRO-3 gather them like other weights
        exchange: how tokens reach experts on other ranks: `gather` all to all ranks, `all_to_all` each only to ranks
            that hold one of its experts, `auto` whichever moves fewer bytes (`parallel.exchange` has the formulas)
    """

    ep_size: int = 1
    exchange: Literal["auto", "gather", "all_to_all"] = "auto"

    def __post_init__(self) -> None:
        require_positive("parallel", self, "ep_size")
        if self.ep_size == 1:
            require_unset("parallel", self, "where parallel.ep_size is 1", "exchange")


@dataclass
class TrainConfig:
    """The loop.

    Args:
        max_steps: optimizer steps; 0 evaluates and writes the adapter, where experts that exist need no training
        batch_size: sequences of all ranks per optimizer step; with `data.packing` rows of `data.max_length` tokens
        micro_batch_size: sequences (rows) of one rank per forward; accumulation follows from both
        eval_every: optimizer steps between evaluations, 0 for none (where `data.eval` is given, the first
            evaluation is before step 1 and the last after the final step)
        save_every: optimizer steps between checkpoints, 0 for none but the last
        keep_checkpoints: how many of the newest checkpoints stay
        health_every: optimizer steps between looks at how experts are used, 0 for none
        dead_after: optimizer steps without a token after which an expert counts as dead
        activation_checkpointing: recompute activations in the backward pass
        loss_chunk: targets whose logits the output head makes at a time, 0 for all at once
        compile: have `torch.compile` fuse what makes many passes over wide tensors, which is `adapter.lora_dropout`:
            one pass instead of a dozen, the same numbers. `auto` does so on an accelerator where there is a compiler
        eval_score: what an evaluation measures beside the loss: `exact`, `number` or `choice` (docs/evaluation.md)
        eval_score_samples: rows of each held-out set that are scored
        num_samples: held-out prompts that are answered before and after training
        sample_max_new_tokens: tokens of such an answer at most, and of those that are scored
        max_skipped_steps: steps in a row without a finite loss and gradient after which the run ends
        hang_timeout_s: seconds without any progress (a forward pass, a part of a file) after which every rank prints
            its stacks and the job ends
        report_to: where the metrics go besides `metrics.jsonl`: any of `tensorboard`, `wandb`, `trackio`, or `none`
        device: what shares of the peak are reckoned with (`mfu(%)`): a device of the planner, or a file that describes
            one (docs/planning.md). `auto` takes the device that torch names, where the planner knows it
        project: name under which W&B (unless WANDB_PROJECT is set) and trackio file the run
    """

    max_steps: int = 100
    batch_size: int = 16
    micro_batch_size: int = 4
    eval_every: int = 25
    save_every: int = 50
    keep_checkpoints: int = 2
    health_every: int = 10
    dead_after: int = 50
    activation_checkpointing: bool = False
    loss_chunk: int = 256
    compile: CompileChoice = "auto"
    eval_score: Literal["none", "exact", "number", "choice"] = "none"
    eval_score_samples: int = 64
    num_samples: int = 0
    sample_max_new_tokens: int = 64
    max_skipped_steps: int = 20
    hang_timeout_s: float = 1800.0
    report_to: list[str] | str = field(default_factory=lambda: ["tensorboard"])
    device: str = "auto"
    project: str = "dsmoelora"

    def __post_init__(self) -> None:
        require_positive(
            "train",
            self,
            "batch_size",
            "micro_batch_size",
            "keep_checkpoints",
            "dead_after",
            "sample_max_new_tokens",
            "eval_score_samples",
            "max_skipped_steps",
            "hang_timeout_s",
        )
        for name in ("max_steps", "eval_every", "save_every", "num_samples", "health_every"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "0 or more", f"0 switches train.{name} off.")
        if self.eval_score == "none":
            require_unset("train", self, "where train.eval_score is none", "eval_score_samples")
        require(self.loss_chunk >= 0, "train.loss_chunk", self.loss_chunk, "0 or more", "0 takes all targets at once.")
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to == "none" else [self.report_to]
        for tracker in self.report_to:
            known = f"a list of some of {', '.join(TRACKERS)}, or none"
            require(tracker in TRACKERS, "train.report_to", tracker, known, "Example: [tensorboard, wandb].")
        require(bool(self.project), "train.project", self.project, "a name", "The default is dsmoelora.")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank per optimizer step.

        Raises:
            ConfigError: `batch_size` is no multiple of `micro_batch_size * world_size`
        """
        per_forward = self.micro_batch_size * world_size
        require(
            self.batch_size % per_forward == 0,
            "train.batch_size",
            self.batch_size,
            f"a multiple of train.micro_batch_size x ranks = {self.micro_batch_size} x {world_size} = {per_forward}",
            f"Nearest: {max(1, round(self.batch_size / per_forward)) * per_forward}.",
        )
        return self.batch_size // per_forward

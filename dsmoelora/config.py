"""The recipe: every setting of a run, its type, its default and its limits, in one place.

A recipe is one YAML file with the sections of `Recipe`; any key can be overridden on the command line
(`--optim.lr 3e-4`). The dataclasses check what can be checked without looking at the disk or the model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dsmoelora.adapter_options import ExpertName, MixerInit, RouterName, check_losses, settle_options
from dsmoelora.errors import bad_value

TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of the package that it needs
InitName = Literal["kaiming", "gaussian", "svd"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _require(ok: bool, key: str, value: Any, allowed: str, remedy: str) -> None:
    if not ok:
        raise bad_value(key, value, allowed, remedy)


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 1, f"{section}.{name}", value, "1 or more", f"Set {section}.{name} to a positive number.")


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
        _require(ok, "run.name", self.name, "a plain folder name", "Give run.name without slashes.")

    @property
    def folder(self) -> Path:
        """`<dir>/<name>`, where everything of the run lies."""
        return Path(self.dir) / self.name


@dataclass
class ModelConfig:
    """The frozen base model.

    Args:
        path: folder of a transformers model (config.json, tokenizer, safetensors), or a hub name
        dtype: dtype of weights and activations; masters and gradients are fp32 either way. fp16 scales the loss, and
            the accelerator must know it
        attention: attention implementation of transformers
        trust_remote_code: run Python code that comes with the model
    """

    path: str = ""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass
class AdapterConfig:
    """A mixture of low-rank experts on every chosen linear layer.

    Args:
        r: rank R of one expert
        lora_alpha: numerator of the scale `s = alpha / R`
        lora_dropout: dropout probability on the input of the experts (the router sees the input undropped)
        use_rslora: scale by `alpha / sqrt(R)` instead (Kalajdzievski 2023)
        target_modules: suffixes of module names, or `all-linear` (every linear layer but the output head): the layers
            with `num_experts` experts and a router
        lora_modules: suffixes of the names of other layers, which get one such expert and no router (plain LoRA, where
            the expert is `lora`)
        style: `per_linear` gives each of the target modules a router, `ffn_block` each feed-forward block one, which
            reads the block's input and serves all target modules in it (MixLoRA)
        num_experts: E, the experts of one layer
        top_k: K, the experts that a token uses, for routers that select a fixed number (softmax_topk, noisy_topk,
            sigmoid_bias, prompt); `null` means half of the experts
        gate_power: power of the gate in the gradients of the factors: 1 is the chain rule, 1/2 the rescaling of
            Sun et al.'s released code, 0 their theory. Other than 1, the optimizer does not see the gradient of the
            loss, and `grad_norm` is not its norm
        gate_power_scope: `factors` keeps the input's gradient exact for every `gate_power`; `factors_and_input`
            sends the rescaled gradient down to the input too, as Sun et al.'s released code does (parity checks only)
        expert: kind of expert: two factors (`lora`), two with a mixer between them (`moslora`), or two and the lengths
            of the weight's rows (`dora`)
        mixer_init: of expert `moslora`: how the mixer starts; `null` means `kaiming`
        router: kind of router: the `top_k` best experts (`softmax_topk`), all of them (`softmax`), the best after noise
            (`noisy_topk`), the fewest that reach `top_p` (`top_p`), those above a learned threshold (`threshold`), the
            best after a bias that balances them (`sigmoid_bias`), or the best for the whole prompt (`prompt`)
        top_p: of router `top_p`: probability that the chosen experts reach together; `null` means 0.8
        bias_rate: of router `sigmoid_bias`: how far a bias moves in a step; `null` means 0.001
        init: what the factors start from; `b` starts at 0 and `a` at random: uniform in +-1/sqrt(in-features)
            (`kaiming`), or normal with standard deviation 1/R (`gaussian`). With `svd` both start from singular vectors
            of the base weight, which is shifted to make up for it (PiSSA; with more than one expert GOAT's segments)
        seed: what the initial values derive from, together with layer name and expert; `run.seed` in a recipe
    """

    r: int = 4
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_modules: list[str] = field(default_factory=list)
    style: Literal["per_linear", "ffn_block"] = "per_linear"
    num_experts: int = 20
    top_k: int | None = None
    gate_power: float = 1.0
    gate_power_scope: Literal["factors", "factors_and_input"] = "factors"
    expert: ExpertName = "lora"
    mixer_init: MixerInit | None = None
    router: RouterName = "softmax_topk"
    top_p: float | None = None
    bias_rate: float | None = None
    init: InitName = "kaiming"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive("adapter", self, "r", "num_experts")
        settle_options(self)
        _require(
            0.0 <= self.lora_dropout < 1.0,
            "adapter.lora_dropout",
            self.lora_dropout,
            "at least 0 and below 1",
            "0 switches dropout off.",
        )
        _require(self.lora_alpha > 0, "adapter.lora_alpha", self.lora_alpha, "above 0", "Common values: R to 4 R.")
        _require(
            self.gate_power >= 0, "adapter.gate_power", self.gate_power, "0 or more", "Use 1 (chain rule), 0.5 or 0."
        )
        _require(
            self.init != "svd" or self.expert == "lora",
            "adapter.init",
            self.init,
            f"kaiming or gaussian with adapter.expert = {self.expert}",
            "Only experts of two factors and nothing else (lora) can start as a part of the base weight.",
        )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            self.target_modules = [self.target_modules]
        ok = self.target_modules == "all-linear" or (self.target_modules and all(self.target_modules))
        remedy = "Example: [q_proj, v_proj]."
        _require(bool(ok), "adapter.target_modules", self.target_modules, "a list of names or `all-linear`", remedy)
        one, more = self.num_experts == 1, "2 or more where "
        _require(not (one and self.lora_modules), "adapter.num_experts", 1, f"{more}adapter.lora_modules names layers",
                 "Name them in adapter.target_modules: with one expert all of these are plain LoRA.")  # fmt: skip
        _require(not (one and self.style == "ffn_block"), "adapter.num_experts", 1, f"{more}adapter.style is ffn_block",
                 "Drop adapter.style: one expert needs no router.")  # fmt: skip

    def plain(self) -> AdapterConfig:
        """The same with one expert and no router."""
        routing: dict[str, Any] = {"router": "softmax_topk", "top_k": 1, "top_p": None, "bias_rate": None}
        return replace(self, num_experts=1, style="per_linear", lora_modules=[], **routing)

    @property
    def num_used(self) -> int:
        """How many experts a token of a routed layer uses at most."""
        return self.top_k or self.num_experts

    @property
    def scale(self) -> float:
        """s = alpha / R, or alpha / sqrt(R) with rsLoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass
class OptimConfig:
    """Optimizer, learning rates and schedule.

    Args:
        name: base optimizer
        lr: learning rate of the `a` factors
        lr_router: learning rate of the routers; `null` means `lr`
        lr_b_ratio: learning rate of the `b` factors as a multiple of `lr` (LoRA+)
        betas, eps, bias_correction: of AdamW
        momentum: of SGD
        weight_decay: decoupled in AdamW; added to the gradient in SGD
        preconditioner: Riemannian preconditioner of the factors: `scaled` (Zhang & Pilanci 2024, per expert as in
            Sun et al. 2025) or `tangent` (Takeda et al.)
        damping: added to the diagonal of each Gram matrix, times its mean eigenvalue
        damping_abs: added to it as it is
        schedule: how the learning rate goes on after the warm-up
        warmup_steps: optimizer steps of linear warm-up from 0
        min_lr_ratio: where the schedule ends, as a share of the learning rate
        max_grad_norm: clips the global norm of the raw gradient; 0 switches clipping off
        max_grad_norm_router: clips the norm of the routers' gradient alone, after the above; `null` switches it off
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_router: float | None = 1e-4
    lr_b_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True
    momentum: float = 0.0
    weight_decay: float = 0.0
    preconditioner: Literal["none", "scaled", "tangent"] = "none"
    damping: float = 1e-2
    damping_abs: float = 1e-6
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_grad_norm_router: float | None = None

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0", "Common values: 1e-4 to 3e-3 for adamw.")
        not_negative = ("lr_b_ratio", "lr_router", "weight_decay", "damping", "damping_abs", "warmup_steps")
        for name in (*not_negative, "max_grad_norm", "max_grad_norm_router"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"optim.{name}", value, "0 or more", "Drop the minus sign.")
        for beta in self.betas:
            _require(0 <= beta < 1, "optim.betas", list(self.betas), "two numbers in [0, 1)", "Example: [0.9, 0.999].")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1", "Try 0.9.")
        _require(self.eps > 0, "optim.eps", self.eps, "above 0", "The usual value is 1e-8.")
        _require(
            0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "between 0 and 1", "Try 0.1 or 0."
        )


@dataclass
class LossesConfig:
    """Losses of routers and experts, added to that of the text; a weight of 0 switches one off.

    Args:
        balance: weight of the balance loss, `E sum_e f_e P_e`, the mean over layers: evens out how many tokens an
            expert gets (it is 1 where they are even)
        z: weight of the z loss, the mean square of the logits' logsumexp: keeps logits small
        contrastive: weight of InfoNCE over the outputs of a layer's experts: those of the same expert for other tokens
            of the sequence are positives, those of other experts negatives (Luo et al. 2024)
        contrastive_coactive: weight of the same for one token: outputs of its other selected experts are positives,
            those of the rest negatives (CoMoE, Feng et al. 2025)
        contrastive_temperature: by which both divide cosines (0.07 is MoCo's, our choice: CoMoE prints none)
        contrastive_tokens: N, tokens drawn from each row for both; time and memory of `contrastive` grow with (N K)^2
    """

    balance: float = 0.0
    z: float = 0.0
    contrastive: float = 0.0
    contrastive_coactive: float = 0.0
    contrastive_temperature: float = 0.07
    contrastive_tokens: int = 16

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            usual = 0.001 if name == "z" else 0.01
            _require(weight >= 0, f"losses.{name}", weight, "0 or more", f"0 switches it off, {usual} is common.")
        tau = self.contrastive_temperature
        _require(tau > 0, "losses.contrastive_temperature", tau, "above 0", "The default is 0.07.")
        tokens = self.contrastive_tokens
        _require(tokens >= 2, "losses.contrastive_tokens", tokens, "2 or more", "The default is 16.")

    @property
    def weights(self) -> dict[str, float]:
        """Of every loss by its name."""
        names = ("balance", "z", "contrastive", "contrastive_coactive")
        return {name: getattr(self, name) for name in names}


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
        _require_positive("parallel", self, "ep_size")


@dataclass
class DataSource:
    """One set of rows; see docs/data.md for files and formats.

    Args:
        path: JSON, JSONL, CSV or Parquet file, folder written by `save_to_disk`, or name of a dataset on the hub
        weight: share of the training samples that come from here, relative to the other sets' weights; `null` for
            all sets joins them, each row once an epoch
        format: how a conversation is written in columns; `auto` finds out from the columns of the first row
        fields: where the format's columns have other names in the file, e.g. `{instruction: question}`
        split: part of a saved folder or hub dataset that has several
        subset: configuration of a hub dataset that has several
    """

    path: str = ""
    weight: float | None = None
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "multiple_choice", "text"] = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None


@dataclass
class DataConfig:
    """What is learned from.

    Args:
        train: training sets, joined or mixed by their weights
        eval: held-out sets, joined
        max_length: tokens of a sample; what is longer is cut at the end
        on_bad_row: `error` stops at the first wrong row, `skip` leaves wrong rows out and reports how many
        num_proc: processes that tokenise; `null` for as many as there are cores and rows for
        packing: let training samples share rows of `max_length` tokens, without seeing each other
        streaming: read and tokenise the training sets while they are learned from: nothing is kept or cached, and
            rows are shuffled within blocks alone
        shuffle_buffer: with `streaming`: rows of a block; `null` means 10,000, and 1 keeps the sets' own order
    """

    train: list[DataSource] = field(default_factory=list)
    eval: list[DataSource] = field(default_factory=list)
    max_length: int = 512
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int | None = None
    packing: bool = False
    streaming: bool = False
    shuffle_buffer: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "data.max_length", self.max_length, "2 or more", "Common values: 512 to 4096.")
        ok = self.num_proc is None or self.num_proc >= 1
        _require(ok, "data.num_proc", self.num_proc, "1 or more, or null", "null chooses by cores and rows.")
        self._check_streaming()
        self._check_weights()

    @property
    def block_size(self) -> int:
        """Rows of a streamed set that are shuffled with each other."""
        return 10_000 if self.shuffle_buffer is None else self.shuffle_buffer

    def _check_streaming(self) -> None:
        size = self.shuffle_buffer
        _require(size is None or size >= 1, "data.shuffle_buffer", size, "1 or more, or null", "null means 10,000.")
        if not self.streaming:
            remedy = "Drop it, or set data.streaming to true."
            _require(size is None, "data.shuffle_buffer", size, "null without data.streaming", remedy)
            return
        reason = "false with data.streaming, which cannot know beforehand which samples fit together"
        _require(not self.packing, "data.packing", self.packing, reason, "Set one of the two to false.")
        reason = "null with data.streaming, where every rank tokenises its own rows"
        _require(self.num_proc is None, "data.num_proc", self.num_proc, reason, "Drop it.")

    def _check_weights(self) -> None:
        weights = [source.weight for source in self.train]
        for place, weight in enumerate(weights):
            key = f"data.train[{place}].weight"
            ok = weight is None or 0 < weight < math.inf
            _require(ok, key, weight, "above 0", "Take the set out if it is to have no part.")
            ok = (weight is None) == (weights[0] is None)
            _require(ok, key, weight, "given for all sets or for none", "Shares are relative, e.g. 3 and 1.")
        for place, source in enumerate(self.eval):
            key = f"data.eval[{place}].weight"
            _require(source.weight is None, key, source.weight, "left out: every held-out row counts once", "Drop it.")


@dataclass
class TrainConfig:
    """The loop.

    Args:
        max_steps: optimizer steps
        batch_size: sequences of all ranks per optimizer step; with `data.packing` rows of `data.max_length` tokens
        micro_batch_size: sequences (rows) of one rank per forward; accumulation follows from both
        eval_every: optimizer steps between evaluations, 0 for none (where `data.eval` is given, the first
            evaluation is before step 1 and the last after the final step)
        save_every: optimizer steps between checkpoints, 0 for none but the last
        keep_checkpoints: how many of the newest checkpoints stay
        health_every: optimizer steps between looks at how experts are used, 0 for none
        dead_after: optimizer steps without a token after which an expert counts as dead
        activation_checkpointing: recompute activations in the backward pass
        num_samples: held-out prompts that are answered before and after training
        sample_max_new_tokens: tokens of such an answer at most
        hang_timeout_s: seconds without any progress (a forward pass, a part of a file) after which every rank prints
            its stacks and the job ends
        report_to: where the metrics go besides `metrics.jsonl`: any of `tensorboard`, `wandb`, `trackio`, or `none`
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
    num_samples: int = 0
    sample_max_new_tokens: int = 64
    hang_timeout_s: float = 1800.0
    report_to: list[str] | str = field(default_factory=lambda: ["tensorboard"])
    project: str = "dsmoelora"

    def __post_init__(self) -> None:
        _require_positive(
            "train",
            self,
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "keep_checkpoints",
            "dead_after",
            "sample_max_new_tokens",
            "hang_timeout_s",
        )
        for name in ("eval_every", "save_every", "num_samples", "health_every"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}", value, "0 or more", f"0 switches train.{name} off.")
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to == "none" else [self.report_to]
        for tracker in self.report_to:
            known = f"a list of some of {', '.join(TRACKERS)}, or none"
            _require(tracker in TRACKERS, "train.report_to", tracker, known, "Example: [tensorboard, wandb].")
        _require(bool(self.project), "train.project", self.project, "a name", "The default is dsmoelora.")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank per optimizer step.

        Raises:
            ConfigError: `batch_size` is no multiple of `micro_batch_size * world_size`
        """
        per_forward = self.micro_batch_size * world_size
        _require(
            self.batch_size % per_forward == 0,
            "train.batch_size",
            self.batch_size,
            f"a multiple of train.micro_batch_size x ranks = {self.micro_batch_size} x {world_size} = {per_forward}",
            f"Nearest: {max(1, round(self.batch_size / per_forward)) * per_forward}.",
        )
        return self.batch_size // per_forward


@dataclass
class Recipe:
    """Everything that defines a run; see the sections' classes."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        self.adapter.seed = self.run.seed
        self._check_finite()
        num_experts, ep_size = self.adapter.num_experts, self.parallel.ep_size
        divisors = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        _require(
            ep_size in divisors,
            "parallel.ep_size",
            ep_size,
            f"a divisor of adapter.num_experts = {num_experts}",
            f"Possible are {', '.join(map(str, divisors))}.",
        )
        _require(
            self.optim.max_grad_norm_router is None or self.adapter.num_experts > 1,
            "optim.max_grad_norm_router",
            self.optim.max_grad_norm_router,
            "null where adapter.num_experts is 1, for there are no routers",
            "Drop it.",
        )
        _require(
            self.adapter.router != "prompt" or not self.data.packing,
            "data.packing",
            self.data.packing,
            "false with adapter.router `prompt`, which decides once for a whole row",
            "Set data.packing to false, or take another router.",
        )
        check_losses(self.adapter, self.losses.weights)

    def _check_finite(self) -> None:
        for section, values in asdict(self).items():
            for name, value in values.items():
                ok = not isinstance(value, float) or math.isfinite(value)
                _require(ok, f"{section}.{name}", value, "a finite number", "Take the default, or a number near it.")

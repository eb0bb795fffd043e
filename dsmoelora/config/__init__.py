"""The recipe: every setting of a run, its type, its default and its limits, in one place.

A recipe is one YAML file with the sections of `Recipe`; any key can be overridden on the command line
(`--optim.lr 3e-4`). The dataclasses check what can be checked without looking at the disk or the model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from dsmoelora.config.adapter import AdapterConfig, InitName, LossesConfig, SpreadName
from dsmoelora.config.adapter_options import check_losses
from dsmoelora.config.checks import require
from dsmoelora.config.data import DataConfig, DataSource
from dsmoelora.config.dtype import DTYPES
from dsmoelora.config.freeze import check_losses_of_frozen, check_optim_of_frozen
from dsmoelora.config.optim import OptimConfig
from dsmoelora.config.run import TRACKERS, CompileChoice, ModelConfig, ParallelConfig, RunConfig, TrainConfig

__all__ = [
    "DTYPES",
    "TRACKERS",
    "AdapterConfig",
    "CompileChoice",
    "DataConfig",
    "DataSource",
    "InitName",
    "LossesConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Recipe",
    "RunConfig",
    "SpreadName",
    "TrainConfig",
]


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
        require(
            ep_size in divisors,
            "parallel.ep_size",
            ep_size,
            f"a divisor of adapter.num_experts = {num_experts}",
            f"Possible are {', '.join(map(str, divisors))}.",
        )
        require(
            ep_size == 1 or not self.adapter.shared_experts,
            "parallel.ep_size",
            ep_size,
            "1 with adapter.shared_experts: every token would travel to the rank that has them",
            "Drop it, or the shared experts.",
        )
        require(
            ep_size == 1 or self.adapter.style != "decoder_layer",
            "parallel.ep_size",
            ep_size,
            "1 with adapter.style = decoder_layer: a layer has one expert, which lies on all ranks",
            "Drop it, or adapter.style.",
        )
        require(
            self.optim.max_grad_norm_router is None or self.adapter.num_experts > 1,
            "optim.max_grad_norm_router",
            self.optim.max_grad_norm_router,
            "null where adapter.num_experts is 1, for there are no routers",
            "Drop it.",
        )
        require(
            self.adapter.router != "prompt" or not self.data.packing,
            "data.packing",
            self.data.packing,
            "false with adapter.router `prompt`, which decides once for a whole row",
            "Set data.packing to false, or take another router.",
        )
        require(
            not self.adapter.top_k_warmup or self.adapter.top_k_warmup < self.train.max_steps,
            "adapter.top_k_warmup",
            self.adapter.top_k_warmup,
            f"below train.max_steps = {self.train.max_steps}, for the adapter is used with adapter.top_k",
            "A tenth to a third of the steps is a beginning.",
        )
        if self.model.quantize != "none":
            self.adapter.check_packed_base(f"model.quantize = {self.model.quantize}")
        require(
            self.adapter.init != "loftq" or self.model.quantize != "none",
            "adapter.init",
            self.adapter.init,
            "another one where model.quantize is none: experts would start from what 4 bits lose, and nothing is lost",
            "Set model.quantize to nf4, or take another start.",
        )
        self._check_noise()
        check_losses(self.adapter, self.losses.weights)
        self._check_given()
        check_losses_of_frozen(self.adapter, self.losses.weights)
        check_optim_of_frozen(self.adapter, self.optim)

    def _check_given(self) -> None:
        """What only experts that exist make possible."""
        adapter, given = self.adapter, bool(self.adapter.experts_from)
        why = "another one where adapter.experts_from is empty, for it goes by what experts have learned"
        require(given or adapter.router != "arrow", "adapter.router", adapter.router, why, "Name adapters there.")
        needs_no_training = given and (adapter.router in ("arrow", "constant") or adapter.num_experts == 1)
        require(
            self.train.max_steps > 0 or needs_no_training,
            "train.max_steps",
            self.train.max_steps,
            "1 or more, or 0 where adapter.experts_from is given and adapter.router is arrow or constant",
            "Without training the experts or their routers would be random numbers.",
        )

    def _check_noise(self) -> None:
        """Noise needs weights whose numbers mean something, and experts that do not read them."""
        sigma, kept, expert = self.optim.flat_noise, self.model.quantize, self.adapter.expert
        allowed = "0 with model.quantize nf4, for a weight in 4 bits has no room for noise"
        require(not sigma or kept == "none", "optim.flat_noise", sigma, allowed, "Take one of the two.")
        allowed = "0 with adapter.expert dora, whose lengths of rows would be measured with the noise"
        require(not sigma or expert != "dora", "optim.flat_noise", sigma, allowed, "Take expert lora or moslora.")

    def _check_finite(self) -> None:
        for section, values in asdict(self).items():
            for name, value in values.items():
                ok = not isinstance(value, float) or math.isfinite(value)
                require(ok, f"{section}.{name}", value, "a finite number", "Take the default, or a number near it.")

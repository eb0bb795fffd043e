"""The section `optim`: optimizer, preconditioner, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsmoelora.config.checks import require, require_unset


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
        flat_noise: sigma of the noise in the frozen weights under the experts, while gradients are taken (Flat-LoRA, Li
            et al. 2024, whose code has 0.05); it grows from 0 along a cosine. 0 switches it off
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
    flat_noise: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0", "Common values: 1e-4 to 3e-3 for adamw.")
        not_negative = ("lr_b_ratio", "lr_router", "weight_decay", "damping", "damping_abs", "warmup_steps")
        for name in (*not_negative, "max_grad_norm", "max_grad_norm_router", "flat_noise"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name}", value, "0 or more", "Drop the minus sign.")
        for beta in self.betas:
            require(0 <= beta < 1, "optim.betas", list(self.betas), "two numbers in [0, 1)", "Example: [0.9, 0.999].")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1", "Try 0.9.")
        require(self.eps > 0, "optim.eps", self.eps, "above 0", "The usual value is 1e-8.")
        require(
            0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "between 0 and 1", "Try 0.1 or 0."
        )
        of_others = ("momentum",) if self.name == "adamw" else ("betas", "eps", "bias_correction")
        require_unset("optim", self, f"with optim.name = {self.name}", *of_others)
        if self.preconditioner == "none":
            require_unset("optim", self, "with optim.preconditioner = none", "damping", "damping_abs")
        if self.schedule == "constant":
            require_unset("optim", self, "with optim.schedule = constant", "min_lr_ratio")

"""What is compared: an arm is a way to train, whatever its learning rate and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsmoelora.config import AdapterConfig, LossesConfig, OptimConfig

# Factors of 2, for every arm of the same base optimizer the same.
ADAMW_RATES = tuple(2.0**power * 1e-3 for power in range(4))
SGD_RATES = tuple(2.0**power for power in range(-6, 4))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_WARMUP_SHARE = 12  # one step of so many


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        name: in tables and folders
        adapter, optim, losses: what it sets in these sections of a recipe beside what all arms have; routers learn at
            the experts' rate unless it says `lr_router`
        one_first: one expert learns alone in the first quarter of the steps, then all start as copies of it
        why: what it is there for
    """

    name: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] = field(default_factory=dict)
    one_first: bool = False
    why: str = ""

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that are tried first."""
        return SGD_RATES if self.optim.get("name") == "sgd" else ADAMW_RATES

    def adapter_config(self, seed: int) -> AdapterConfig:
        """Eight experts of rank 4, two for a token, unless it says otherwise."""
        sizes = {"r": 4, "num_experts": 8, "top_k": 2, "lora_alpha": 16, "target_modules": TARGETS}
        config = AdapterConfig(**sizes | dict(self.adapter))
        config.seed = seed
        return config

    def optim_config(self, lr: float, num_steps: int) -> OptimConfig:
        """A short warm-up, linear decay, clipping at 1."""
        own = {"lr": lr, "lr_router": None, "warmup_steps": max(1, num_steps // _WARMUP_SHARE), "max_grad_norm": 1.0}
        return OptimConfig(**own | dict(self.optim))

    @property
    def losses_config(self) -> LossesConfig:
        """None, unless it says otherwise."""
        return LossesConfig(**self.losses)

    def settings(self) -> dict[str, Any]:
        """What its cells are remembered by; JSON-able."""
        return {
            "adapter": asdict(self.adapter_config(0)),
            "optim": asdict(self.optim_config(1.0, _WARMUP_SHARE)),
            "losses": asdict(self.losses_config),
            "one_first": self.one_first,
        }


def _lora(rank: int) -> dict[str, Any]:
    return {"num_experts": 1, "top_k": 1, "r": rank, "lora_alpha": 4 * rank}


def _experts(num_experts: int, top_k: int) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k}


_SGD = {"name": "sgd"}
_SHORT = {"betas": [0.7, 0.8]}
_ALL = [
    Arm("experts", why="E=8 R=4 K=2"),
    Arm("lora", _lora(32), why="plain LoRA with as many trained numbers"),
    Arm("lora-active", _lora(8), why="plain LoRA with as many numbers as a token uses"),
    Arm("lora-12", _lora(12), why="plain LoRA of rank 12: what a token uses with a shared expert"),
    Arm("gradient", {"init": "gradient"}, why="directions of the gradient, dealt out among experts"),
    Arm("gradient-per-expert", {"init": "gradient", "init_spread": "per_expert"}, why="... each expert by itself"),
    Arm("lora-gradient", _lora(32) | {"init": "gradient"}, why="plain LoRA from directions of the gradient"),
    Arm("one-first", one_first=True, why="one expert alone for a quarter of the steps, then all as its copies"),
    Arm("shared", {"shared_experts": 1}, why="one more expert for every token"),
    Arm("shared-of-8", {"num_experts": 7, "shared_experts": 1}, why="one of the eight for every token"),
    Arm("slow-routers", optim={"lr_router": 1e-4}, why="routers at 1e-4, as in Sun et al."),
    Arm("falling-k", {"top_k_warmup": 20}, why="K falls from 8 to 2 over 20 steps"),
    Arm("balance", losses={"balance": 0.01}, why="a balance loss of 0.01"),
    Arm("sigmoid-bias", {"router": "sigmoid_bias"}, why="selection biases that balance"),
    Arm("svd", {"init": "svd"}, why="segments of the weight's singular values, as in GOAT"),
    Arm("lora-svd", _lora(32) | {"init": "svd"}, why="the largest singular values, as in PiSSA"),
    Arm("dense", {"router": "softmax", "top_k": None}, why="every token uses all experts"),
    Arm("experts-4-1", _experts(4, 1) | {"r": 8}, why="E=4 R=8 K=1"),
    Arm("experts-4-2", _experts(4, 2) | {"r": 8}, why="E=4 R=8 K=2"),
    Arm("experts-8-1", _experts(8, 1), why="E=8 R=4 K=1"),
    Arm("experts-8-4", _experts(8, 4), why="E=8 R=4 K=4"),
    Arm("experts-20-2", _experts(20, 2), why="E=20 R=4 K=2"),
    Arm("experts-20-10", _experts(20, 10), why="E=20 R=4 K=10"),
    Arm("slow-20-10", _experts(20, 10), {"lr_router": 1e-4}, why="... with routers at 1e-4"),
    Arm("gradient-20-10", _experts(20, 10) | {"init": "gradient"}, why="... with directions of the gradient"),
    Arm("short-20-10", _experts(20, 10), _SHORT, why="... with betas 0.7, 0.8"),
    Arm("lora-80", _lora(80), why="plain LoRA with as many trained numbers as E=20 R=4"),
    Arm("short-betas", optim=_SHORT, why="betas 0.7, 0.8"),
    Arm("lora-short-betas", _lora(32), _SHORT, why="plain LoRA with betas 0.7, 0.8"),
    Arm("betas-0.99", optim={"betas": [0.9, 0.99]}, why="betas 0.9, 0.99"),
    Arm("lora-betas-0.99", _lora(32), {"betas": [0.9, 0.99]}, why="plain LoRA with betas 0.9, 0.99"),
    Arm("lora-plus", optim={"lr_b_ratio": 16.0}, why="LoRA+: `b` at 16 times the rate of `a`"),
    Arm("scaled", optim={"preconditioner": "scaled"}, why="Riemannian, scaled"),
    Arm("tangent", optim={"preconditioner": "tangent"}, why="Riemannian, tangent"),
    *(
        Arm(f"{rule}-0.01", optim={"preconditioner": rule, "damping_abs": 1e-2}, why=f"... {rule}, damping_abs 0.01")
        for rule in ("scaled", "tangent")
    ),
    Arm("scaled-half", {"gate_power": 0.5}, {"preconditioner": "scaled"}, why="... scaled, gate_power 1/2"),
    Arm("short-scaled", optim=_SHORT | {"preconditioner": "scaled"}, why="scaled, betas 0.7, 0.8"),
    Arm("short-tangent", optim=_SHORT | {"preconditioner": "tangent"}, why="tangent, betas 0.7, 0.8"),
    Arm("sgd", optim=_SGD, why="plain SGD"),
    *(
        Arm(
            f"sgd-{rule}-{size:g}",
            optim=_SGD | {"preconditioner": rule, "damping_abs": size},
            why=f"... {rule}, damping_abs {size:g}",
        )
        for rule in ("scaled", "tangent")
        for size in (1e-6, 1e-4, 1e-2, 1.0)
    ),
]
ARMS = {arm.name: arm for arm in _ALL}

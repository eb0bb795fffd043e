"""Recipes for runs whose experts may be partitioned, and what one device makes of them in plain torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dsmoelora.config import ParallelConfig, Recipe
from tests.plain_training import Training, make_recipe, preconditioned, train_plainly

NUM_EXPERTS, RANK = 12, 3  # divides by every number of ranks from 1 to 4
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]  # the first three read one input
MAX_STEPS = 5
ADAMW = {"name": "adamw", "lr": 3e-3, "lr_router": 1e-3, "lr_b_ratio": 2.0, "weight_decay": 0.1, "max_grad_norm": 0.5}
SGD = {"name": "sgd", "lr": 0.1, "lr_router": 0.03, "momentum": 0.9, "max_grad_norm": 0.0}
DAMPED = {"damping": 0.1, "damping_abs": 1e-3}
DROPOUT = {"adamw-none": 0.1, "adamw-tangent": 0.1, "sgd-scaled": 0.1}
# With these no token of a run comes within 1e-4 of the border between two experts, where rounding would choose.
SEEDS = {"adamw-none": 16, "adamw-scaled": 6, "adamw-tangent": 5, "sgd-none": 7, "sgd-scaled": 7, "sgd-tangent": 5}


def recipe_of(base: Path, method: str, **changes: Any) -> Recipe:
    """The recipe of a method: base optimizer and preconditioner with a hyphen between."""
    name, preconditioner = method.split("-")
    optim: dict[str, Any] = {"adamw": ADAMW, "sgd": SGD}[name] | {"preconditioner": preconditioner}
    if preconditioner != "none":
        optim |= DAMPED
    adapter = {
        "r": RANK,
        "num_experts": NUM_EXPERTS,
        "top_k": 4,
        "target_modules": TARGETS,
        "lora_dropout": DROPOUT.get(method, 0.0),
    }
    settings = {"max_steps": MAX_STEPS, "seed": SEEDS[method]} | changes
    return make_recipe(base, adapter=adapter, optim=optim, **settings)


def on_one_device(recipe: Recipe) -> tuple[Training, list[float]]:
    """The training in plain torch, and the norm of the gradient that the base optimizer saw at each step."""
    norms: list[float] = []
    with nullcontext() if recipe.optim.preconditioner == "none" else preconditioned(recipe.optim, norms):
        return train_plainly(recipe), norms


def partitioned(recipe: Recipe, ep_size: int, exchange: Literal["auto", "gather", "all_to_all"] = "auto") -> Recipe:
    """The same run with its experts partitioned."""
    return replace(recipe, parallel=ParallelConfig(ep_size, exchange))

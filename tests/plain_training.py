"""Training as anyone would write it in plain torch, on one process, with the whole global batch in one forward pass.

The distributed tests compare the engine with this. Batches are random tokens that depend on the step alone; the dealing
out over ranks and micro-batches is written here as well, so that nothing of the data package is relied on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.adapters.routers import routers
from dsmoelora.config import ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from dsmoelora.data import MicroBatch
from dsmoelora.optim.reference import precondition
from tests.helpers import tiny_llama
from tests.plain_contrastive import PlainContrastive
from tests.plain_gradient_start import start_plainly
from tests.plain_router_losses import PlainRouterLosses

ROLES = ("experts.a.", "experts.b.", "experts.m.", "experts.magnitude.", "router.")
NUM_STEPS = 20
BATCH_SIZE = 48  # divides by 1, 2, 3 and 4 ranks times 1, 2 and 4 micro-batches
LENGTH = 6
NUM_BATCHES = 2  # after which the tokens come again: with few of them it is easy to have none between two experts


def make_base(folder: Path, **overrides: Any) -> Path:
    """A Llama with odd sizes, so that 3 or 4 ranks cut parameters inside of rows.

    Its norms are larger than usual, which puts the routers' logits further apart. (Still larger ones make the training
    so sensitive that rounding alone moves the losses.)
    """
    sizes: dict[str, Any] = {"hidden_size": 34, "intermediate_size": 50, "num_attention_heads": 2, "head_dim": 16}
    tiny_llama(folder, num_hidden_layers=1, num_key_value_heads=1, initializer_range=0.1, **sizes | overrides)
    tensors = load_file(folder / "model.safetensors")
    larger = {name: 2 * tensor for name, tensor in tensors.items() if name.endswith("layernorm.weight")}
    save_file(tensors | larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ADAMW = {"name": "adamw", "lr": 3e-3, "lr_router": 1e-3, "lr_b_ratio": 2.0, "weight_decay": 0.1, "max_grad_norm": 0.5}
SGD = {"name": "sgd", "lr": 0.1, "lr_router": 0.03, "momentum": 0.9, "weight_decay": 1e-3, "max_grad_norm": 0.0}
# The seeds put no token of these runs within 1e-4 of the border between two experts, where rounding would choose.
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"adapter": {"lora_dropout": 0.1}, "optim": ADAMW, "seed": 7},
    "adamw-short": {"adapter": {"lora_dropout": 0.1}, "optim": ADAMW, "seed": 20, "max_steps": 8},
    "sgd": {"adapter": {}, "optim": SGD, "seed": 119},
    "all-experts": {  # K = E: no border at all
        "adapter": {"num_experts": 3, "top_k": 3, "lora_dropout": 0.2},
        "optim": SGD | {"lr_router": None, "momentum": 0.0, "lr": 0.3, "max_grad_norm": 0.7},
    },
    "one-expert": {"adapter": {"num_experts": 1, "top_k": 1}, "optim": ADAMW},
}


def make_recipe(
    base: Path, *, adapter: dict[str, Any], optim: dict[str, Any], max_steps: int = NUM_STEPS, seed: int = 0
) -> Recipe:
    """A recipe in fp32 with experts on three layers of other shapes; batch sizes are those of one rank."""
    adapter = {"r": 3, "num_experts": 5, "top_k": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], **adapter}
    optim = {"warmup_steps": 3, "min_lr_ratio": 0.1, "schedule": "linear", **optim}
    return Recipe(
        run=RunConfig(seed=seed),
        model=ModelConfig(path=str(base), dtype="fp32"),
        adapter=AdapterConfig(**adapter),
        optim=OptimConfig(**optim),
        train=TrainConfig(max_steps=max_steps, batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE),
    )


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels (48, 6) of a step: uneven lengths, some rows of which nothing is learned."""
    generator = torch.Generator().manual_seed(step % NUM_BATCHES)
    ids_BS = torch.randint(4, 44, (BATCH_SIZE, LENGTH), generator=generator)
    lengths_B = torch.randint(2, LENGTH + 1, (BATCH_SIZE,), generator=generator)
    mask_BS = (torch.arange(LENGTH) < lengths_B[:, None]).long()
    learned_BS = (torch.rand(BATCH_SIZE, LENGTH, generator=generator) < 0.5) & mask_BS.bool()
    learned_BS[6:9] = False  # a whole micro-batch without a target, where there are many
    return ids_BS * mask_BS, mask_BS, torch.where(learned_BS, ids_BS, -100)


def micro_batches(step: int, rank: int, world_size: int, accumulation: int) -> list[MicroBatch]:
    """A rank's part of a global batch, cut into micro-batches of equally many rows."""
    size = BATCH_SIZE // (world_size * accumulation)
    places = [number * world_size + rank for number in range(accumulation)]
    return [micro_batch(step, slice(place * size, (place + 1) * size)) for place in places]


def micro_batch(step: int, rows: slice) -> MicroBatch:
    """Some rows of a global batch, cut to the longest of them."""
    ids_BS, mask_BS, labels_BS = global_batch(step)
    longest = int(mask_BS[rows].sum(-1).max())
    ids, mask, labels = (tensor[rows, :longest] for tensor in (ids_BS, mask_BS, labels_BS))
    sequence_ids_B = step * BATCH_SIZE + torch.arange(BATCH_SIZE)
    num_supervised, num_tokens = int((labels_BS[:, 1:] != -100).sum()), int(mask_BS.sum())
    return MicroBatch(ids, mask, labels, sequence_ids_B[rows], num_supervised, num_tokens)


@dataclass
class Training:
    """What a training came to.

    Args:
        losses, grad_norms, lrs: of every step (norms of the raw gradient)
        final_loss: mean over the tokens of the first global batch, after the last step, without dropout
        weights: trainable tensors by name
        smallest_gap: between the logits of the last chosen expert and the next, over all tokens of the run
        router_losses: of every step, where the recipe has them: balance and z, or else the contrastive ones
    """

    losses: list[float]
    grad_norms: list[float]
    lrs: list[float]
    final_loss: float
    weights: dict[str, Tensor]
    smallest_gap: float
    router_losses: list[dict[str, float]] = field(default_factory=list)


def train_plainly(
    recipe: Recipe, dtype: torch.dtype = torch.float32, start: Callable[[Any], object] = lambda _: None
) -> Training:
    """Follow a recipe in plain torch: one process, one forward pass a step, torch's optimizers and clipping.

    Args:
        recipe: of the training
        dtype: of the model
        start: what else is done to the adapted model first
    """
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype)
    inject(model, recipe.adapter)
    start(model)
    if recipe.adapter.init == "gradient":
        more = _more_experts(0, recipe.adapter)
        start_plainly(model, recipe.adapter, lambda: mean_loss(model.train(), 0, recipe.run.seed, more))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = _torch_optimizer(trainable, recipe.optim)
    gaps = _watch_gaps(model, recipe.adapter.top_k or recipe.adapter.num_experts)
    router_losses, contrastive = PlainRouterLosses(model), PlainContrastive(model)
    losses, grad_norms, lrs = [], [], []
    for step in range(recipe.train.max_steps):
        share = _share_of_lr(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = share * group["full_lr"]
        optimizer.zero_grad()
        loss = mean_loss(model.train(), step, recipe.run.seed, _more_experts(step, recipe.adapter))
        mask_BS, keys_BS = global_batch(step)[1], adapter_context(model).tokens.keys_BS
        of_routers = router_losses.of_step(mask_BS, recipe.losses)
        (loss + of_routers + contrastive.of_step(keys_BS, mask_BS, recipe.losses)).backward()
        max_norm = recipe.optim.max_grad_norm or torch.inf
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), max_norm)))
        optimizer.step()
        router_losses.move_biases(model, global_batch(step)[1])
        losses.append(loss.item())
        lrs.append(share * recipe.optim.lr)
    with torch.no_grad():
        final_loss = mean_loss(model.eval(), 0, recipe.run.seed).item()
    weights = {name: parameter.detach() for name, parameter in trainable.items()}
    values = router_losses.values or contrastive.values
    return Training(losses, grad_norms, lrs, final_loss, weights, min(gaps, default=torch.inf), values)


@contextmanager
def preconditioned(config: OptimConfig, norms: list[float]) -> Iterator[None]:
    """Inside the block torch's optimizers see the gradients that the single-device reference makes.

    The optimizer of `train_plainly` has a param group for each of `ROLES`, in the order of the layers.
    """

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        factors_a, factors_b, mixers, magnitudes, routers = (group["params"] for group in optimizer.param_groups)
        if config.max_grad_norm_router:
            torch.nn.utils.clip_grad_norm_(routers, config.max_grad_norm_router)
        for factors in zip(factors_a, factors_b, mixers or len(factors_a) * [None], strict=True):
            values = [None if each is None else each.detach() for each in factors]
            grads = [None if each is None else each.grad for each in factors]
            a, b, m = zip(values, grads, strict=True)
            new_grads = precondition(config, a[0], b[0], a[1], b[1], *m)
            for each, grad in zip(factors, new_grads, strict=True):
                if each is not None:
                    each.grad = grad
        everything = (*factors_a, *factors_b, *mixers, *magnitudes, *routers)
        norms.append(torch.stack([p.grad.norm() for p in everything]).norm().item())

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        hook.remove()


def _share_of_lr(step: int, recipe: Recipe) -> float:
    warmup, end = recipe.optim.warmup_steps, recipe.optim.min_lr_ratio
    if step < warmup:
        return step / warmup
    return 1 - (1 - end) * (step - warmup) / (recipe.train.max_steps - warmup)


def _torch_optimizer(trainable: dict[str, torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    lr_router = config.lr if config.lr_router is None else config.lr_router
    lrs = (config.lr, config.lr * config.lr_b_ratio, config.lr, config.lr, lr_router)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable.items() if f".{role}" in f"{name}."], "lr": lr, "full_lr": lr}
        for role, lr in zip(ROLES, lrs, strict=True)
    ]
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def _more_experts(step: int, config: AdapterConfig) -> int:
    """Than K, on the line from E at step 0 to K at step `top_k_warmup`, rounded up."""
    if not config.top_k_warmup:
        return 0
    assert config.top_k is not None
    left = max(Fraction(0), 1 - Fraction(step, config.top_k_warmup))
    return math.ceil(left * (config.num_experts - config.top_k))


def mean_loss(model: Any, step: int, seed: int, more_experts: int = 0) -> Tensor:
    """Of an adapted model on a global batch, with the dropout that belongs to its tokens."""
    ids_BS, mask_BS, labels_BS = global_batch(step)
    sequence_ids_B = step * BATCH_SIZE + torch.arange(BATCH_SIZE)
    context = adapter_context(model)
    before_first_label_BS = (labels_BS != -100).cumsum(-1) == 0
    before_first_label_BS[:, 0] = True
    prompt_BS = before_first_label_BS & mask_BS.bool()
    keys_BS = token_keys(seed, sequence_ids_B, mask_BS)
    context.tokens = BatchTokens(keys_BS, prompt_BS=prompt_BS, more_experts=more_experts)
    log_probs_BSV = model(ids_BS, attention_mask=mask_BS).logits[:, :-1].log_softmax(-1)
    targets_BS = labels_BS[:, 1:]
    chosen_BS = log_probs_BSV.gather(-1, targets_BS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -chosen_BS[targets_BS != -100].mean()


def _watch_gaps(model: Any, top_k: int) -> list[float]:
    """A list that gets the smallest gap between the K-th and the next logit of every call of every router."""
    gaps: list[float] = []

    masks: list[Tensor] = []

    def look(router: Any, inputs: tuple[Tensor]) -> None:
        real_T = masks[-1].flatten().bool()
        with torch.no_grad():
            logits_TE = (inputs[0] @ router.weight.T)[real_T].sort(-1, descending=True).values
        gaps.append((logits_TE[:, top_k - 1] - logits_TE[:, top_k]).min().item())

    def remember_mask(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    model.register_forward_pre_hook(remember_mask, with_kwargs=True)
    for _, router in routers(model):
        if router.shapes["weight"][0] > top_k:
            router.register_forward_pre_hook(look)
            adapter_context(model).hooked = True
    return gaps

"""The optimizer over shards against torch's own optimizers, and the learning rate against its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import Factor
from dsmoelora.optim import (
    OptimConfig,
    Segment,
    Shard,
    ShardGroup,
    ShardOptimizer,
    build_optimizer,
    build_schedule,
    trainables,
)
from tests.helpers import tiny_llama

NUM_STEPS = 20
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 3e-3, "betas": (0.7, 0.9), "eps": 1e-6},
    "adamw-decay": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "lr_router": 1e-4, "lr_b_ratio": 4.0},
    "sgd": {"name": "sgd", "lr": 0.3, "lr_router": None},
    "sgd-momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "lr_b_ratio": 0.5},
    "router-frozen": {"name": "sgd", "lr": 0.1, "lr_router": 0.0},
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=34, num_attention_heads=2, head_dim=16)


def make_model(base_path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base_path)
    inject(model, AdapterConfig(r=3, num_experts=5, top_k=2, target_modules=["q_proj", "down_proj"]))
    return model


def set_gradients(model: Any, step: int) -> None:
    """Those of the language model loss on this step's random tokens."""
    ids_BS = torch.randint(4, 260, (3, 12), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(ids_BS, labels=ids_BS).loss.backward()


def torch_optimizer(model: Any, config: OptimConfig) -> torch.optim.Optimizer:
    """torch's own optimizer, a param group for each learning rate."""
    rates = {"experts.a": config.lr, "experts.b": config.lr * config.lr_b_ratio, "router.weight": config.lr_router}
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and name.endswith(end)],
            "lr": config.lr if rate is None else rate,
            "weight_decay": config.weight_decay,
        }
        for end, rate in rates.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {trainable.name: parameter.detach() for trainable, parameter in trainables(model)}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name} differs by {error:.1e} of its largest value"


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_twenty_steps_equal_those_of_torch(base_path: Path, settings: dict[str, Any]) -> None:
    config = OptimConfig(**settings)
    ours, theirs = make_model(base_path), make_model(base_path)
    start = {name: value.clone() for name, value in weights_of(ours).items()}
    our_optimizer, their_optimizer = build_optimizer(ours, config), torch_optimizer(theirs, config)
    for step in range(NUM_STEPS):
        set_gradients(theirs, step)
        for (_, our), (_, their) in zip(trainables(ours), trainables(theirs), strict=True):
            our.grad = None if their.grad is None else their.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
    assert our_optimizer.num_steps == NUM_STEPS
    assert_same_weights(weights_of(ours), weights_of(theirs))
    for name, value in weights_of(ours).items():
        frozen = name.endswith("router.weight") and config.lr_router == 0
        assert torch.equal(value, start[name]) == frozen, name


def test_without_bias_correction_the_moments_are_taken_as_they_are(base_path: Path) -> None:
    config = OptimConfig(bias_correction=False, lr=1e-2, lr_router=None, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    model = make_model(base_path)
    optimizer = build_optimizer(model, config)
    names = [trainable.name for trainable, _ in trainables(model)]
    value = {name: tensor.double() for name, tensor in weights_of(model).items()}
    first: dict[str, Any] = dict.fromkeys(names, 0.0)
    second: dict[str, Any] = dict.fromkeys(names, 0.0)
    for step in range(3):
        set_gradients(model, step)
        for trainable, parameter in trainables(model):
            assert parameter.grad is not None
            name, grad = trainable.name, parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.99 * second[name] + 0.01 * grad**2
            value[name] = value[name] * (1 - 1e-2 * 0.1) - 1e-2 * first[name] / (second[name] ** 0.5 + 1e-8)
        optimizer.step()
    assert_same_weights({name: tensor.double() for name, tensor in weights_of(model).items()}, value, 1e-5)


def cut_into_shards(model: Any, world_size: int, padding: int, fill: float) -> list[list[Shard]]:
    """Shards of `world_size` ranks, two a rank: pieces of equal size of every parameter behind one another.

    Pieces are as long as the parameter's share rounded up plus `padding`, so that rows are cut anywhere and trailing
    ranks may hold nothing of a parameter at all.
    """
    found = trainables(model)
    ranks = []
    for rank in range(world_size):
        shards = []
        for part in (found[::2], found[1::2]):
            segments, pieces, offset = [], [], 0
            for trainable, parameter in part:
                size = math.prod(trainable.shape)
                piece = -(-size // world_size) + padding
                start, stop = min(rank * piece, size), min((rank + 1) * piece, size)
                numbers = torch.full((piece,), fill)
                numbers[: stop - start] = parameter.detach().flatten()[start:stop]
                if start < stop:
                    segments.append(Segment(trainable, start, stop, offset))
                pieces.append(numbers)
                offset += piece
            shards.append(Shard(torch.cat(pieces), segments))
        ranks.append(shards)
    return ranks


def put_together(model: Any, shards: list[Shard], read: Callable[[Shard], Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name from what the shards of all ranks hold of them."""
    whole = {trainable.name: torch.full((math.prod(trainable.shape),), torch.nan) for trainable, _ in trainables(model)}
    for shard in shards:
        for segment in shard.segments:
            whole[segment.of.name][segment.start : segment.stop] = read(shard)[segment.span]
    return {trainable.name: whole[trainable.name].view(trainable.shape) for trainable, _ in trainables(model)}


@pytest.mark.parametrize("name", ["adamw-decay", "sgd-momentum"])
@pytest.mark.parametrize(("world_size", "padding"), [(1, 0), (2, 3), (3, 0), (7, 1), (700, 0)])
def test_shards_give_the_numbers_of_whole_parameters(base_path: Path, name: str, world_size: int, padding: int) -> None:
    """700 ranks are more than the numbers of a row, and more than some parameters have for everyone."""
    config = OptimConfig(**OPTIMIZERS[name])
    model = make_model(base_path)
    whole_optimizer = build_optimizer(model, config)
    ranks = cut_into_shards(model, world_size, padding, fill=5.0)
    optimizers = []
    for shards in ranks:
        optimizer = ShardOptimizer(trainables(model), config)
        optimizer.param_groups[0]["params"] = [shard.tensor for shard in shards]  # as ZeRO does
        optimizer.bind([ShardGroup(optimizer.trainables, shards)])
        optimizers.append(optimizer)
    everyone = [shard for shards in ranks for shard in shards]
    for step in range(3):
        set_gradients(model, step)
        gradients = {trainable.name: parameter.grad for trainable, parameter in trainables(model)}
        for shard in everyone:
            shard.tensor.grad = torch.full_like(shard.tensor, 9.0)
            for segment in shard.segments:
                grad = gradients[segment.of.name]
                assert grad is not None
                shard.tensor.grad[segment.span] = grad.flatten()[segment.start : segment.stop]
        for optimizer in optimizers:
            optimizer.step()
        whole_optimizer.step()
    assert_same_weights(put_together(model, everyone, lambda shard: shard.tensor), weights_of(model))
    state = {id(tensor): moments for optimizer in optimizers for tensor, moments in optimizer.state.items()}
    for moment in whole_optimizer.state_names:
        expected = {t.name: whole_optimizer.state[p][moment].view(t.shape) for t, p in trainables(model)}
        found = put_together(model, everyone, lambda shard, m=moment: state[id(shard.tensor)][m])  # type: ignore[misc]
        assert_same_weights(found, expected)
    for shard in everyone:
        in_runs = torch.zeros(shard.tensor.numel(), dtype=torch.bool)
        for segment in shard.segments:
            in_runs[segment.span] = True
        assert (shard.tensor[~in_runs] == 5.0).all(), "padding is nobody's number and stays"


def test_runs_know_their_factor_and_their_place(base_path: Path) -> None:
    found = {trainable.name: trainable for trainable, _ in trainables(make_model(base_path))}
    name = "model.layers.1.mlp.down_proj"
    assert [found[f"{name}.{part}"].factor for part in ("experts.a", "experts.b", "router.weight")] == [
        Factor.A,
        Factor.B,
        Factor.ROUTER,
    ]
    assert found[f"{name}.experts.b"].shape == (5, 34, 3)
    assert found[f"{name}.experts.b"].layer == name
    assert found[f"{name}.router.weight"].row_size == 128


def test_a_step_before_binding_does_nothing(base_path: Path) -> None:
    model = make_model(base_path)
    before = {name: value.clone() for name, value in weights_of(model).items()}
    optimizer = ShardOptimizer(trainables(model), OptimConfig())
    set_gradients(model, 0)
    optimizer.step()
    assert optimizer.num_steps == 0
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum"])
def test_a_skipped_step_is_as_if_it_had_not_been(base_path: Path, name: str) -> None:
    with_bad_step, without = make_model(base_path), make_model(base_path)
    for model in (with_bad_step, without):
        optimizer = build_optimizer(model, OptimConfig(**OPTIMIZERS[name]))
        for step in range(3):
            if step == 1 and model is with_bad_step:
                for _, parameter in trainables(model):
                    parameter.grad = torch.full_like(parameter, torch.nan)
                optimizer.skip = True
                optimizer.step()
                optimizer.skip = False
            set_gradients(model, step)
            optimizer.step()
        assert optimizer.num_steps == 3
    expected = weights_of(without)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(with_bad_step).items())


def share_of_lr(schedule: str, step: int, warmup: int, num_steps: int, end: float) -> float:
    """The learning rate of step `step` (from 0) as a share of `optim.lr`."""
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / (num_steps - warmup))
    falling = 1 - progress if schedule == "linear" else (1 + np.cos(np.pi * progress)) / 2
    return end + (1 - end) * falling


@pytest.mark.parametrize(
    ("schedule", "warmup", "end"),
    [
        *((schedule, *given) for schedule in ("linear", "cosine") for given in ((5, 0.1), (0, 0.0), (3, 1.0))),
        ("constant", 5, 0.1),
        ("constant", 0, 0.1),
    ],
)
def test_learning_rates_follow_the_formula(schedule: str, warmup: int, end: float) -> None:
    config = OptimConfig(lr=2e-3, schedule=schedule, warmup_steps=warmup, min_lr_ratio=end)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = build_schedule(optimizer, config, num_steps=25)
    found = []
    for _ in range(26):  # after the last of the 25 steps it stands at its end value
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [2e-3 * share_of_lr(schedule, step, warmup, 25, end) for step in range(26)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)

"""The planner's exact parts against formulas of the model's sizes, and against the real shards and buffers."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from dsmoelora.adapters import Factor
from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.config.adapter_options import ROUTERS
from dsmoelora.errors import ConfigError
from dsmoelora.optim.preconditioner import Preconditioner
from dsmoelora.optim.rows import Shard, ShardGroup, Trainable, rows_cut_by
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.planner import (
    MemoryPlan,
    Part,
    Phase,
    at_start,
    device_named,
    plan_memory,
    plan_traffic,
    short,
    short_plan,
    verdict,
)
from dsmoelora.planner.at_start import check_memory, judge
from dsmoelora.planner.cut_rows import num_cut_rows, step_buffer_bytes
from dsmoelora.planner.devices import GIB
from dsmoelora.planner.shapes import ParameterShape
from dsmoelora.planner.stand_in import _measured, pass_bytes
from dsmoelora.planner.verdict import largest_parts
from tests.helpers import tiny_llama
from tests.shardings import per_parameter, some_parameters
from tests.threaded_ranks import ThreadedComm

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
ALONE = ExpertPlacement(5, 1, 1, 0)
NUM_LAYERS, WIDTH, INNER, VOCABULARY, EXPERTS, RANK = 3, 64, 128, 261, 5, 3  # 261: no multiple of the ranks


def recipe_of(path: Path | str, dtype: Any = "bf16", **train: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(path), dtype=dtype),
        adapter=AdapterConfig(num_experts=EXPERTS, r=RANK, top_k=2, target_modules=["q_proj", "v_proj"]),
        data=DataConfig(max_length=24),
        train=TrainConfig(batch_size=48, **{"micro_batch_size": 2, "loss_chunk": 16} | train),
    )


def sizes_of_base() -> list[int]:
    """Of a Llama with two heads for keys of four: embedding, head, norms, and the matrices of its layers."""
    layer = [WIDTH**2, WIDTH**2 // 2, WIDTH**2 // 2, WIDTH**2, *3 * [WIDTH * INNER], WIDTH, WIDTH]
    return 2 * [VOCABULARY * WIDTH] + NUM_LAYERS * layer + [WIDTH]


def sizes_of_adapters() -> list[int]:
    """`a`, `b` and router of q and v."""
    q = [EXPERTS * WIDTH * RANK, EXPERTS * WIDTH * RANK, EXPERTS * WIDTH]
    v = [EXPERTS * WIDTH * RANK, EXPERTS * WIDTH // 2 * RANK, EXPERTS * WIDTH]
    return NUM_LAYERS * (q + v)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return tiny_llama(folder, num_hidden_layers=NUM_LAYERS, hidden_size=WIDTH, vocab_size=VOCABULARY)


def parts_of(recipe: Recipe, zero: dict[str, Any], world_size: int) -> dict[str, float]:
    plan = plan_memory(recipe, {"zero_optimization": zero}, world_size)
    return {part.name: part.num_bytes for part in plan.parts if part.is_exact}


def test_what_noise_puts_aside_is_what_a_rank_holds_of_the_adapted_weights(base: Path) -> None:
    recipe, ranks, adapted = recipe_of(base), 8, NUM_LAYERS * [WIDTH**2, WIDTH**2 // 2]
    name, noisy = "weights under noise, put aside", replace(recipe, optim=OptimConfig(flat_noise=0.05))
    assert name not in parts_of(recipe, {"stage": 3}, ranks)
    assert parts_of(noisy, {"stage": 3}, ranks)[name] == 2 * sum(math.ceil(size / ranks) for size in adapted)
    assert parts_of(noisy, {"stage": 2}, ranks)[name] == 2 * sum(adapted)


def test_stage_3_cuts_every_tensor_and_keeps_small_ones_whole(base: Path) -> None:
    ranks, threshold = 8, EXPERTS * WIDTH * RANK
    found = parts_of(recipe_of(base), {"stage": 3, "reduce_bucket_size": 1000}, ranks)
    # left to itself the threshold is DeepSpeed's 100,000 here, above all of this model's tensors
    whole = [math.ceil(size / ranks) * ranks for size in sizes_of_base()]
    own = sum(math.ceil(size / ranks) for size in sizes_of_adapters())
    assert found["base, partitioned"] == 2 * sum(math.ceil(size / ranks) for size in sizes_of_base())
    assert found["base, kept whole"] == 2 * sum(whole)
    assert found["adapters, partitioned"] == 2 * own
    assert found["masters, fp32"] == found["gradients, fp32"] == 4 * own
    assert found["moments, fp32"] == 8 * own
    assert found["reduce bucket"] == 4000
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    found = parts_of(recipe_of(base), zero, ranks)
    assert found["base, kept whole"] == 2 * (2 * NUM_LAYERS + 1) * WIDTH
    assert found["adapters, kept whole"] == 2 * sum(math.ceil(size / ranks) * ranks for size in sizes_of_adapters())


@pytest.mark.parametrize(
    ("settings", "experts_of_a_layer", "routers"),
    [
        ({"shared_experts": 2}, EXPERTS + 2, 2 * EXPERTS),
        ({"style": "decoder_layer", "router": "prompt", "num_experts": 2, "top_k": 1}, 1, 2),
    ],
)
def test_a_layer_has_the_experts_that_it_has(
    base: Path, settings: dict[str, Any], experts_of_a_layer: int, routers: int
) -> None:
    """Which may be more than its router chooses from, or less."""
    recipe = recipe_of(base, dtype="fp32")
    recipe.adapter = replace(recipe.adapter, **settings)
    layer = experts_of_a_layer * RANK * (WIDTH + WIDTH + WIDTH + WIDTH // 2) + routers * WIDTH
    assert parts_of(recipe, {"stage": 0}, 2)["moments, fp32"] == 8 * NUM_LAYERS * layer


def test_other_stages_and_offload(base: Path) -> None:
    ranks, base_bytes, trained = 8, 2 * sum(sizes_of_base()), sum(sizes_of_adapters())
    string = math.ceil(trained / (2 * ranks)) * 2 * ranks
    for stage in (1, 2):
        found = parts_of(recipe_of(base), {"stage": stage}, ranks)
        assert found["base, whole"] == base_bytes
        assert found["adapters, whole"] == 2 * string
        assert found["masters, fp32"] == 4 * string // ranks
        assert found["gradients, fp32"] == 4 * (string if stage == 1 else string // ranks)
    found = parts_of(recipe_of(base, dtype="fp32"), {"stage": 0}, ranks)
    assert found["base, whole"] == 2 * base_bytes
    assert "masters, fp32" not in found
    assert found["moments, fp32"] == 8 * trained
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **offload}
    plan = plan_memory(recipe_of(base), {"zero_optimization": zero}, ranks)
    own = sum(math.ceil(size / ranks) for size in sizes_of_adapters())
    cut = sum(math.ceil(size / ranks) for size in sizes_of_base())
    assert plan.total(Phase.PASS, on_host=True) == 2 * cut + (2 + 4 + 4 + 8 + 4) * own


@pytest.mark.parametrize("world_size", [2, 3, 7, 1024])
@pytest.mark.parametrize("rule", ["scaled", "tangent"])
def test_cut_rows_and_the_step_are_those_of_the_real_code(world_size: int, rule: Any) -> None:
    """The preconditioner's own buffer, for shards of a random model."""
    found = [of for of in some_parameters(random.Random(3), num_experts=5) if of.factor is Factor.ROUTER or of.row_size]
    rank = 3
    found = [replace(of, shape=(*of.shape[:-1], rank)) if of.factor is not Factor.ROUTER else of for of in found]
    runs = [run for of_rank in per_parameter(found, world_size) for runs in of_rank for run in runs]
    by_name = {of.name: of for of in found}
    cut = {(name, row) for name, row in rows_cut_by(runs) if by_name[name].factor is not Factor.ROUTER}
    shapes = [ParameterShape(of.name, math.prod(of.shape), world_size, of) for of in found]
    assert num_cut_rows(shapes, stage=3, partition=0) == len(cut)
    shard = Shard(torch.zeros(1), [])
    group = ShardGroup(found, [shard], [(by_name[name], row) for name, row in sorted(cut)])
    optim = OptimConfig(preconditioner=rule)
    sent = Preconditioner(group, optim, frozen={}).shapes
    assert step_buffer_bytes(shapes, optim, len(cut)) == 4 * sum(map(math.prod, sent.values()))


def test_stages_1_and_2_cut_one_string() -> None:
    found = [Trainable(f"{k}.a", str(k), Factor.A, (1, 5, 3)) for k in range(3)]
    shapes = [ParameterShape(of.name, 15, 4, of) for of in found]
    # 45 numbers in pieces of 12: cuts at 12, 24, 36; rows begin at multiples of 3, so none is cut
    assert num_cut_rows(shapes, stage=2, partition=12) == 0
    # pieces of 11: cuts at 11, 22, 33, 44, inside the rows 9 to 12, 21 to 24, 42 to 45, and at 33
    assert num_cut_rows(shapes, stage=2, partition=11) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Gemma2Config])
def test_layers_that_are_alike_count_as_often_as_they_are_there(kind: Any, checkpointing: bool) -> None:
    """Gemma's layers come in pairs, of which one sees a window."""
    more = {"head_dim": 8} if kind is Gemma2Config else {}
    shape = kind(**SMALL, **more, num_hidden_layers=7)
    recipe = recipe_of("", activation_checkpointing=checkpointing)
    recipe = replace(recipe, model=replace(recipe.model, attention="eager"))
    few, whole = pass_bytes(shape, recipe, ALONE), _measured(shape, recipe, ALONE)
    assert few.kept == pytest.approx(whole.kept, rel=0.005)
    assert few.peak == pytest.approx(whole.peak, rel=0.005)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"arrow"}))  # arrow needs experts that exist
def test_every_router_can_be_counted(router: Any) -> None:
    top_k = {"top_k": 2} if "top_k" in ROUTERS[router].options else {"top_k": None}
    adapter = AdapterConfig(num_experts=4, r=2, target_modules="all-linear", router=router, **top_k)
    recipe = replace(recipe_of(""), adapter=adapter)
    found = pass_bytes(LlamaConfig(**SMALL, num_hidden_layers=1), recipe, ExpertPlacement(4, 1, 1, 0))
    assert 0 < found.kept < found.peak


def plan_of(certain: float, estimated: float) -> MemoryPlan:
    parts = [
        Part("base, partitioned", certain * GIB),
        Part("base, gathered", estimated * GIB, Phase.PASS, is_exact=False),
    ]
    return MemoryPlan(parts, [])


def test_a_verdict_says_how_sure_it_is() -> None:
    device = device_named("a100-40")  # 39.4 GiB, of which 1.5 are assumed to be taken
    assert verdict(plan_of(10, 5), device).text.startswith("fits: 16.5 of 39.4 GiB (42 %) in forward and backward")
    tight = verdict(plan_of(10, 26), device)
    assert tight.fits
    assert tight.text.startswith("fits, but tightly: 37.5 of 39.4 GiB (95 %)")
    unsure, certain = verdict(plan_of(10, 30), device), verdict(plan_of(40, 5), device)
    assert (unsure.fits, unsure.is_certain, certain.fits, certain.is_certain) == (False, False, False, True)
    assert certain.limits[0].startswith("base, partitioned, 40.00 GiB: more ranks")


def test_a_run_is_refused_for_what_is_exact_alone() -> None:
    plan = plan_of(10, 5)
    assert judge(plan, 16 * GIB) == []
    (warning,) = judge(plan, 12 * GIB)
    assert warning.startswith("The run may not fit: its plan takes 15.0 GiB of a device that has 12.0 GiB.")
    assert "base, gathered, 5.0 GiB, is estimated" in warning
    with pytest.raises(ConfigError, match=r"what is exact of its plan takes 10\.0 GiB of a device that has 8\.0 GiB"):
        judge(plan, 8 * GIB)


@pytest.mark.parametrize(("room_gib", "is_refused"), [(0.0001, True), (1000.0, False)])
def test_a_run_looks_at_the_device_that_is_there(
    base: Path, monkeypatch: pytest.MonkeyPatch, room_gib: float, is_refused: bool
) -> None:
    zero = {"zero_optimization": {"stage": 3}}
    assert check_memory(recipe_of(base), zero, 2) == [], "on a CPU nothing is looked at"
    accelerator = SimpleNamespace(device_name=lambda: "cuda", total_memory=lambda: int(room_gib * GIB))
    monkeypatch.setattr(at_start, "get_accelerator", lambda: accelerator)
    if is_refused:
        with pytest.raises(ConfigError, match="cannot fit"):
            check_memory(recipe_of(base), zero, 2)
    else:
        assert check_memory(recipe_of(base), zero, 2) == []


@pytest.mark.parametrize("device", ["auto", "a100-40"])
def test_the_short_form_of_a_plan(base: Path, device: str) -> None:
    """What a dry run shows: on a machine whose peak nobody knows no verdict, and no time."""
    recipe, content = recipe_of(base), {"zero_optimization": {"stage": 3}}
    recipe = replace(recipe, train=replace(recipe.train, device=device))
    rows = dict(short_plan(recipe, content, 2))
    plan = plan_memory(recipe, content, 2)
    parts = [f"{part.name} {part.num_bytes / GIB:.2f} GiB" for part in largest_parts(plan)]
    assert rows["of it"] == "; ".join(parts)
    sent = sum(one.sent_bytes for one in plan_traffic(recipe, content, 2) if one.op != "write")
    assert rows["sent in a step"].startswith(f"{sent / GIB:.2f} GiB of a rank in ")
    if device == "auto":
        assert rows["memory of a rank"].startswith(f"{plan.peak / GIB:.2f} GiB in forward and backward, context and")
        assert "time of a step" not in rows
    else:
        assert rows["memory of a rank"] == verdict(plan, device_named(device)).text
        assert "hours in all, on 2 x a100-40" in rows["time of a step"]


def test_a_model_that_cannot_be_planned_has_a_short_form_all_the_same(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("data-dependent branch")

    monkeypatch.setattr(short, "rehearse", refuse)
    (row,) = short_plan(recipe_of(base), {"zero_optimization": {"stage": 3}}, 2)
    assert row[1] == "cannot be planned: the model does not run without weights (data-dependent branch)"


@pytest.mark.parametrize("room", [2**10, 2**40])
def test_rank_0_plans_and_all_hear_of_it(base: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    ranks, planned = ThreadedComm(4), []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", total_memory=lambda: room)
    monkeypatch.setattr(at_start, "comm", ranks)
    monkeypatch.setattr(at_start, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(at_start, "plan_memory", lambda *run: (planned.append(ranks.rank()), plan_memory(*run))[1])
    zero = {"zero_optimization": {"stage": 3}}
    first, *others = ranks.run(lambda rank: at_start.notes_on_memory(recipe_of(base), zero, 4))
    assert planned == [0]
    if room == 2**40:
        assert [first, *others] == [[]] * 4
    else:
        assert isinstance(first, ConfigError)
        assert str(first).startswith("The run cannot fit: ")
        assert [str(other) for other in others] == [f"rank 0: {first}"] * 3


def test_a_plan_does_not_wait_for_libraries_that_it_does_not_need() -> None:
    """PEFT, the kernels of bitsandbytes and transformers' Trainer take seconds to import."""
    asked = "import launch.plan, dsmoelora.planner, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=240, check=True)
    assert not {"peft", "bitsandbytes", "transformers.trainer_utils"} & set(done.stdout.split())

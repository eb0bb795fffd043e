"""Seconds of a step: by hand from bytes, bandwidths and hops."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.planner import Bound, Device, PhaseTime, TimePlan, Traffic, print_time, rehearse, time_of
from dsmoelora.planner.collectives import seconds_of
from dsmoelora.planner.devices import Efficiency, Link
from dsmoelora.planner.operations import Operation
from dsmoelora.planner.time import kernel_seconds
from tests.helpers import tiny_llama

# 8 ranks a machine; 100 GB/s and 2 us inside, 10 GB/s and 5 us between machines; half of each is reached
DEVICE = Device(
    "made-up",
    memory_gib=80,
    context_gib=1,
    ranks_per_node=8,
    peak_tflops=100,
    memory_gbs=1000,
    host_gbs=20,
    in_node=Link(100, 2),
    between_nodes=Link(10, 5),
    source="this test",
    efficiency=Efficiency(0.5, 0.5, 0.5),
    launch_us=10,
)
GB = 10**9


def traffic(op: Any, group_size: int, messages: int = 1, sent: int = GB, stride: int = 1) -> Traffic:
    return Traffic("x", "forward", op, messages, sent, group_size, stride)


@pytest.mark.parametrize(
    ("one", "hops_us", "gb_per_s"),
    [
        (traffic("all_gather", 8), 7 * 2, 50),
        (traffic("all_gather", 8, messages=3), 3 * 7 * 2, 50),
        (traffic("all_reduce", 4), 6 * 2, 50),
        # 32 ranks on four machines: 28 hops inside, 3 between, over 8 cards of 10 GB/s each
        (traffic("reduce_scatter", 32), 28 * 2 + 3 * 5, 40),
        # the tree: 7 hops inside and log2(4) between, up and down
        (traffic("all_reduce", 32), 2 * (7 * 2 + 2 * 5), 40),
        # one rank of each machine: one card
        (traffic("all_gather", 4, stride=8), 3 * 5, 5),
        (traffic("all_gather", 64, stride=4), 32 * 2 + 31 * 5, 10),
    ],
)
def test_collectives(one: Traffic, hops_us: float, gb_per_s: float) -> None:
    assert seconds_of(one, DEVICE) == pytest.approx(hops_us * 1e-6 + 1 / gb_per_s)


def test_a_kernel_takes_the_longer_of_products_and_bytes() -> None:
    """50 TFLOP/s and 500 GB/s are reached."""
    wide, narrow = Operation(False, 50 * 10**9, 10), Operation(False, 10, 500 * 10**6)
    found = Counter({wide: 2, narrow: 3, Operation(True, 10**12, 10): 7})
    assert kernel_seconds(found, DEVICE, in_backward=False) == pytest.approx((2e-3, 3e-3))


def test_a_phase_waits_for_what_takes_longest() -> None:
    device_first = PhaseTime("forward", compute=3, memory=1, launch=2, network=5, beside=3)
    assert device_first.seconds == 4 + 2
    assert device_first.waits() == {Bound.COMPUTE: 3, Bound.MEMORY: 1, Bound.NETWORK: 2, Bound.LAUNCH: 0}
    host_first = replace(device_first, launch=7)
    assert (host_first.seconds, host_first.waits()[Bound.LAUNCH]) == (7 + 2, 7)
    network_first = replace(device_first, network=9, beside=8)
    assert network_first.waits() == {Bound.COMPUTE: 0, Bound.MEMORY: 0, Bound.NETWORK: 9, Bound.LAUNCH: 0}
    on_cpu = replace(device_first, beside=0, one_after_another=True)
    assert on_cpu.seconds == sum(on_cpu.waits().values()) == 3 + 1 + 2 + 5


def test_speed_hours_and_cost() -> None:
    phases = [PhaseTime("forward", 1, 0, 0, 0), PhaseTime("step", 0, 0, 0, 3)]
    plan = TimePlan(phases, tokens=8000, mfu=0.25, num_steps=900, world_size=16, left_out=["nothing"])
    assert (plan.step, plan.tokens_per_second, plan.run_hours, plan.bound) == (4, 2000, 1, Bound.NETWORK)
    assert plan.cost(2.5) == 40
    file = io.StringIO()
    print_time(plan, DEVICE, 2.5, Console(file=file, width=120))
    assert "4.000 s a step, bound by network (it waits for compute 25 %, memory 0 %, network 75 %" in file.getvalue()
    assert "2,000 tokens/s, mfu 25.0%; 1.0 hours for 900 steps, 40 at 2.5 a device and hour" in file.getvalue()


def recipe_of(folder: Path, micro_batch_size: int, **train: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder), dtype="bf16"),
        adapter=AdapterConfig(num_experts=4, r=2, top_k=2, target_modules=["q_proj", "v_proj"]),
        optim=OptimConfig(preconditioner="scaled"),
        data=DataConfig(max_length=32),
        train=TrainConfig(batch_size=16, micro_batch_size=micro_batch_size, **train),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def test_many_small_micro_batches_cost_launches(base: Path) -> None:
    plans = [
        time_of(rehearse(recipe_of(base, size), {"zero_optimization": {"stage": 3}}, 2), DEVICE) for size in (1, 4)
    ]
    small, large = ({phase.name: phase for phase in plan.phases} for plan in plans)
    # a longer loss has more chunks; a layer's kernels are as many
    assert small["forward"].launch == pytest.approx(4 * large["forward"].launch, rel=0.05)
    assert small["step"] == large["step"]
    assert plans[0].bound is Bound.LAUNCH
    assert plans[0].tokens == plans[1].tokens == 16 * 32


def test_offloaded_weights_and_optimizers_come_over_the_host_link(base: Path) -> None:
    zero = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}
    near = rehearse(recipe_of(base, 4), {"zero_optimization": zero}, 2)
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    far = rehearse(recipe_of(base, 4), {"zero_optimization": zero | offload}, 2)
    fast, slow = ({phase.name: phase for phase in time_of(run, DEVICE).phases} for run in (near, far))
    pieces = sum(math.ceil(one.numel / 2) for one in near.gathered.gathers if not one.in_backward)
    more = slow["forward"].network - fast["forward"].network
    assert more == pytest.approx(2 * 2 * pieces / 20e9, rel=1e-3)  # two micro-batches, two bytes a number
    assert slow["step"].memory == pytest.approx(fast["step"].memory * 500 / 20)


def test_deepspeeds_own_python_and_copies_count(base: Path) -> None:
    """12 operations a module and pass in stage 3, 8 a gradient from stage 1, 8 a tensor in the step; 10 us each."""
    runs = {
        stage: rehearse(
            recipe_of(base, 4), {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}, 2
        )
        for stage in (2, 3)
    }
    found = {stage: {phase.name: phase for phase in time_of(run, DEVICE).phases} for stage, run in runs.items()}
    micro_batches, us, layers, tensors_of_layer = 2, 1e-5, 2, 3
    trained = layers * 2 * tensors_of_layer  # q_proj and v_proj: a, b, router
    modules = sum(1 for _ in runs[3].shapes.model.modules())
    assert [one["step"].launch for one in found.values()] == pytest.approx(2 * [8 * trained * us])
    kernels = sum(count for one, count in runs[2].passed.operations.items() if one.in_backward)
    assert found[2]["backward"].launch == pytest.approx(micro_batches * (kernels + 8 * trained) * us)
    for name in ("forward", "backward"):
        visits = found[3][name].launch - found[2][name].launch
        assert visits == pytest.approx(micro_batches * 12 * modules * us)
        gathered = sum(one.numel for one in runs[3].gathered.gathers if one.in_backward == (name == "backward"))
        copied = found[3][name].memory - found[2][name].memory
        assert copied == pytest.approx(micro_batches * 2 * 2 * gathered / 500e9)  # read and written, 2 bytes a number

"""Time of an optimizer step: what devices compute, what memory and links move, what the host asks for.

A kernel takes the longer of its products at the device's peak and its bytes at the memory's bandwidth, each times the
share that `Device.efficiency` states. The host hands out kernels ahead of the device, so a phase takes the longer of
both; a machine without a queue (a CPU) does one after another. Communication that ZeRO starts ahead (gathered weights,
reduced gradients, with `overlap_comm`) runs beside it, other communication does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dsmoelora.planner.collectives import seconds_of
from dsmoelora.planner.devices import Device
from dsmoelora.planner.flops import TokenFlops, optimizer_flops
from dsmoelora.planner.operations import Operations
from dsmoelora.planner.rehearsal import Rehearsal, num_moments
from dsmoelora.planner.traffic import Traffic, traffic_of

_FP32, _GB, _US = 4, 1e9, 1e-6
# What DeepSpeed does in Python, in operations of the host; `python -m benchmarks.planner --time` holds them to runs.
_OPERATIONS_OF_A_VISIT = 12  # ZeRO-3's hooks around a module, in each pass
_OPERATIONS_OF_A_GRADIENT = 8  # of a tensor, into the bucket that is reduced
_OPERATIONS_OF_AN_UPDATE = 8  # of a tensor: norm, clipping, and the new numbers to where the model has them
# what `overlap_comm` lets run beside the passes (gradients from stage 2 on), and what nobody waits for
_GATHERED, _REDUCED, _UNAWAITED = {"weights, gathered", "experts, gathered"}, "gradients", "requests to stop"
_PASSES = ("forward", "backward")


class Bound(StrEnum):
    """What a step waits for."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    LAUNCH = "launch"


@dataclass(frozen=True)
class PhaseTime:
    """A phase of a step, all micro-batches of it together, in seconds.

    Args:
        name: of it
        compute: kernels that wait for products
        memory: kernels that wait for memory
        launch: of the host, to hand them out
        network: of all communication
        beside: of `network`, what runs beside the rest
        one_after_another: the host hands out a kernel when the one before is done
    """

    name: str
    compute: float
    memory: float
    launch: float
    network: float
    beside: float = 0.0
    one_after_another: bool = False

    @property
    def busy(self) -> float:
        """Without communication."""
        device = self.compute + self.memory
        return device + self.launch if self.one_after_another else max(device, self.launch)

    @property
    def seconds(self) -> float:
        """In all."""
        return max(self.busy, self.beside) + self.network - self.beside

    def waits(self) -> dict[Bound, float]:
        """The seconds by what they wait for; their sum is `seconds`."""
        found = dict.fromkeys(Bound, 0.0)
        found[Bound.NETWORK] = self.network - self.beside
        if self.beside > self.busy:
            found[Bound.NETWORK] += self.beside
        elif self.one_after_another:
            found |= {Bound.COMPUTE: self.compute, Bound.MEMORY: self.memory, Bound.LAUNCH: self.launch}
        elif self.launch > self.compute + self.memory:
            found[Bound.LAUNCH] = self.launch
        else:
            found |= {Bound.COMPUTE: self.compute, Bound.MEMORY: self.memory}
        return found


@dataclass(frozen=True)
class TimePlan:
    """A step, and the run.

    Args:
        phases: of a step
        tokens: of all ranks in a step, in full rows
        mfu: share of the nominal peak that the model's own products take, of 1
        num_steps: of the run
        world_size: W
        left_out: what is not counted
    """

    phases: list[PhaseTime]
    tokens: int
    mfu: float
    num_steps: int
    world_size: int
    left_out: list[str]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step

    @property
    def run_hours(self) -> float:
        """Of all steps."""
        return self.step * self.num_steps / 3600

    def waits(self) -> dict[Bound, float]:
        """A step's seconds by what they wait for."""
        return {bound: sum(phase.waits()[bound] for phase in self.phases) for bound in Bound}

    @property
    def bound(self) -> Bound:
        """What most of a step waits for."""
        waits = self.waits()
        return max(waits, key=lambda one: waits[one])

    def cost(self, price: float) -> float:
        """Of the run, at a price of a device for an hour."""
        return price * self.world_size * self.run_hours


def time_of(run: Rehearsal, device: Device) -> TimePlan:
    """Time of a run that is rehearsed already.

    Args:
        run: see `rehearse`
        device: of each rank
    """
    train, length = run.recipe.train, run.recipe.data.max_length
    times = train.accumulation_steps(run.world_size)
    traffic = traffic_of(run)
    phases = [_pass(run, device, name, times, traffic) for name in _PASSES]
    phases.append(_step(run, device, traffic))
    tokens = train.batch_size * length
    flops = TokenFlops.of(run.passed.flops, train.micro_batch_size, length).in_row(length)
    step = sum(phase.seconds for phase in phases)
    mfu = tokens * flops / step / (run.world_size * device.peak_tflops * 1e12)
    return TimePlan(phases, tokens, mfu, train.max_steps, run.world_size, _left_out(run))


def kernel_seconds(operations: Operations, device: Device, in_backward: bool) -> tuple[float, float]:
    """Of kernels that wait for products, and of those that wait for memory."""
    compute = memory = 0.0
    for one, times in operations.items():
        if one.in_backward != in_backward:
            continue
        products = one.flops / (device.peak_tflops * 1e12 * device.efficiency.compute)
        moved = one.num_bytes / _memory_speed(device)
        if products > moved:
            compute += times * products
        else:
            memory += times * moved
    return compute, memory


def _pass(run: Rehearsal, device: Device, name: str, times: int, traffic: Iterable[Traffic]) -> PhaseTime:
    in_backward = name == "backward"
    compute, memory = kernel_seconds(run.passed.operations, device, in_backward)
    calls = sum(count for one, count in run.passed.operations.items() if one.in_backward == in_backward)
    calls += _OPERATIONS_OF_A_VISIT * _num_visits(run, in_backward)
    if in_backward and run.zero.stage > 0:
        calls += _OPERATIONS_OF_A_GRADIENT * len(run.shapes.trained)
    memory += 2 * run.itemsize * _num_gathered(run, in_backward) / _memory_speed(device)
    moves = [(seconds_of(one, device), _is_ahead(one, run)) for one in traffic if one.phase == name]
    moves.append((times * _from_host(run, device, in_backward), bool(run.zero.overlap_comm)))
    network = sum(seconds for seconds, _ in moves)
    return PhaseTime(
        name,
        times * compute,
        times * memory,
        times * calls * device.launch_us * _US,
        network,
        sum(seconds for seconds, is_ahead in moves if is_ahead) if device.overlaps else 0.0,
        not device.overlaps,
    )


def _is_ahead(traffic: Traffic, run: Rehearsal) -> bool:
    if traffic.what == _UNAWAITED:
        return True
    of_zero = traffic.what in _GATHERED or (traffic.what == _REDUCED and run.zero.stage >= 2)
    return of_zero and bool(run.zero.overlap_comm)


def _num_visits(run: Rehearsal, in_backward: bool) -> int:
    """Modules that ZeRO-3 begins and ends in a micro-batch."""
    if run.zero.stage < 3:
        return 0
    modules = sum(1 for _ in run.shapes.model.modules())
    return modules * (2 if in_backward and run.recipe.train.activation_checkpointing else 1)


def _num_gathered(run: Rehearsal, in_backward: bool) -> int:
    """Numbers whose pieces ZeRO-3 gathers and puts together, which reads and writes them once."""
    return sum(one.numel for one in run.gathered.gathers if one.in_backward == in_backward)


def _memory_speed(device: Device) -> float:
    """Bytes a second."""
    return device.memory_gbs * _GB * device.efficiency.memory


def _from_host(run: Rehearsal, device: Device, in_backward: bool) -> float:
    """Seconds of this rank's pieces on their way to the device, with `offload_param`, in a micro-batch."""
    if not run.offloads("offload_param"):
        return 0.0
    numel = sum(one.numel / one.num_pieces for one in run.gathered.gathers if one.in_backward == in_backward)
    return numel * run.itemsize / (device.host_gbs * _GB)


def _step(run: Rehearsal, device: Device, traffic: Iterable[Traffic]) -> PhaseTime:
    """Each trained number's gradient, master, moments and copy go through memory once, the gradient's norm first."""
    own = run.own_numel
    num_bytes = own * (2 * _FP32 + 2 * _FP32 * (1 + num_moments(run.recipe.optim)) + run.itemsize)
    products = {"none": 0, "scaled": 2, "tangent": 4}[run.recipe.optim.preconditioner]
    num_bytes += own * 2 * _FP32 * products
    away = run.offloads("offload_optimizer")
    bandwidth = device.host_gbs * _GB if away else _memory_speed(device)
    network = sum(seconds_of(one, device) for one in traffic if one.phase == "step")
    compute = optimizer_flops(run.shapes.trained, run.recipe.optim, run.zero.stage) / (device.peak_tflops * 1e12)
    launch = _OPERATIONS_OF_AN_UPDATE * len(run.shapes.trained) * device.launch_us * _US
    return PhaseTime("step", compute, num_bytes / bandwidth, launch, network, one_after_another=not device.overlaps)


def _left_out(run: Rehearsal) -> list[str]:
    notes = [
        "time of evaluations, checkpoints, loading and the first steps, and of data that comes too slowly",
        "time of factorisations in the preconditioner",
        "ranks that wait for slower ones, and networks that others use",
    ]
    if run.recipe.adapter.lora_dropout:
        notes.append("what train.compile saves of the passes over memory that dropout takes")
    return notes

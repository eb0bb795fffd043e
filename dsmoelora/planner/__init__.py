"""What a run takes of each rank, from formulas and from the model's own code on tensors without memory."""

from dsmoelora.planner.devices import Device, device_called, device_named, device_names
from dsmoelora.planner.memory import MemoryPlan, Part, Phase, memory_of, plan_memory
from dsmoelora.planner.rehearsal import Rehearsal, rehearse
from dsmoelora.planner.search import Candidate, Search, largest_micro_batch, micro_batches
from dsmoelora.planner.share_of_peak import device_of_run, token_flops
from dsmoelora.planner.short import short_plan
from dsmoelora.planner.table import print_memory, print_search, print_time, print_traffic
from dsmoelora.planner.time import Bound, PhaseTime, TimePlan, time_of
from dsmoelora.planner.traffic import Traffic, bytes_by_link, plan_traffic, traffic_of
from dsmoelora.planner.verdict import Verdict, verdict

__all__ = [
    "Bound",
    "Candidate",
    "Device",
    "MemoryPlan",
    "Part",
    "Phase",
    "PhaseTime",
    "Rehearsal",
    "Search",
    "TimePlan",
    "Traffic",
    "Verdict",
    "bytes_by_link",
    "device_called",
    "device_named",
    "device_names",
    "device_of_run",
    "largest_micro_batch",
    "memory_of",
    "micro_batches",
    "plan_memory",
    "plan_traffic",
    "print_memory",
    "print_search",
    "print_time",
    "print_traffic",
    "rehearse",
    "short_plan",
    "time_of",
    "token_flops",
    "traffic_of",
    "verdict",
]

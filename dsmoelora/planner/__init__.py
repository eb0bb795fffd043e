"""What a run takes of each rank, from formulas and from the model's own code on tensors without memory."""

from dsmoelora.planner.devices import Device, device_named, device_names
from dsmoelora.planner.memory import MemoryPlan, Part, Phase, plan_memory
from dsmoelora.planner.table import print_memory
from dsmoelora.planner.verdict import Verdict, verdict

__all__ = [
    "Device",
    "MemoryPlan",
    "Part",
    "Phase",
    "Verdict",
    "device_named",
    "device_names",
    "plan_memory",
    "print_memory",
    "verdict",
]

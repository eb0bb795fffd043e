"""Trained experts as plain PEFT LoRA adapters, for programs that know nothing of mixtures."""

from dsmoelora.export.average import Average, average_experts, same_for_every_token
from dsmoelora.export.experts import ExpertFactors, expert_loras, read_experts
from dsmoelora.export.peft_folder import Lora, PeftBase, check_output, peft_base, write_loras

__all__ = [
    "Average",
    "ExpertFactors",
    "Lora",
    "PeftBase",
    "average_experts",
    "check_output",
    "expert_loras",
    "peft_base",
    "read_experts",
    "same_for_every_token",
    "write_loras",
]

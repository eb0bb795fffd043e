"""Instruction data: files -> conversations -> tokens with a loss mask -> micro-batches."""

from dsmoelora.data.dataset import InstructionDataset, load_instructions
from dsmoelora.data.loader import MicroBatch, eval_micro_batches, first_micro_batches, packing_report, train_steps
from dsmoelora.data.packing import Packing, load_packing
from dsmoelora.data.preview import preview

__all__ = [
    "InstructionDataset",
    "MicroBatch",
    "Packing",
    "eval_micro_batches",
    "first_micro_batches",
    "load_instructions",
    "load_packing",
    "packing_report",
    "preview",
    "train_steps",
]

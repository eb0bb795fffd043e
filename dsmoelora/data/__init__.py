"""Instruction data: files -> conversations -> tokens with a loss mask -> micro-batches."""

from dsmoelora.data.dataset import InstructionDataset, load_instructions
from dsmoelora.data.loader import MicroBatch, eval_micro_batches, train_steps
from dsmoelora.data.preview import preview

__all__ = [
    "InstructionDataset",
    "MicroBatch",
    "eval_micro_batches",
    "load_instructions",
    "preview",
    "train_steps",
]

"""Optimizers over segments of rows: pure torch, the same on plain tensors and on ZeRO's shards."""

from dsmoelora.config import OptimConfig
from dsmoelora.optim.optimizer import ShardOptimizer, build_optimizer
from dsmoelora.optim.rows import Segment, Shard, ShardGroup, Trainable, trainables
from dsmoelora.optim.schedule import build_schedule

__all__ = [
    "OptimConfig",
    "Segment",
    "Shard",
    "ShardGroup",
    "ShardOptimizer",
    "Trainable",
    "build_optimizer",
    "build_schedule",
    "trainables",
]

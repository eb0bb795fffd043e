"""Instruction tuning of causal language models with mixtures of low-rank experts under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"  # setup.py reads this line

"""Instruction tuning of causal language models with mixtures of low-rank experts under DeepSpeed ZeRO-3."""

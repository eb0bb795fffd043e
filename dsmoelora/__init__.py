"""Instruction tuning of causal language models with mixtures of low-rank experts under DeepSpeed ZeRO-3."""

from dsmoelora.adapters.folder import load_adapter
from dsmoelora.adapters.inject import inject
from dsmoelora.config import AdapterConfig

__all__ = ["AdapterConfig", "inject", "load_adapter"]
__version__ = "0.1.0"  # setup.py reads this line

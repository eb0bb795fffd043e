"""Routed low-rank experts on linear layers: pure torch."""

from dsmoelora.adapters.context import BatchContext
from dsmoelora.adapters.inject import batch_context, inject, match_targets
from dsmoelora.adapters.layer import ExpertBank, Factor, RoutedLinear, adapted_layers

__all__ = [
    "BatchContext",
    "ExpertBank",
    "Factor",
    "RoutedLinear",
    "adapted_layers",
    "batch_context",
    "inject",
    "match_targets",
]

"""Routed low-rank experts on linear layers: pure torch."""

from dsmoelora.adapters.context import BatchContext
from dsmoelora.adapters.inject import batch_context, eject, inject
from dsmoelora.adapters.layer import ExpertBank, Factor, RoutedLinear, adapted_layers
from dsmoelora.adapters.targets import match_targets, untouched

__all__ = [
    "BatchContext",
    "ExpertBank",
    "Factor",
    "RoutedLinear",
    "adapted_layers",
    "batch_context",
    "eject",
    "inject",
    "match_targets",
    "untouched",
]

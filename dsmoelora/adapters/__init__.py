"""Routed low-rank experts on linear layers: pure torch."""

from dsmoelora.adapters.context import AdapterContext
from dsmoelora.adapters.experts.bank import ExpertBank, Factor
from dsmoelora.adapters.inject import eject, inject
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers, adapter_context
from dsmoelora.adapters.targets import match_targets, untouched

__all__ = [
    "AdapterContext",
    "ExpertBank",
    "Factor",
    "RoutedLinear",
    "adapted_layers",
    "adapter_context",
    "eject",
    "inject",
    "match_targets",
    "untouched",
]

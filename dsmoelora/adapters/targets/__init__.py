"""Which layers of a model are adapted."""

from dsmoelora.adapters.targets.names import (
    LORA,
    TARGETS,
    adapted_names,
    layer_config,
    match_targets,
    output_head_name,
    untouched,
)

__all__ = ["LORA", "TARGETS", "adapted_names", "layer_config", "match_targets", "output_head_name", "untouched"]

"""The frozen base model: how it is loaded, what it is called with, and its loss."""

from dsmoelora.model.limits import limits_at, limits_of
from dsmoelora.model.loading import (
    check_weights,
    chosen_to_pack,
    load_model,
    load_model_config,
    load_tokenizer,
    model_for_inference,
    model_without_weights,
    num_embeddings,
    own_device,
    pretrained,
    random_model,
    recompute_activations,
    watched_loading,
    without_dropout,
)
from dsmoelora.model.quantizing import layers_to_pack, loftq_searches
from dsmoelora.model.trained import Trained, find_trained, load_trained, trained_tokenizer

__all__ = [
    "Trained",
    "check_weights",
    "chosen_to_pack",
    "find_trained",
    "layers_to_pack",
    "limits_at",
    "limits_of",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "load_trained",
    "loftq_searches",
    "model_for_inference",
    "model_without_weights",
    "num_embeddings",
    "own_device",
    "pretrained",
    "random_model",
    "recompute_activations",
    "trained_tokenizer",
    "watched_loading",
    "without_dropout",
]

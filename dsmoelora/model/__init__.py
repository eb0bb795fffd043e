"""The frozen base model: how it is loaded, what it is called with, and its loss."""

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
from dsmoelora.model.quantizing import layers_to_pack
from dsmoelora.model.trained import base_loader, load_trained, trained_tokenizer

__all__ = [
    "base_loader",
    "check_weights",
    "chosen_to_pack",
    "layers_to_pack",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "load_trained",
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

"""Which models of fewer layers are run in place of a whole one, and how often each counts.

Layers that follow one another are alike where they are of the same kind (`layer_types`) and the same parts of them get
adapters. A model that has one of them and a model that has two tell what c of them take: what one takes, and c - 1
times the difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from torch import nn

from dsmoelora.adapters.targets import adapted_names
from dsmoelora.adapters.targets.decoder_layers import decoder_layer_of
from dsmoelora.config import Recipe

_Names = Mapping[str, bool]  # of layers that get adapters, and whether these are plain LoRA


@dataclass(frozen=True)
class Sample:
    """A model that is run. All samples, each as often as it says, take together what the whole model takes.

    Args:
        times: how often it counts, below 0 too
        shape: its configuration, of transformers
        recipe: of the run, with the names that adapted layers have here
    """

    times: int
    shape: Any
    recipe: Recipe


def samples_of(shape: Any, recipe: Recipe, model: nn.Module) -> list[Sample]:
    """Few models of few layers, or the whole model where that has no more layers than they have together.

    Args:
        shape: the model's configuration, of transformers
        recipe: of the run
        model: of this configuration, not adapted; it needs no weights

    Raises:
        ConfigError: the recipe names layers that the model does not have
    """
    routed, plain = adapted_names(model, recipe.adapter)
    names = dict.fromkeys(routed, False) | dict.fromkeys(plain, True)
    whole = [Sample(1, shape, _adapting(recipe, names))]
    adapted, period = _Adapted.of(model, names, shape.get_text_config().num_hidden_layers), _period(shape)
    if adapted is None or not period:
        return whole
    runs = list(_runs(adapted, period))
    long = [place for place, run in enumerate(runs) if len(run) > 2]
    first = [run[:1] if len(run) > 2 else run for run in runs]
    cuts = [first] + [[*first[:place], runs[place][:2], *first[place + 1 :]] for place in long]
    kept = [[layer for run in cut for block in run for layer in block] for cut in cuts]
    if not long or sum(map(len, kept)) >= len(adapted.layers):
        return whole
    more = [len(runs[place]) - 1 for place in long]
    return [
        Sample(times, _with_layers(shape, layers), _adapting(recipe, adapted.names(layers)))
        for times, layers in zip((1 - sum(more), *more), kept, strict=True)
    ]


def all_are_alike(samples: Sequence[Sample]) -> bool:
    """Whether the first has one of the layers, a period of them, and the second two."""
    counts = [one.shape.get_text_config().num_hidden_layers for one in samples]
    return len(counts) == 2 and counts[1] == 2 * counts[0]


@dataclass(frozen=True)
class _Adapted:
    """Which linear layers of a model get adapters, decoder layer by decoder layer.

    Args:
        list_name: name of the list of decoder layers
        layers: for each of them the names in it
        others: names of those outside of the list
    """

    list_name: str
    layers: Sequence[_Names]
    others: _Names

    @staticmethod
    def of(model: nn.Module, names: _Names, num_layers: int) -> _Adapted | None:
        """None where they do not lie in one list of so many."""
        layer_of = {name: decoder_layer_of(model, name) for name in names}
        lists = {layer.rpartition(".")[0] for layer in layer_of.values() if layer}
        if len(lists) > 1 or any(len(list(model.get_submodule(name).children())) != num_layers for name in lists):
            return None
        others = {name: plain for name, plain in names.items() if not layer_of[name]}
        layers: list[dict[str, bool]] = [{} for _ in range(num_layers)]
        for name, layer in layer_of.items():
            if layer:
                layers[int(layer.rpartition(".")[2])][name.removeprefix(f"{layer}.")] = names[name]
        return _Adapted(next(iter(lists), ""), layers, others)

    def names(self, layers: Sequence[int]) -> _Names:
        """In a model that has these of the decoder layers."""
        inside = [
            {f"{self.list_name}.{place}.{name}": plain for name, plain in self.layers[layer].items()}
            for place, layer in enumerate(layers)
        ]
        return dict(chain(self.others.items(), *(one.items() for one in inside)))


def _runs(adapted: _Adapted, period: int) -> Iterator[list[range]]:
    """Decoder layers, a period at a time, those that are alike together; layers behind the last period are one more."""
    places = range(len(adapted.layers))
    blocks = [places[first : first + period] for first in places[::period]]
    for _, run in groupby(blocks, key=lambda block: [adapted.layers[layer] for layer in block]):
        yield list(run)


def _period(shape: Any) -> int:
    """After how many layers their kinds come again; 0 where that cannot be told from the configuration."""
    text = shape.get_text_config()
    if hasattr(text, "first_k_dense_replace") or getattr(text, "decoder_sparse_step", 1) != 1:
        return 0
    kinds = getattr(text, "layer_types", None) or [""]
    if getattr(text, "mlp_only_layers", None):
        return 0
    return next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))


def _with_layers(shape: Any, layers: Sequence[int]) -> Any:
    fewer = copy.deepcopy(shape)
    text = fewer.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in layers]
    return fewer


def _adapting(recipe: Recipe, names: _Names) -> Recipe:
    """The recipe with adapters on the layers of these names. What they start from changes no size."""
    recipe = copy.copy(recipe)  # `replace` would check anew whether all settings go together
    recipe.adapter = copy.copy(recipe.adapter)
    recipe.adapter.target_modules = [name for name, plain in names.items() if not plain]
    recipe.adapter.lora_modules = [name for name, plain in names.items() if plain]
    recipe.adapter.experts_from = []
    return recipe

"""The health of the routers: who gets the tokens, and a warning when hardly anyone does."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsmoelora.adapters.routing import Routing
from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.config import Recipe
from dsmoelora.engine import StepResult
from dsmoelora.errors import listing
from dsmoelora.parallel import comm

logger = logging.getLogger(__name__)

# A router has collapsed when its choices are spread over less than a tenth of what lies between as few experts as
# possible and all of them.
COLLAPSED = 0.1


@dataclass(frozen=True)
class LayerHealth:
    """How one layer's experts were used, over all ranks.

    Args:
        share: of each expert, the share of tokens that used it
        gate: of each expert, its mean gate over all tokens
        entropy: mean over tokens of the gates' entropy, in nats
        effective: over how many experts the choices are spread, the exponential of their entropy
        fewest: over how few they could be
        dead: experts that no token used for a while
    """

    share: list[float]
    gate: list[float]
    entropy: float
    effective: float
    fewest: float
    dead: list[int]

    @property
    def collapsed(self) -> bool:
        """Whether nearly all tokens use the same experts."""
        return self.effective < self.fewest + COLLAPSED * (len(self.share) - self.fewest)


def layer_health(routing: Routing, place: int, dead_after: int) -> LayerHealth:
    """Health of one layer.

    Args:
        routing: of the steps to look at
        place: of the layer
        dead_after: steps without a token after which an expert counts as dead
    """
    share = [tokens / routing.num_tokens for tokens in routing.tokens[place]]
    gate = [total / routing.num_tokens for total in routing.gates[place]]
    dead = [expert for expert, steps in enumerate(routing.idle_steps[place]) if steps >= dead_after]
    # where every token uses every expert, only the gates say who does the work
    is_sparse = sum(share) < len(share) - 0.5
    used = share if is_sparse else [max(0.0, one) for one in gate]  # free gates may be negative
    total = sum(used) or 1.0
    entropy = -sum(one / total * math.log(one / total) for one in used if one > 0)
    fewest = max(1.0, sum(share)) if is_sparse else 1.0
    per_token = max(0.0, routing.entropy[place] / routing.num_tokens)  # they have no entropy then
    return LayerHealth(share, gate, per_token, math.exp(entropy), fewest, dead)


class RouterHealth(Callback):
    """Writes every `train.health_every` steps how experts are used, and names routers that collapse (all ranks).

    Adds to the metrics: `experts/share_max` (of the most used expert of all layers), `experts/effective` (mean over
    layers of the number of experts that the choices are spread over), `experts/entropy` (mean over tokens and layers,
    in nats), `experts/dead`, `experts/cosine_mean` and `experts/cosine_max` (between the experts' updates: mean over
    layers, and the largest of all; null while all are 0). The table `experts` has share, gate, entropy and dead
    experts layer by layer, the table `cosines` each expert's largest cosine with another one, and each layer's mean.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        train = run.recipe.train
        if not train.health_every or run.step % train.health_every:
            return
        routing = run.engine.take_routing()
        cosines = run.engine.expert_cosines() if routing.layers else None
        if comm.rank() > 0 or cosines is None or not routing.num_tokens:
            return
        layers = [layer_health(routing, place, train.dead_after) for place in range(len(routing.layers))]
        run.metrics["experts/share_max"] = max(max(layer.share) for layer in layers)
        run.metrics["experts/effective"] = sum(layer.effective for layer in layers) / len(layers)
        run.metrics["experts/entropy"] = sum(layer.entropy for layer in layers) / len(layers)
        run.metrics["experts/dead"] = float(sum(len(layer.dead) for layer in layers))
        run.metrics["experts/cosine_mean"] = _mean(cosines.mean)
        run.metrics["experts/cosine_max"] = max(_known(one for layer in cosines.largest for one in layer), default=None)
        run.tables["experts"] = _table(routing.layers, layers)
        run.tables["cosines"] = {
            "layers": cosines.layers,
            "largest": [[_rounded(one) for one in layer] for layer in cosines.largest],
            "mean": [_rounded(one) for one in cosines.mean],
        }
        self._warn(run.recipe, routing.layers, layers)

    def _warn(self, recipe: Recipe, names: list[str], layers: list[LayerHealth]) -> None:
        """Name every collapsed router once, and again only when it had recovered in between."""
        collapsed = {name: layer for name, layer in zip(names, layers, strict=True) if layer.collapsed}
        new = {name: layer for name, layer in collapsed.items() if name not in self._warned}
        self._warned = set(collapsed)
        if new:
            worst = min(new, key=lambda name: new[name].effective)
            logger.warning(
                "%d of %d routers have collapsed: nearly all tokens use the same experts in %s. In %s they are spread "
                "over %.1f of %d experts. %s",
                *(len(new), len(names), listing(new, limit=6), worst, new[worst].effective, len(new[worst].share)),
                _remedy(recipe),
            )


def _table(names: list[str], layers: list[LayerHealth]) -> dict[str, Any]:
    return {
        "layers": names,
        "share": [[round(one, 4) for one in layer.share] for layer in layers],
        "gate": [[round(one, 4) for one in layer.gate] for layer in layers],
        "entropy": [round(layer.entropy, 4) for layer in layers],
        "dead": {name: layer.dead for name, layer in zip(names, layers, strict=True) if layer.dead},
    }


def _known(values: Iterable[float]) -> list[float]:
    return [one for one in values if not math.isnan(one)]


def _mean(values: Iterable[float]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _remedy(recipe: Recipe) -> str:
    if "router" in recipe.adapter.freeze:
        return "They are frozen: take router out of adapter.freeze, or start from others."
    slower = "lower optim.lr_router"
    if recipe.adapter.router == "sigmoid_bias":
        return f"Raise adapter.bias_rate (now {recipe.adapter.bias_rate:g}) or {slower}."
    if recipe.adapter.router == "softmax" or recipe.adapter.top_k == recipe.adapter.num_experts:
        return f"Set losses.z, for instance to 0.001, or {slower}."
    balance = recipe.losses.balance
    return f"{f'Raise losses.balance (now {balance:g})' if balance else 'Set losses.balance to 0.01'}, or {slower}."

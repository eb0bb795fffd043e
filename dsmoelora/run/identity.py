"""What gives the numbers of a checkpoint their meaning: a run that goes on must have the same.

All else is the user's to change from one start to the next: learning rates, schedule, optimizer settings, a larger
`train.max_steps`, when to evaluate, save and report, weights of losses, ranks, `parallel`, the stage of ZeRO.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsmoelora.adapters.fingerprint import difference
from dsmoelora.config import Recipe
from dsmoelora.errors import CheckpointError

_BASE = "model.path"
_SETS = ("data.train", "data.eval")
_SHOWN = 60  # characters of a value


def identity_of(
    recipe: Recipe, base: Mapping[str, Any], train_fingerprint: str, eval_fingerprint: str | None
) -> dict[str, Any]:
    """By the keys of the recipe that decide about them; JSON-able.

    Args:
        recipe: of the run
        base: fingerprint of the base model
        train_fingerprint, eval_fingerprint: of the sets' rows as they are tokenised
    """
    # the seed is that of the run, and where experts came from does not matter once they are in a checkpoint
    adapter = {key: value for key, value in asdict(recipe.adapter).items() if key not in ("seed", "experts_from")}
    losses = asdict(recipe.losses)
    kinds = ("balance", "z", "contrastive", "contrastive_coactive")
    return {
        _BASE: dict(base),
        "model.dtype": recipe.model.dtype,
        "model.quantize": recipe.model.quantize,
        **{f"adapter.{key}": value for key, value in adapter.items()},
        **{f"losses.{name}": "on" if losses[name] else "off" for name in kinds},
        "run.seed": recipe.run.seed,
        "train.batch_size": recipe.train.batch_size,
        "data.packing": recipe.data.packing,
        "data.train": train_fingerprint,
        "data.eval": eval_fingerprint,
    }


def check_identity(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with numbers that would mean something else.

    Args:
        checkpoint: folder, for the message
        then, now: identities of the run that saved it and of this one

    Raises:
        CheckpointError: they differ; all keys are named
    """
    now = json.loads(json.dumps(now))  # as `then` was written
    changes = [change for key in now if (change := _change(key, then.get(key), now[key]))]
    if changes:
        raise CheckpointError(
            f"{checkpoint} was trained with something else: {'; '.join(changes)}. Set it back, or begin a new run with "
            "another run.name."
        )


def _change(key: str, then: Any, now: Any) -> str:
    if key == _BASE:
        what = "another model" if then is None else difference(then, now)
        return "" if what is None else f"{key} was another model ({what})"
    if then == now:
        return ""
    if key in _SETS:
        if then is None or now is None:
            return f"{key} {'was empty, and is not' if then is None else 'was given, and is empty'}"
        return f"{key} was other rows, in another order, or tokenised in another way"
    return f"{key} was {_shown(then)}, and is {_shown(now)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

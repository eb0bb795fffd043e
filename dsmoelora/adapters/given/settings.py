"""What folders say about the section `adapter` of a recipe that starts from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoelora.adapters.given.folders import open_folders


def settings_of(paths: Sequence[str], said: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the folders of `adapter.experts_from` decide, where the user has said nothing of them.

    `num_experts` is the number of their experts together, `r` the largest rank (with `split_ranks` that of their ranks,
    and 1); the scale is that of the first folder's first layer, and the layers are all that any folder has, by their
    full names.

    Args:
        paths: the folders
        said: settings that the user gave, by name

    Raises:
        ConfigError: an adapter that experts of two factors cannot stand for
        CheckpointError: a folder is missing or damaged
    """
    folders = open_folders(paths, bool(said.get("split_ranks")))
    rank = max(folder.rank for folder in folders)
    alpha = folders[0].scale * (rank**0.5 if said.get("use_rslora") else rank)
    # with one folder its plain layers stay plain; experts of several folders need a router
    plain = sorted(folders[0].plain_layers) if len(folders) == 1 else []
    routed = dict.fromkeys(name for folder in folders for name in folder.layers if name not in plain)
    found = {
        "num_experts": sum(folder.num_experts for folder in folders),
        "r": rank,
        "lora_alpha": float(f"{alpha:.12g}"),  # 16 again, where it was 16 / 3 * 3
        "target_modules": list(routed),
        "lora_modules": plain,
    }
    if "target_modules" in said:
        del found["lora_modules"]
    return {name: value for name, value in found.items() if name not in said}

"""The folder of a run: may it be used, what does it go on from, and what is written there first."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from dsmoelora.checkpoint import folders
from dsmoelora.checkpoint.training_state import newest_whole_checkpoint
from dsmoelora.config import DTYPES, Recipe
from dsmoelora.config.dtype import DtypeName
from dsmoelora.config.recipe_file import recipe_yaml
from dsmoelora.errors import CheckpointError, ConfigError, listing
from dsmoelora.run.files import ADAPTER_FOLDER, DEEPSPEED_FILE, METRICS_FILE, RECIPE_FILE


def check_run_folder(recipe: Recipe, resume: str) -> None:
    """Nothing that exists may be overwritten, and what will be written must be writable.

    Args:
        recipe: of the run
        resume: `none`, `auto` or a checkpoint folder

    Raises:
        ConfigError: the folder holds an earlier run and `resume` is `none`, or it cannot be written
        CheckpointError: `resume` names no checkpoint, or one that newer ones of the same run follow
    """
    folder = recipe.run.folder
    _check_writable(folder)
    results = [name for name in (METRICS_FILE, ADAPTER_FOLDER) if (folder / name).exists()] if folder.exists() else []
    checkpoints = folders.candidates(folder) if folder.exists() else []
    found = [path.name for path in checkpoints] + results
    same_run = resume == "auto" or (resume != "none" and Path(resume).resolve().parent == folder.resolve())
    if found and not same_run:
        raise ConfigError(
            f"{folder} holds a run already ({listing(found)}). Add --resume auto to go on with it, "
            "set another run.name to begin anew, or remove the folder."
        )
    if resume not in ("none", "auto"):
        _check_named(Path(resume), checkpoints)


def find_checkpoint(recipe: Recipe, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin at step 0 (collective)."""
    if resume == "none":
        return None
    if resume == "auto":
        return newest_whole_checkpoint(recipe.run.folder)
    return Path(resume)


def dtype_before(recipe: Recipe, resume: str) -> DtypeName | None:
    """The dtype of the run that is gone on with; None where there is none, or nobody knows."""
    folder = recipe.run.folder if resume == "auto" else Path(resume).parent
    if resume == "none" or not (folder / RECIPE_FILE).is_file():
        return None
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        dtype = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))["model"]["dtype"]
        return dtype if dtype in DTYPES else None
    return None


def write_description(folder: Path, recipe: Recipe, deepspeed: dict[str, Any]) -> None:
    """Put the whole recipe and the DeepSpeed configuration in force into the run folder (rank 0).

    A recipe that differs, from before a resume, is kept under the next free name `recipe.<n>.yaml`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / RECIPE_FILE, recipe_yaml(recipe)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (kept := folder / f"recipe.{number}.yaml").exists():
            number += 1
        path.rename(kept)
    path.write_text(text, encoding="utf-8")
    (folder / DEEPSPEED_FILE).write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def is_open_to_all(folder: Path) -> bool:
    """Whether every user of the machine may put files there, and replace those of others."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _check_writable(folder: Path) -> None:
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise ConfigError(f"run.dir / run.name is {str(folder)!r}, but {parent} is a file. Choose another run.dir.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.dir / run.name is {str(folder)!r}, but {parent} is not writable. Choose another run.dir."
        )


def _check_named(checkpoint: Path, of_this_run: list[Path]) -> None:
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"--resume {checkpoint}: there is no such folder. Give runs/<name>/checkpoint-N, or `auto`."
        )
    names = [path.name for path in of_this_run]
    newer = names[: names.index(checkpoint.name)] if checkpoint.name in names else []
    if newer:
        raise CheckpointError(
            f"--resume {checkpoint}: {listing(newer)} of the same run would be overtaken and mixed up with the new "
            "ones. Set another run.name to branch off here, or move the newer checkpoints away."
        )

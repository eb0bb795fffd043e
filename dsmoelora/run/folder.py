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
from dsmoelora.parallel import comm
from dsmoelora.run.files import ADAPTER_FOLDER, DEEPSPEED_FILE, METRICS_FILE, ORIGIN_FILE, RECIPE_FILE


def check_run_folder(recipe: Recipe, resume: str) -> None:
    """Nothing that exists may be overwritten, and what will be written must be writable.

    Args:
        recipe: of the run
        resume: `none`, `auto` or a checkpoint folder; one of another run may be named again by the run that began there

    Raises:
        ConfigError: the folder holds an earlier run and `resume` is `none`, or it cannot be written
        CheckpointError: `resume` names no checkpoint, or one that newer ones of the same run follow
    """
    folder = recipe.run.folder
    _check_writable(folder)
    results = [name for name in (METRICS_FILE, ADAPTER_FOLDER) if (folder / name).exists()] if folder.exists() else []
    checkpoints = folders.candidates(folder) if folder.exists() else []
    found = [path.name for path in checkpoints] + results
    is_known = resume not in ("none", "auto") and _origin(folder) == Path(resume).resolve()
    same_run = resume == "auto" or is_known or (resume != "none" and _lies_in(Path(resume), folder))
    if found and not same_run:
        raise ConfigError(
            f"{folder} holds a run already ({listing(found)}). Add --resume auto to go on with it, "
            "set another run.name to begin anew, or remove the folder."
        )
    if resume not in ("none", "auto") and not (is_known and checkpoints):
        _check_named(Path(resume), checkpoints if _lies_in(Path(resume), folder) else [])


def find_checkpoint(recipe: Recipe, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to begin at step 0 (collective).

    A run that began from a checkpoint of another one goes on from its own, as soon as it has any.

    Raises:
        CheckpointError: none of the run's checkpoints is whole, or it has none yet and the other's is gone
    """
    folder = recipe.run.folder
    if resume == "none":
        return None
    if resume != "auto" and _lies_in(Path(resume), folder):
        return Path(resume)
    if (own := newest_whole_checkpoint(folder)) is not None:
        return own
    return Path(resume) if resume != "auto" else comm.together(lambda: _found_origin(folder))


def dtype_before(recipe: Recipe, resume: str) -> DtypeName | None:
    """The dtype of the run that is gone on with; None where there is none, or nobody knows."""
    folder = recipe.run.folder
    if resume != "auto" and not (folder / RECIPE_FILE).is_file():
        folder = Path(resume).parent
    if resume == "none" or not (folder / RECIPE_FILE).is_file():
        return None
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        dtype = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))["model"]["dtype"]
        return dtype if dtype in DTYPES else None
    return None


def write_description(folder: Path, recipe: Recipe, deepspeed: dict[str, Any], checkpoint: Path | None = None) -> None:
    """Put the whole recipe and the DeepSpeed configuration in force into the run folder (rank 0).

    A recipe that differs, from before a resume, is kept under the next free name `recipe.<n>.yaml`.

    Args:
        folder: of the run
        recipe, deepspeed: in force
        checkpoint: that the run goes on from
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / RECIPE_FILE, recipe_yaml(recipe)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (kept := folder / f"recipe.{number}.yaml").exists():
            number += 1
        path.rename(kept)
    path.write_text(text, encoding="utf-8")
    if checkpoint is None:
        (folder / ORIGIN_FILE).unlink(missing_ok=True)
    elif not _lies_in(checkpoint, folder):
        (folder / ORIGIN_FILE).write_text(str(checkpoint.resolve()), encoding="utf-8")
    (folder / DEEPSPEED_FILE).write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")


def _lies_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def _origin(folder: Path) -> Path | None:
    """The checkpoint of another run that this one began from."""
    file = folder / ORIGIN_FILE
    return Path(file.read_text(encoding="utf-8")) if file.is_file() else None


def _found_origin(folder: Path) -> Path | None:
    origin = _origin(folder)
    if origin is not None and not origin.is_dir():
        raise CheckpointError(
            f"{folder} began from {origin} and has no checkpoint of its own, but there is no such folder any more. "
            "Put it back, or set another run.name to begin anew."
        )
    return origin


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

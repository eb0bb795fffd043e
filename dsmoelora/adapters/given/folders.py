"""Opens the folders of `adapter.experts_from`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsmoelora.adapters.folder_files import CONFIG_FILE, PEFT_TYPE, read_description
from dsmoelora.adapters.given.experts import GivenExperts, GivenFolder, GivenLayer
from dsmoelora.adapters.given.ours import open_ours
from dsmoelora.adapters.given.peft import PEFT_LORA, open_peft
from dsmoelora.adapters.given.split import split_folders
from dsmoelora.errors import bad_value

__all__ = ["KEY", "GivenExperts", "GivenFolder", "GivenLayer", "open_folder", "open_folders"]

KEY = "adapter.experts_from"


def open_folder(path: str | Path, key: str = KEY) -> GivenFolder:
    """A folder of ours or of PEFT; its headers are read, no numbers.

    Args:
        path: of the folder
        key: or flag that names it, for messages

    Raises:
        ConfigError: an adapter that experts of two factors cannot stand for
        CheckpointError: the folder is missing or damaged
    """
    path = Path(path)
    description = read_description(path)
    kind = description.get("peft_type") if isinstance(description, dict) else None
    if kind == PEFT_TYPE:
        return open_ours(path, key)
    if kind == PEFT_LORA:
        return open_peft(path, description, key)
    allowed = f"a folder whose {CONFIG_FILE} has peft_type {PEFT_TYPE} or {PEFT_LORA}, and this one has {kind!r}"
    raise bad_value(key, str(path), allowed, "Take adapters of low-rank factors.")


def open_folders(paths: Sequence[str | Path], split_ranks: bool = False, key: str = KEY) -> list[GivenFolder]:
    """Several of them, as `open_folder`; with `adapter.split_ranks` each of their ranks is an expert."""
    folders = [open_folder(path, key) for path in paths]
    return split_folders(folders) if split_ranks else folders

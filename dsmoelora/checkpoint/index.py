"""The index of a checkpoint: `index.json`, written last, says what the folder must hold.

checksum     SHA-256 of everything below, as JSON text
format, version, step
state        what the caller wants back
parameters   name, layer, factor, shape (over all experts) of every parameter
files        name, bytes, SHA-256 of every 8 MiB, and for each shard in it the dtypes of its tensors and its runs
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dsmoelora.checkpoint.files import BLOCK_BYTES, block_checksum, write_json
from dsmoelora.checkpoint.layout import (
    ShardLayout,
    decode_layouts,
    decode_parameters,
    encode_layouts,
    encode_parameters,
    parameters_of,
)
from dsmoelora.errors import CheckpointError

INDEX_NAME = "index.json"
_FORMAT, _VERSION = "dsmoelora-checkpoint", 2


@dataclass(frozen=True)
class RankFile:
    """One file of a checkpoint.

    Args:
        name: file name below the checkpoint's folder
        num_bytes: its size
        blocks: SHA-256 of each `files.BLOCK_BYTES`, as hex digits
        shards: shard number k is stored as the tensors `shard{k}.value`, `shard{k}.exp_avg` ...
    """

    name: str
    num_bytes: int
    blocks: list[str]
    shards: list[ShardLayout]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds."""

    step: int
    state: dict[str, Any]
    files: list[RankFile]

    @property
    def layouts(self) -> list[ShardLayout]:
        """The shards of all files."""
        return [layout for file in self.files for layout in file.shards]


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json` into `folder`."""
    parameters = parameters_of(index.layouts)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": index.step,
        "state": index.state,
        "parameters": encode_parameters(parameters),
        "files": [
            {
                "name": file.name,
                "bytes": file.num_bytes,
                "blocks": file.blocks,
                "shards": encode_layouts(file.shards, parameters),
            }
            for file in index.files
        ],
    }
    write_json(folder / INDEX_NAME, {"checksum": _checksum(content), **content})


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        CheckpointError: `index.json` is missing, damaged or of another version; the message is a short reason
    """
    try:
        content = json.loads((folder / INDEX_NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{INDEX_NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{INDEX_NAME} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{INDEX_NAME} is not the index of a {_FORMAT}")
    if content.get("version") != _VERSION:
        raise CheckpointError(f"{INDEX_NAME} has format version {content.get('version')!r}, known is {_VERSION}")
    if content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"{INDEX_NAME} does not match its own checksum")
    try:
        return _decode(content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{INDEX_NAME} cannot be understood ({type(error).__name__}: {error})") from error


def faults_of_sizes(folder: Path, index: Index) -> list[str]:
    """What is missing or has the wrong size, a short reason each; quick, because nothing is read."""
    faults = []
    for file in index.files:
        try:
            num_bytes = (folder / file.name).stat().st_size
        except OSError as error:
            faults.append(f"{file.name} cannot be read ({error.strerror})")
            continue
        if num_bytes != file.num_bytes:
            faults.append(f"{file.name} has {num_bytes} bytes instead of {file.num_bytes}")
    return faults


def faults_of_content(folder: Path, index: Index, part: int, num_parts: int) -> list[str]:
    """Which of the files differ from what was saved, a short reason each.

    Args:
        folder: of the checkpoint
        index: of the checkpoint
        part, num_parts: look at one of so many equal parts of all blocks
    """
    blocks = [(file, number) for file in index.files for number in range(len(file.blocks))]
    own = blocks[len(blocks) * part // num_parts : len(blocks) * (part + 1) // num_parts]
    faults = []
    for file, some in groupby(own, key=lambda block: block[0]):
        try:
            with (folder / file.name).open("rb") as content:
                damaged = [number for _, number in some if block_checksum(content, number) != file.blocks[number]]
        except OSError as error:
            faults.append(f"{file.name} cannot be read ({error.strerror})")
            continue
        if damaged:
            start = damaged[0] * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, file.num_bytes)
            faults.append(f"{file.name} does not match its checksum (SHA-256 of bytes {start} to {stop})")
    return faults


def _checksum(content: dict[str, Any]) -> str:
    # Python writes a float in the shortest way that reads back the same, so parsing and writing again changes nothing.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _decode(content: dict[str, Any]) -> Index:
    parameters = decode_parameters(content["parameters"])
    files = [
        RankFile(each["name"], each["bytes"], each["blocks"], decode_layouts(each["shards"], parameters))
        for each in content["files"]
    ]
    for file in files:
        if Path(file.name).name != file.name:
            raise ValueError(f"file name {file.name!r} leads out of the folder")
    return Index(content["step"], content["state"], files)

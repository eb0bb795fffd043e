"""The index of a checkpoint: `index.json`, written last, says what the folder must hold.

checksum     SHA-256 of the text of everything below, from its `{` on
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

import numpy as np

from dsmoelora.checkpoint.files import BLOCK_BYTES, block_checksum, write_whole
from dsmoelora.checkpoint.layout import decode_parameters, encode_parameters
from dsmoelora.checkpoint.table import COLUMNS, Table
from dsmoelora.errors import CheckpointError
from dsmoelora.optim.rows import Trainable

INDEX_NAME = "index.json"
_FORMAT, _VERSION = "dsmoelora-checkpoint", 2
_OF_SEGMENT = [COLUMNS.index(name) for name in ("parameter", "start", "stop", "offset")]


@dataclass(frozen=True)
class RankFile:
    """One file of a checkpoint.

    Args:
        name: file name below the checkpoint's folder
        num_bytes: its size
        blocks: SHA-256 of each `files.BLOCK_BYTES`, as hex digits
    """

    name: str
    num_bytes: int
    blocks: list[str]


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Args:
        step: at which it was written
        state: of the caller
        files: of all ranks that wrote one
        table: what the files hold; shard number k of a file is stored as the tensors `shard{k}.value`,
            `shard{k}.exp_avg` ...
    """

    step: int
    state: dict[str, Any]
    files: list[RankFile]
    table: Table


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json` into `folder`."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": index.step,
        "state": index.state,
        "parameters": encode_parameters(index.table.parameters),
        "files": [
            {"name": file.name, "bytes": file.num_bytes, "blocks": file.blocks, "shards": shards}
            for file, shards in zip(index.files, _encode_shards(index.table, len(index.files)), strict=True)
        ],
    }
    text = json.dumps(content).encode()
    write_whole(folder / INDEX_NAME, b'{"checksum": "%s", ' % _checksum(text).encode() + text[1:])


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        CheckpointError: `index.json` is missing, damaged or of another version; the message is a short reason
    """
    try:
        text = (folder / INDEX_NAME).read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{INDEX_NAME} cannot be read ({error.strerror})") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{INDEX_NAME} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{INDEX_NAME} is not the index of a {_FORMAT}")
    if content.get("version") != _VERSION:
        raise CheckpointError(f"{INDEX_NAME} has format version {content.get('version')!r}, known is {_VERSION}")
    if content.get("checksum") != _checksum(b"{" + text.partition(b", ")[2]):
        raise CheckpointError(f"{INDEX_NAME} does not match its own checksum")
    try:
        return _decode(content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{INDEX_NAME} cannot be understood ({type(error).__name__}: {error})") from error


def faults_of_sizes(folder: Path, files: list[RankFile]) -> list[str]:
    """What is missing or has the wrong size, a short reason each; quick, because nothing is read."""
    faults = []
    for file in files:
        try:
            num_bytes = (folder / file.name).stat().st_size
        except OSError as error:
            faults.append(f"{file.name} cannot be read ({error.strerror})")
            continue
        if num_bytes != file.num_bytes:
            faults.append(f"{file.name} has {num_bytes} bytes instead of {file.num_bytes}")
    return faults


def faults_of_content(folder: Path, files: list[RankFile], part: int, num_parts: int) -> list[str]:
    """Which of the files differ from what was saved, a short reason each.

    Args:
        folder: of the checkpoint
        files: of its index
        part, num_parts: look at one of so many equal parts of all blocks
    """
    blocks = [(file, number) for file in files for number in range(len(file.blocks))]
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


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _encode_shards(table: Table, num_files: int) -> list[list[dict[str, Any]]]:
    """For each file its shards; a segment is `[place of the parameter, start, stop, offset]`."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(num_files)]
    own = table.rows[:, [COLUMNS.index("file"), COLUMNS.index("shard")]]
    begins = np.flatnonzero((own[1:] != own[:-1]).any(axis=1)) + 1
    for rows in np.split(table.rows, begins):
        file, shard, kind = (int(rows[0, COLUMNS.index(name)]) for name in ("file", "shard", "kind"))
        # a shard of which nothing is in this file keeps its number
        found[file] += [{"tensors": {}, "segments": []} for _ in range(shard - len(found[file]))]
        found[file].append({"tensors": table.kinds[kind], "segments": rows[:, _OF_SEGMENT].tolist()})
    return found


def _decode(content: dict[str, Any]) -> Index:
    parameters = decode_parameters(content["parameters"])
    files = [RankFile(each["name"], each["bytes"], each["blocks"]) for each in content["files"]]
    for file in files:
        if Path(file.name).name != file.name:
            raise ValueError(f"file name {file.name!r} leads out of the folder")
    return Index(content["step"], content["state"], files, _decode_table(parameters, content["files"]))


def _decode_table(parameters: list[Trainable], files: list[dict[str, Any]]) -> Table:
    kinds: list[dict[str, str]] = []
    found = [np.empty((0, len(COLUMNS)), dtype=np.int64)]
    for number, file in enumerate(files):
        for shard, each in enumerate(file["shards"]):
            kind = dict(each["tensors"])
            kinds += [kind] if kind not in kinds else []
            rows = np.zeros((len(each["segments"]), len(COLUMNS)), dtype=np.int64)
            rows[:, :2], rows[:, COLUMNS.index("kind")] = (number, shard), kinds.index(kind)
            rows[:, _OF_SEGMENT] = np.array(each["segments"], dtype=np.int64).reshape(-1, len(_OF_SEGMENT))
            found.append(rows)
    table = Table(parameters, kinds, np.concatenate(found))
    if len(table.rows) and not 0 <= table.column("parameter").min() <= table.column("parameter").max() < len(
        parameters
    ):
        raise IndexError("a segment of no parameter")
    return table

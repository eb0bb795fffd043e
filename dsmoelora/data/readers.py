"""Sources of rows: local files, saved dataset folders and hub names, each turned into numbered rows.

`READERS` knows a file by its suffix; one more file type is one more entry. What is wrong with a single row is handed
on as a `RowProblem` in the row's place, so that the caller can decide between stopping and skipping.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet

from dsmoelora.config import DataSource
from dsmoelora.data.json_rows import is_array, read_json
from dsmoelora.data.problems import RowProblem
from dsmoelora.errors import DataError, listing

NumberedRows = Iterator[tuple[int, Any]]
HUB_TIMEOUT_S = 10.0
_BATCH = 1000  # rows of a Parquet file in memory at once
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class RowSource:
    """A source that was found and can be read.

    Args:
        name: for messages
        files: what its content lies in
        read: starts a new pass over (row number, row), numbers from 1
        dataset: of the datasets library, where the source is one
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], NumberedRows]
    dataset: datasets.Dataset | datasets.IterableDataset | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def open_source(source: DataSource, streaming: bool = False) -> RowSource:
    """Find a source: a file, a folder written by `save_to_disk`, or a dataset of the hub (which is downloaded).

    Args:
        source: what the recipe names
        streaming: it must be possible to read it piece by piece; a dataset of the hub is not downloaded

    Raises:
        DataError: there is none, it is of an unknown type, or it has several splits and none was chosen
    """
    path = Path(source.path)
    if path.is_dir():
        return _of_dataset(source, _load_folder(path))
    if not path.exists() and may_be_hub_name(source.path):
        return _of_dataset(source, _load_from_hub(source, streaming))
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the path; it is relative to the folder you start in.")
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path} ends in {path.suffix!r}, but it must end in one of {', '.join(READERS)}, or be a folder written "
            "by save_to_disk. Convert or rename it."
        )
    for key in ("split", "subset"):
        if getattr(source, key) is not None:
            raise DataError(f"{path} is a single file, but its {key} is {getattr(source, key)!r}. Drop the {key}.")
    if streaming and path.suffix.lower() == ".json" and is_array(path):
        raise DataError(
            f"{path} holds a JSON array, which is read as a whole, but data.streaming is true. Save it with one object "
            "a line (.jsonl), or set data.streaming to false."
        )
    return RowSource(str(path), (path,), partial(READERS[path.suffix.lower()], path))


# Files


def read_csv(path: Path) -> NumberedRows:
    """Yield (line, row) of a CSV file with a header; the line is where the row begins, so the first has number 2.

    The delimiter is whichever of comma, semicolon, tab and bar the header has most of.

    Raises:
        DataError: the file is no UTF-8 text, its header repeats a name, or its quotes do not match
    """
    csv.field_size_limit(2**31 - 1)  # a row may be a whole document
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            lines = csv.reader(file, delimiter=max(_DELIMITERS, key=first.count), strict=True)
            yield from _csv_rows(path, lines)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None


def _csv_rows(path: Path, lines: Any) -> NumberedRows:
    header: list[str] = []
    while True:
        number = lines.line_num + 1
        try:
            fields = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{path}, row {number}: no valid CSV ({error}). Mend the quotes there.") from None
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        if not header:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{path}: its header is {listing(header)}, but no name may come twice. Rename one.")
        elif len(fields) == len(header):
            yield number, dict(zip(header, fields, strict=True))
        else:
            counts = f"it has {len(fields)} fields, but the header names {len(header)} ({listing(header)})"
            if len(fields) < len(header):
                remedy = "empty fields at its end need their delimiters too."
            else:
                remedy = "texts with a delimiter in them must stand in double quotes."
            yield number, RowProblem(f"{counts}; {remedy}")


def read_parquet(path: Path) -> NumberedRows:
    """Yield (row number, row) of a Parquet file.

    Raises:
        DataError: it is none, or is damaged
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({_first_line(error)}). Write it anew.") from None


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


# Datasets


def _of_dataset(source: DataSource, found: Any) -> RowSource:
    name = source.path if source.split is None else f"{source.path} ({source.split})"
    if isinstance(found, dict):
        splits = list(found)
        if source.split is None and len(splits) == 1:
            found = found[splits[0]]
        elif source.split in found:
            found = found[source.split]
        else:
            raise DataError(
                f"{source.path} has the splits {listing(splits)}, but its split is {source.split!r}. "
                f"Choose one: {{path: {source.path}, split: {splits[0]}}}."
            )
    dataset = found.with_format(None)
    files = [] if isinstance(dataset, datasets.IterableDataset) else dataset.cache_files
    paths = tuple(Path(file["filename"]) for file in files)
    return RowSource(name, paths, lambda: enumerate(dataset, start=1), dataset)


def _load_folder(path: Path) -> Any:
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        inside = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in READERS]
        raise DataError(
            f"{path} is a folder, but none that save_to_disk of the datasets library wrote. "
            f"Name a file inside it ({listing(inside, 5) or 'it holds none of a known type'})."
        )
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of several libraries; whatever it is, the folder is damaged
        raise DataError(f"{path} cannot be loaded as a saved dataset ({_first_line(error)}). Save it anew.") from None


def may_be_hub_name(path: str) -> bool:
    """Whether this is `name` or `owner/name`, and neither looks like a data file nor lies in a folder that exists."""
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or len(parts) > 2 or Path(path).suffix.lower() in READERS:
        return False
    return len(parts) == 1 or not Path(parts[0]).exists()


def _load_from_hub(source: DataSource, streaming: bool) -> Any:
    # Left to itself, the library would try an unreachable hub for half a minute.
    cached = Path(datasets.config.HF_DATASETS_CACHE) / source.path.replace("/", "___")
    try:
        if not cached.exists():
            huggingface_hub.HfApi().dataset_info(source.path, timeout=HUB_TIMEOUT_S)
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=streaming)
    except Exception as error:  # of several libraries; whatever it is, the dataset is out of reach
        raise DataError(
            f"{source.path} is no local file or folder, and the hub gives no such dataset ({_first_line(error)}). "
            "Check path, subset and split, or download it first."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

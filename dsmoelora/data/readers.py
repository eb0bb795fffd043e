"""Sources of rows: local files, saved dataset folders and hub names, each turned into numbered rows.

`READERS` knows a file by its suffix; one more file type is one more entry. What is wrong with a single row is handed
on as a `RowProblem` in the row's place, so that the caller can decide between stopping and skipping.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet

from dsmoelora.config import DataSource
from dsmoelora.data.columns import needed
from dsmoelora.data.json_rows import is_array, open_text, read_json
from dsmoelora.data.problems import RowProblem, undecodable
from dsmoelora.errors import DataError, listing

NumberedRows = Iterator[tuple[int, Any]]
HUB_TIMEOUT_S = 10.0
_BATCH = 1000  # rows of a table in memory at once
_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # with which Excel is told the delimiter


@dataclass(frozen=True)
class RowSource:
    """A source that was found and can be read.

    Args:
        name: for messages
        files: what its content lies in
        read: starts a new pass over (row number, row), numbers from 1
        dataset: of the datasets library, where the source is one
        columns: of the dataset, where it gives tables
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], NumberedRows]
    dataset: datasets.Dataset | datasets.IterableDataset | None = None
    columns: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def open_source(source: DataSource, streaming: bool = False) -> RowSource:
    """Find a source: a file, a folder written by `save_to_disk`, or a dataset of the hub (which is downloaded).

    Args:
        source: what the recipe names
        streaming: it must be possible to read it piece by piece; a dataset of the hub is not downloaded

    Raises:
        DataError: there is none, it is of an unknown type, it has several splits and none was chosen, or it does not
            have the split or subset that was
    """
    path = Path(source.path)
    if path.is_dir():
        found = _load_folder(path)
        _check_part(source, found)
        return _of_dataset(source, found)
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
    if path.suffix.lower() == ".parquet":
        return RowSource(str(path), (path,), partial(read_parquet, path, partial(needed, source=source)))
    return RowSource(str(path), (path,), partial(READERS[path.suffix.lower()], path))


# Files


def read_csv(path: Path) -> NumberedRows:
    """Yield (line, row) of a CSV file with a header; the line is where the row begins, so the first has number 2.

    The delimiter is whichever of comma, semicolon, tab and bar the header has most of, or what a first line `sep=;`
    says.

    Raises:
        DataError: the file is UTF-16, its header repeats a name or is no UTF-8, or its quotes do not match
    """
    csv.field_size_limit(2**31 - 1)  # a row may be a whole document
    with open_text(path, newline="") as file:
        first = file.readline()
        told = _SEPARATOR_LINE.fullmatch(first)
        if not told:
            file.seek(0)
        delimiter = told[1] if told else max(_DELIMITERS, key=first.count)
        yield from _csv_rows(path, csv.reader(file, delimiter=delimiter, strict=True), int(bool(told)))


def _csv_rows(path: Path, lines: Any, num_before: int) -> NumberedRows:
    header: list[str] = []
    while True:
        number = num_before + lines.line_num + 1
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
            problem = undecodable("".join(header))
            if problem:
                raise DataError(f"{path}, row {number}: {problem}")
            if len(set(header)) < len(header):
                raise DataError(f"{path}: its header is {listing(header)}, but no name may come twice. Rename one.")
        elif len(fields) == len(header):
            yield number, undecodable("".join(fields)) or dict(zip(header, fields, strict=True))
        else:
            counts = f"it has {len(fields)} fields, but the header names {len(header)} ({listing(header)})"
            if len(fields) < len(header):
                remedy = "empty fields at its end need their delimiters too."
            else:
                remedy = "texts with a delimiter in them must stand in double quotes."
            yield number, RowProblem(f"{counts}; {remedy}")


def read_parquet(path: Path, choose: Callable[[list[str]], list[str]] = list) -> NumberedRows:
    """Yield (row number, row) of a Parquet file.

    Args:
        path: of the file
        choose: of its columns those that are read; the others are null

    Raises:
        DataError: it is none, or is damaged, or two columns have one name
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: its columns are {listing(names)}, but no name may come twice. Rename one.")
            batches = file.iter_batches(_BATCH, columns=choose(names))
            yield from enumerate(table_rows(batches, names), start=1)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({_first_line(error)}). Write it anew.") from None


def table_rows(tables: Iterable[pyarrow.Table | pyarrow.RecordBatch], names: Iterable[str]) -> Iterator[Any]:
    """The rows of tables, each with all of these columns; one that Python cannot hold is a `RowProblem`."""
    unread = dict.fromkeys(names)
    for table in tables:
        try:
            rows: list[Any] = table.to_pylist()
        except Exception:  # some cell of the table: find out which
            rows = [_table_row(table.slice(i, 1)) for i in range(table.num_rows)]
        for row in rows:
            yield row if isinstance(row, RowProblem) else unread | {key: _as_given(row[key]) for key in row}


def _table_row(table: pyarrow.Table | pyarrow.RecordBatch) -> Any:
    row = {}
    for name in table.schema.names:
        try:
            row[name] = table.column(name).to_pylist()[0]
        except Exception as error:  # of Python or of Arrow: no UTF-8, a date beyond the year 9999, ...
            return RowProblem(f"{name} cannot be read ({_first_line(error)}).")
    return row


def _as_given(value: Any) -> Any:
    """Without the keys of objects that tables fill with null, for other rows have them."""
    if isinstance(value, dict):
        return {key: _as_given(each) for key, each in value.items() if each is not None}
    return [_as_given(each) for each in value] if isinstance(value, list) else value


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
    names = found.column_names  # None of a streamed set that says nothing about itself
    chosen = found.select_columns(needed(names, source)) if names else found
    if isinstance(chosen, datasets.IterableDataset):
        dataset = chosen.with_format(None)
        return RowSource(name, (), lambda: _streamed(name, dataset), dataset)
    # as tables, for the library itself would end at a cell that Python cannot hold
    dataset = chosen.with_format("arrow")
    paths = tuple(Path(file["filename"]) for file in dataset.cache_files)
    columns = tuple(names)
    return RowSource(name, paths, lambda: enumerate(table_rows(dataset.iter(_BATCH), columns), 1), dataset, columns)


def _streamed(name: str, rows: Iterable[Any]) -> NumberedRows:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # of several libraries; whatever it is, they yield no row after it
        raise DataError(
            f"{name}, row {number + 1} cannot be streamed ({_first_line(error)}). Read the whole set at its beginning "
            "(data.streaming: false), where data.on_bad_row: skip leaves such rows out."
        ) from None


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


def _check_part(source: DataSource, found: Any) -> None:
    """A saved folder has no subsets, and one that holds a single set has no split but its own."""
    if source.subset is not None:
        raise DataError(
            f"{source.path} is a saved folder, but its subset is {source.subset!r}, which only a dataset of the hub "
            "has. Drop the subset."
        )
    if isinstance(found, dict) or source.split in (None, str(found.split)):
        return
    what = "a set without a split" if found.split is None else f"the split {str(found.split)!r} alone"
    raise DataError(
        f"{source.path} is a saved folder with {what}, but its split is {source.split!r}. Drop the split, or name the "
        "folder that holds it."
    )


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

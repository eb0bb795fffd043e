"""One source, read and tokenised once a machine and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data.cache import cache_file
from dsmoelora.data.chat import TokenisedChat, tokenise_chats
from dsmoelora.data.formats import Conversation, read_conversations
from dsmoelora.data.plain_text import text_ids
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.readers import RowSource, open_source
from dsmoelora.data.vocabulary import check_ids
from dsmoelora.errors import DataError
from dsmoelora.signs_of_life.waits import waiting_for

CACHE_VERSION = 7  # raise it when the same files would be tokenised in another way
_BATCH = 256
_ROWS_A_PROCESS = 5000  # with less, starting a second process takes what it saves (benchmarks/tokenising.py)
ROWS_SCHEMA = pyarrow.schema(
    {
        "messages": pyarrow.string(),  # JSON, as tools: turns may have keys of any type
        "text": pyarrow.string(),
        "row": pyarrow.int64(),
        "problem": pyarrow.string(),
        "learned": pyarrow.list_(pyarrow.int64()),
        "tools": pyarrow.string(),
    }
)


@dataclass(frozen=True)
class TokeniseOptions:
    """How sources become tokens.

    Args:
        max_length: tokens of a sample; what is longer is cut at the end
        on_bad_row: `error` stops at the first wrong row, `skip` leaves it out
        num_proc: processes that tokenise; None for as many as there are cores and rows for
        progress: show a bar while this process is at work
        num_embeddings: of the model, which has none for tokens from this number on; None if it is not known
    """

    max_length: int
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int | None = None
    progress: bool = False
    num_embeddings: int | None = None


@dataclass(frozen=True)
class TokenisedSet:
    """All rows of a source and, sample by sample, their tokens.

    Args:
        name: of the source, for messages
        rows: columns of `ROWS_SCHEMA`, as in `Conversation`
        tokens: `place` (of the row in `rows`; several samples may come from one), `num_messages` and `split` as in
            `TokenisedChat`, `input_ids`, `supervised`, `num_tokens`, `num_supervised`, `truncated`, `problem`
        digest: of everything that decides about rows and tokens, but not of where the source lies
    """

    name: str
    rows: datasets.Dataset
    tokens: datasets.Dataset
    digest: str


def tokenised_set(source: DataSource, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> TokenisedSet:
    """Read and tokenise a source, or take the result of an earlier time from the cache.

    Raises:
        DataError: the source or one of its rows is wrong
        ModelError: the tokenizer or its chat template cannot be used
    """
    opened = open_source(source)
    digest = _digest(source, opened, tokenizer, options)
    versions = [CACHE_VERSION, datasets.__version__, tokenizers.__version__, transformers.__version__]
    with cache_file([digest, versions], "") as folder:
        if not folder.exists():
            # Made under another name, so that a process that is killed here leaves nothing half-done.
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with _progress_bars(options.progress):
                _write_rows(part / "rows.arrow", read_conversations(source, options.on_bad_row, opened), opened.name)
                _write_tokens(part, opened.name, tokenizer, options)
            part.rename(folder)
        return TokenisedSet(opened.name, _from_files(folder, "rows"), _from_files(folder, "tokens"), digest)


def settings_digest(source: DataSource, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> Any:
    """A running SHA-256 of everything but the source's content that decides about its tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    for state in ("truncation", "padding"):  # left over from the last call, without influence on ours
        backend.pop(state, None)
    tokenisation = [tokenizer.chat_template, tokenizer.special_tokens_map, backend]
    tokenisation += [options.max_length, options.num_embeddings]
    reading = [source.format, source.fields, source.answer_is, source.split, source.subset, options.on_bad_row]
    return hashlib.sha256(json.dumps([tokenisation, reading], sort_keys=True, default=str).encode())


def _digest(source: DataSource, opened: RowSource, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> str:
    digest = settings_digest(source, tokenizer, options)
    for file in opened.files:
        try:
            with waiting_for(partial("{} to be read".format, file), options.progress), file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}). Check who may read it.") from None
    for row in opened.read() if not opened.files else ():  # a dataset that lies in memory alone
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """The bars of `datasets`, which the log settings of a run switch off."""
    disabled = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if disabled else datasets.enable_progress_bars)()


def _write_rows(file: Path, conversations: Iterable[Conversation], name: str) -> None:
    counted = iter(datasets.utils.tqdm(conversations, desc=f"Reading {name}", unit=" rows"))
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, ROWS_SCHEMA) as writer:
        while batch := list(islice(counted, _BATCH)):
            writer.write_batch(pyarrow.RecordBatch.from_pydict(row_columns(batch), schema=ROWS_SCHEMA))


def row_columns(conversations: list[Conversation]) -> dict[str, list[Any]]:
    """The columns of `ROWS_SCHEMA`."""
    columns: dict[str, list[Any]] = {name: [getattr(c, name) for c in conversations] for name in ROWS_SCHEMA.names}
    for name in ("messages", "tools"):
        columns[name] = [json.dumps(value) for value in columns[name]]
    return columns


def automatic_num_proc(num_rows: int) -> int:
    """Processes that tokenise where nobody says how many."""
    return max(1, min(len(os.sched_getaffinity(0)), num_rows // _ROWS_A_PROCESS))


def _write_tokens(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> None:
    rows = _from_files(folder, "rows")
    num_proc = options.num_proc or automatic_num_proc(len(rows))
    # The fingerprint is ours, because the one of `datasets` would hash the tokenizer object, which changes with use.
    rows.map(
        partial(_tokenise_batch, name=name, tokenizer=tokenizer, options=options),
        batched=True,
        with_indices=True,
        batch_size=_BATCH,
        remove_columns=rows.column_names,
        num_proc=min(num_proc, len(rows)) if num_proc > 1 else None,
        cache_file_name=str(folder / "tokens.arrow"),
        new_fingerprint=folder.stem[:16],
        desc=f"Tokenising {name}",
    )


def _from_files(folder: Path, name: str) -> datasets.Dataset:
    """One file, or one for each process that wrote (their numbers in their names are of equal length)."""
    files = sorted(folder.glob(f"{name}*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def _tuple(numbers: list[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def _tokenise_batch(
    batch: dict[str, list[Any]],
    places: list[int],
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    options: TokeniseOptions,
) -> dict[str, list[Any]]:
    conversations = [
        Conversation(json.loads(messages), name, row, text, problem, _tuple(learned), json.loads(tools))
        for messages, text, row, problem, learned, tools in zip(*(batch[c] for c in ROWS_SCHEMA.names), strict=True)
    ]
    columns = tokenise(conversations, tokenizer, options)
    columns["place"] = [places[place] for place in columns["place"]]
    return columns


def tokenise(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions
) -> dict[str, list[Any]]:
    """The columns of `TokenisedSet.tokens` for these conversations, cut at `max_length`; `place` counts in the list.

    Raises:
        DataError: a conversation cannot be learned as it is, and `on_bad_row` is `error`
        ModelError: the tokenizer or its chat template cannot be used
    """
    chats, problems = _uncut(conversations, tokenizer, options)
    places = [place for place, row in enumerate(chats) for _ in row]
    samples = [chat for row in chats for chat in row]
    ids = [chat.input_ids[: options.max_length] for chat in samples]
    # The first token is never the target of a prediction, whatever the template says.
    supervised = [[False, *chat.supervised[1 : options.max_length]] if chat.input_ids else [] for chat in samples]
    return {
        "place": places,
        "num_messages": [chat.num_messages for chat in samples],
        "split": [chat.split for chat in samples],
        "input_ids": ids,
        "supervised": supervised,
        "num_tokens": [len(sample) for sample in ids],
        "num_supervised": [sum(flags) for flags in supervised],
        "truncated": [len(chat.input_ids) > options.max_length for chat in samples],
        "problem": [problems[place] for place in places],
    }


def _uncut(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions
) -> tuple[list[list[TokenisedChat]], list[str]]:
    """Samples of each row (an empty one of a row that is skipped or teaches nothing), and why it is skipped."""
    problems = [conversation.problem for conversation in conversations]
    chats = []
    for i, conversation in enumerate(conversations):
        found: list[TokenisedChat] = []
        try:
            if conversation.messages:
                (found,) = tokenise_chats(tokenizer, [conversation])
            elif conversation.text:
                found = [_tokenise_text(tokenizer, conversation.text)]
            for chat in found:
                check_ids(tokenizer, chat.input_ids, options.num_embeddings)
        except RowProblem as problem:
            if options.on_bad_row == "error":
                raise problem.at(conversation.path, conversation.row) from None
            problems[i], found = str(problem), []
        chats.append(found or [TokenisedChat([], [])])
    return chats, problems


def _tokenise_text(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenisedChat:
    """All of it is learned, and to end after it."""
    ids = text_ids(tokenizer, text)
    return TokenisedChat(ids, [True] * len(ids))

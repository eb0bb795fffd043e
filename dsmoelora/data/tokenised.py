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
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.readers import RowSource, open_source
from dsmoelora.errors import DataError

CACHE_VERSION = 4  # raise it when the same files would be tokenised in another way
_BATCH = 256
_ROWS_A_PROCESS = 5000  # with less, starting a second process takes what it saves (benchmarks/tokenising.py)
ROWS_SCHEMA = pyarrow.schema(
    {
        "messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
        "text": pyarrow.string(),
        "row": pyarrow.int64(),
        "problem": pyarrow.string(),
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
    """

    max_length: int
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class TokenisedSet:
    """All rows of a source and, row by row, their tokens.

    Args:
        name: of the source, for messages
        rows: `messages`, `text`, `row` and `problem` as in `Conversation`
        tokens: `input_ids`, `supervised`, `num_tokens`, `num_supervised`, `truncated`, `problem`
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
    tokenisation = [tokenizer.chat_template, tokenizer.special_tokens_map, backend, options.max_length]
    reading = [source.format, source.fields, source.split, source.subset, options.on_bad_row]
    return hashlib.sha256(json.dumps([tokenisation, reading], sort_keys=True, default=str).encode())


def _digest(source: DataSource, opened: RowSource, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions) -> str:
    digest = settings_digest(source, tokenizer, options)
    for file in opened.files:
        try:
            with file.open("rb") as content:
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
            columns = {column: [getattr(c, column) for c in batch] for column in ROWS_SCHEMA.names}
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=ROWS_SCHEMA))


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


def _tokenise_batch(
    batch: dict[str, list[Any]], *, name: str, tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions
) -> dict[str, list[Any]]:
    columns = (batch["messages"], batch["row"], batch["text"], batch["problem"])
    conversations = [Conversation(m, name, row, text, problem) for m, row, text, problem in zip(*columns, strict=True)]
    return tokenise(conversations, tokenizer, options)


def tokenise(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, options: TokeniseOptions
) -> dict[str, list[Any]]:
    """The columns of `TokenisedSet.tokens` for these conversations, cut at `max_length`.

    Raises:
        DataError: the chat template refuses a conversation, and `on_bad_row` is `error`
        ModelError: the tokenizer or its chat template cannot be used
    """
    chats, problems = _uncut(conversations, tokenizer, options.on_bad_row)
    ids = [chat.input_ids[: options.max_length] for chat in chats]
    # The first token is never the target of a prediction, whatever the template says.
    supervised = [[False, *chat.supervised[1 : options.max_length]] if chat.input_ids else [] for chat in chats]
    return {
        "input_ids": ids,
        "supervised": supervised,
        "num_tokens": [len(sample) for sample in ids],
        "num_supervised": [sum(flags) for flags in supervised],
        "truncated": [len(chat.input_ids) > options.max_length for chat in chats],
        "problem": problems,
    }


def _uncut(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, on_bad_row: str
) -> tuple[list[TokenisedChat], list[str]]:
    """Tokens of each row (none of a row that is skipped), and why it is skipped."""
    problems = [conversation.problem for conversation in conversations]
    chats = [TokenisedChat([], []) for _ in conversations]
    talks = [i for i, conversation in enumerate(conversations) if conversation.messages]
    try:
        found = tokenise_chats(tokenizer, [conversations[i] for i in talks]) if talks else []
        for i, chat in zip(talks, found, strict=True):
            chats[i] = chat
    except RowProblem:  # some row of the batch: find out which
        for i in talks:
            try:
                (chats[i],) = tokenise_chats(tokenizer, [conversations[i]])
            except RowProblem as problem:
                if on_bad_row == "error":
                    raise problem.at(conversations[i].path, conversations[i].row) from None
                problems[i] = str(problem)
    for i, conversation in enumerate(conversations):
        if conversation.text:
            chats[i] = _tokenise_text(tokenizer, conversation.text)
    return chats, problems


def _tokenise_text(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenisedChat:
    """All of it is learned, and to end after it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return TokenisedChat(ids, [True] * len(ids))

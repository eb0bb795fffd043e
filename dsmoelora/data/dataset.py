"""The tokenised instructions of a run: made once a machine, kept on disk, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data.cache import cache_file
from dsmoelora.data.chat import chat_template_of, tokenise_chats
from dsmoelora.data.formats import Conversation, Message, check_path, read_conversations
from dsmoelora.data.mixing import Mixture
from dsmoelora.errors import DataError

IGNORED = -100  # the label of what is not supervised, as in torch's cross entropy
CACHE_VERSION = 1  # raise it when the same files would be tokenised in another way


class InstructionDataset:
    """Tokenised conversations by index, those of the first set first.

    Args:
        sets: tokenised rows of each set; the ones without anything to learn are left out
        weights: of the sets in training; None joins them
        fingerprint: of all that decides about rows and tokens

    Attributes:
        num_tokens: (len,) tokens of each sample
        num_supervised: (len,) targets of each sample that enter the loss; the first token is never one
        num_truncated: samples that were cut at max_length and still have something to learn
        num_dropped: samples left out because nothing to learn was left of them
        mixture: which samples make up an epoch
        fingerprint: changes with the files, their weights, the tokenizer, its chat template and max_length
    """

    def __init__(self, sets: Sequence[datasets.Dataset], weights: Sequence[float] | None, fingerprint: str) -> None:
        rows = datasets.concatenate_datasets(list(sets))
        num_supervised = np.asarray(rows.with_format("numpy")["num_supervised"][:], dtype=np.int64)
        kept = np.flatnonzero(num_supervised)
        ends = np.searchsorted(kept, np.cumsum([len(rows) for rows in sets]))
        self.mixture = Mixture(np.diff(ends, prepend=0).tolist(), weights)
        self._rows = rows.select(kept)
        self._tokens = self._rows.select_columns(["input_ids", "supervised"])
        self.num_supervised = num_supervised[kept]
        numpy_rows = self._rows.with_format("numpy")
        self.num_tokens = np.asarray(numpy_rows["num_tokens"][:], dtype=np.int64)
        self.num_truncated = int(np.sum(numpy_rows["truncated"][:]))
        self.num_dropped = len(rows) - len(kept)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where not supervised) of one sample, of the same length."""
        row = self._tokens[int(index)]
        ids = row["input_ids"]
        return ids, [token if flag else IGNORED for token, flag in zip(ids, row["supervised"], strict=True)]

    def messages(self, index: int) -> list[Message]:
        """The conversation itself, uncut."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in self._rows[int(index)]["messages"]]

    def origin(self, index: int) -> str:
        """File and row that a sample came from."""
        row = self._rows[int(index)]
        return f"{row['path']}, row {row['row']}"


def load_instructions(
    sources: Sequence[DataSource], key: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> InstructionDataset:
    """Read, check and tokenise data files, or take the result of an earlier time from the cache of `datasets`.

    May be called on every rank at once: the first process of a machine does the work under a file lock and the others
    wait for its file. Every rank gets the same rows or the same error.

    Args:
        sources: files, joined in this order
        key: recipe key that names the sources, for messages
        tokenizer: a fast tokenizer with a chat template
        max_length: tokens of a sample; what is longer is cut at the end

    Raises:
        DataError: no source, a wrong file or row, or nothing left to learn within max_length
        ModelError: the tokenizer or its chat template cannot be used
    """
    if not sources:
        raise DataError(f"{key} names no file. Add one, e.g. {key}: [{{path: data/train.jsonl}}].")
    paths = [source.path for source in sources]
    if "" in paths:
        raise DataError(f"{key}[{paths.index('')}].path is empty, but it must name a file, e.g. data/train.jsonl.")
    digests = [_source_digest(path, tokenizer, max_length) for path in paths]
    sets = [_tokenised(*part, tokenizer, max_length) for part in zip(paths, digests, strict=True)]
    weights = [weight for source in sources if (weight := source.weight) is not None] or None
    fingerprint = hashlib.sha256(json.dumps([digests, weights]).encode()).hexdigest()
    dataset = InstructionDataset(sets, weights, fingerprint)
    _check_sizes(dataset, sources, key, max_length)
    return dataset


def _check_sizes(dataset: InstructionDataset, sources: Sequence[DataSource], key: str, max_length: int) -> None:
    """Every set has something to learn, and every weight gives it at least one place of an epoch."""
    mixture = dataset.mixture
    for place, (source, size, quota) in enumerate(zip(sources, mixture.sizes, mixture.quotas, strict=True)):
        if not size:
            raise DataError(
                f"{key}[{place}]: none of the samples of {source.path} has a token to learn within data.max_length = "
                f"{max_length}. Raise data.max_length or shorten the prompts."
            )
        if not quota:
            raise DataError(
                f"{key}[{place}].weight is {source.weight}, but it must be large enough for one of the "
                f"{mixture.num_places} samples of an epoch. Raise it, or take {source.path} out."
            )


def _source_digest(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Of everything that decides about the tokens of one set."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    for state in ("truncation", "padding"):  # left over from the last call, without influence on ours
        backend.pop(state, None)
    parts = [chat_template_of(tokenizer), tokenizer.special_tokens_map, backend, max_length]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    digest.update(_content_digest(path))
    return digest.hexdigest()


def _tokenised(path: str, digest: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    # The rows name their files, so equal content under another path is another file of the cache.
    versions = [CACHE_VERSION, datasets.__version__, tokenizers.__version__, transformers.__version__]
    with cache_file([digest, path, versions], ".arrow") as file:
        return _from_cache(file) or _tokenise(path, tokenizer, max_length, file)


def _content_digest(path: str) -> bytes:
    check_path(Path(path))
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check who may read it.") from None


def _from_cache(file: Path) -> datasets.Dataset | None:
    return datasets.Dataset.from_file(str(file)) if file.exists() else None


def _tokenise(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, file: Path) -> datasets.Dataset:
    conversations = list(read_conversations(path))
    columns = {name: [getattr(c, name) for c in conversations] for name in ("messages", "path", "row")}

    def tokenise_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parts = zip(batch["messages"], batch["path"], batch["row"], strict=True)
        chats = tokenise_chats(tokenizer, [Conversation(*part) for part in parts])
        # The first token is never the target of a prediction, whatever the template says.
        supervised = [[False, *chat.supervised[1:max_length]] for chat in chats]
        ids = [chat.input_ids[:max_length] for chat in chats]
        return {
            "input_ids": ids,
            "supervised": supervised,
            "num_tokens": [len(sample) for sample in ids],
            "num_supervised": [sum(flags) for flags in supervised],
            "truncated": [len(chat.input_ids) > max_length for chat in chats],
        }

    # `map` writes to a temporary file and renames it: a process that is killed here leaves nothing half-done. The
    # fingerprint is ours, because the one of `datasets` would hash the tokenizer object, which changes with use.
    return datasets.Dataset.from_dict(columns).map(
        tokenise_batch,
        batched=True,
        batch_size=256,
        cache_file_name=str(file),
        new_fingerprint=file.stem[:16],
        desc="Tokenising",
    )

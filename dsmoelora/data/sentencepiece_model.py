"""Tokenizers that come as a bare sentencepiece file (`tokenizer.model`), as those of Llama 2 and Mistral once did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import generate_merges

from dsmoelora.errors import ModelError

FILE = "tokenizer.model"
_BPE = 2  # TrainerSpec.ModelType of sentencepiece


def has_sentencepiece_alone(folder: Path) -> bool:
    """Whether the tokenizer of a model's folder is a sentencepiece file that nobody has converted yet."""
    return (folder / FILE).is_file() and not (folder / "tokenizer.json").exists()


def load_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer that gives the pieces that sentencepiece gives (but for a text that begins with a space).

    Where a `tokenizer_config.json` names a class it is of this class, otherwise it is Llama's with the special tokens
    of the file, and a text begins with the beginning-of-sequence token.

    Raises:
        ModelError: the file is no sentencepiece model, or it is not clear how to use it
    """
    path = folder / FILE
    spec = sentencepiece_model_pb2.ModelProto()
    try:
        spec.ParseFromString(path.read_bytes())
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # of protobuf and of C++; whatever it is, the file is something else
        raise ModelError(
            f"{path} is no sentencepiece model ({type(error).__name__}). Give the folder that has the tokenizer.json."
        ) from None
    is_bpe = spec.trainer_spec.model_type == _BPE
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif is_bpe:
        tokenizer = _as_llama(spec, pieces)
    else:
        raise ModelError(
            f"{path} is a sentencepiece model, but not of type BPE, and without a tokenizer_config.json nobody knows "
            "its class. Add the model's tokenizer_config.json or tokenizer.json."
        )
    if is_bpe and isinstance(tokenizer, LlamaTokenizer):
        # transformers merges in the order of the pieces' ids, and so cuts runs of spaces in another way than the
        # model has learned: the order is that of their scores.
        tokenizer.backend_tokenizer.model = BPE(
            _vocab(pieces), generate_merges(_vocab(pieces), _scores(pieces)), fuse_unk=True, byte_fallback=True
        )
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _as_llama(spec: Any, pieces: sentencepiece.SentencePieceProcessor) -> LlamaTokenizer:
    ids = {name: getattr(pieces, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    special = {f"{name}_token": pieces.id_to_piece(i) if i >= 0 else None for name, i in ids.items()}
    return LlamaTokenizer(
        vocab=_vocab(pieces),
        add_bos_token=special["bos_token"] is not None,
        add_prefix_space=spec.normalizer_spec.add_dummy_prefix,
        **special,
    )


def _vocab(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    return {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}


def _scores(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, float]:
    return {piece: pieces.get_score(i) for piece, i in _vocab(pieces).items()}

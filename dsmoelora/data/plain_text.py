"""Text to tokens: as it is, with one token that begins it and one that ends it, whoever wrote them."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is learned, up to and including the end-of-sequence token.

    The text may bring the beginning- and end-of-sequence tokens itself, with white space around them, and the tokenizer
    may add them: each comes once. Inside the text they stay as they are.
    """
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    if end:
        own = re.escape(end)
        text = re.sub(rf"{own}(?:\s*{own})*\s*\Z", lambda _: end, text)
    if begin:
        own = re.escape(begin)
        text = re.sub(rf"\A\s*{own}(?:\s*{own})*", lambda _: begin, text)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if begin and ids[:2] == [tokenizer.bos_token_id] * 2:  # its own, and the one that the tokenizer adds
        ids = ids[1:]
    if end and ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    if end and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids

"""Tokenised samples for the eye: what the model reads, and which part of it is learned."""

from __future__ import annotations

from itertools import groupby

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.dataset import IGNORED, InstructionDataset
from dsmoelora.data.report import all_losses

PLAIN = ("⟦", "⟧")
COLOUR = ("[bold green]", "[/bold green]")


def preview(
    dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase, count: int, *, markup: bool = False
) -> str:
    """The first `count` samples as text, special tokens included, with what is learned between marks.

    The marks are ⟦ and ⟧; with `markup` they are rich's markup for green, and the rest is escaped for it.
    """
    count = min(count, len(dataset))
    legend = "in green" if markup else f"between {PLAIN[0]} and {PLAIN[1]}"
    lines = [f"{count} of {len(dataset)} samples; the model learns to write what is {legend}, and only reads the rest."]
    for index in range(count):
        num_tokens, num_supervised = int(dataset.num_tokens[index]), int(dataset.num_supervised[index])
        counts = f"{num_tokens} tokens, {num_supervised} of them learned"
        header = f"--- {dataset.origin(index)}: {counts}"
        lines += ["", escape(header) if markup else header, _marked(dataset, tokenizer, index, markup)]
    lost = all_losses(dataset.reports)
    lines += ["", *(escape(line) if markup else line for line in lost)] if lost else []
    return "\n".join(lines)


def _marked(dataset: InstructionDataset, tokenizer: PreTrainedTokenizerBase, index: int, markup: bool) -> str:
    ids, labels = dataset.sample(index)
    begin, end = COLOUR if markup else PLAIN
    text = ""
    for learned, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        piece = escape(piece) if markup else piece
        text += f"{begin}{piece}{end}" if learned else piece
    return text

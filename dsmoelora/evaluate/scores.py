"""The scores: what a model is made to do with an item, and what comes of it.

loss     the negative log likelihood of what would be learned, in nats a token: the `eval/loss` of training
exact    the greedy answer is the wanted one, but for capitals and white space
number   the last number of the greedy answer is the wanted answer's
choice   the likeliest of the answers that may be chosen is the right one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsmoelora.data.chat import Prompt
from dsmoelora.evaluate.items import Item
from dsmoelora.evaluate.marks import last_number, normalised, wanted_number
from dsmoelora.evaluate.reader import Tokens

ScoreName = Literal["loss", "exact", "number", "choice"]
Outcome = dict[str, Any]  # JSON-able
PER_BYTE = "score_per_byte"


class Reads(Protocol):
    """What a score asks of a model (see `reader.Reader`)."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers of the assistant."""

    def nlls(self, texts: Sequence[Tokens]) -> list[list[float]]:
        """For each text the negative log likelihoods of its labelled tokens, in nats."""


@dataclass(frozen=True)
class Score:
    """One way to score.

    Args:
        outcomes: of items, in their order; each has `score`, and what it comes from
        shares: outcome keys that are 1 for right and 0 for wrong, with what they are called; none where the score is a
            mean over `num_tokens`
    """

    outcomes: Callable[[Reads, Sequence[Item]], list[Outcome]]
    shares: dict[str, str]

    def shares_of(self, items: Sequence[Item]) -> dict[str, str]:
        """Those of `shares` that differ: among answers of one length, as letters are, per byte is what it is in all."""
        even = all(len({len(answer.encode()) for answer in item.answers}) == 1 for item in items)
        return {key: name for key, name in self.shares.items() if not (even and key == PER_BYTE)}


def loss(reader: Reads, items: Sequence[Item]) -> list[Outcome]:
    """`score`: mean over `num_tokens` labelled tokens of the only text."""
    found = reader.nlls([item.texts[0] for item in items])
    return [{"score": math.fsum(nlls) / len(nlls), "num_tokens": len(nlls)} for nlls in found]


def exact(reader: Reads, items: Sequence[Item]) -> list[Outcome]:
    """`answer`; `score`: whether it is the wanted one."""
    return _generated(reader, items, lambda answer, wanted: normalised(answer) == normalised(wanted))


def number(reader: Reads, items: Sequence[Item]) -> list[Outcome]:
    """`answer`; `score`: whether its last number is the one that the wanted answer comes to."""
    return _generated(reader, items, lambda answer, wanted: last_number(answer) == wanted_number(wanted))


def choice(reader: Reads, items: Sequence[Item]) -> list[Outcome]:
    """`log_likelihoods` of the answers, in nats; `answer`: the likeliest; `score`: whether it is the right one.

    `score_per_byte`: the same for log likelihoods divided by the answers' bytes, so that long answers have a chance.
    """
    nlls = iter(reader.nlls([text for item in items for text in item.texts]))
    outcomes = []
    for item in items:
        likelihoods = [-math.fsum(next(nlls)) for _ in item.texts]
        sizes = [len(answer.encode()) for answer in item.answers]
        best = _largest(likelihoods)
        per_byte = _largest([value / size for value, size in zip(likelihoods, sizes, strict=True)])
        outcomes.append(
            {
                "answer": item.answers[best],
                "score": int(best == item.right),
                PER_BYTE: int(per_byte == item.right),
                "log_likelihoods": likelihoods,
            }
        )
    return outcomes


SCORES: dict[ScoreName, Score] = {
    "loss": Score(loss, {}),
    "exact": Score(exact, {"score": "exact"}),
    "number": Score(number, {"score": "number"}),
    "choice": Score(choice, {"score": "choice", PER_BYTE: "choice/byte"}),
}


def _generated(reader: Reads, items: Sequence[Item], is_right: Callable[[str, str], bool]) -> list[Outcome]:
    prompts = [item.prompt for item in items if item.prompt is not None]
    answers = reader.answers(prompts)
    return [
        {"answer": answer, "score": int(is_right(answer, item.wanted))}
        for item, answer in zip(items, answers, strict=True)
    ]


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)

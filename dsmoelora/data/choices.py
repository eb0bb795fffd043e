"""Multiple choice: the texts to choose from, and which of them an answer means."""

from __future__ import annotations

import ast
import json
import string
from dataclasses import dataclass
from typing import Any, Literal

from dsmoelora.data.problems import RowProblem, found, shown, words
from dsmoelora.errors import listing

AnswerIs = Literal["index", "letter", "text"]


@dataclass(frozen=True)
class Choice:
    """A question with several answers to choose from.

    Args:
        question: without the answers
        texts: of the answers
        right: which one is
    """

    question: str
    texts: tuple[str, ...]
    right: int

    @property
    def letters(self) -> str:
        """A letter for each answer."""
        return string.ascii_uppercase[: len(self.texts)]

    def listed(self) -> str:
        """The question with its answers below, each behind its letter."""
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip(self.letters, self.texts, strict=True))
        return f"{self.question}\n\n{lines}"


def choices_of(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The texts, and the labels that come with them; none where choices are counted.

    Raises:
        RowProblem: there are too few or too many, or the labels do not fit
    """
    given, labels = row.get("choices"), None
    if isinstance(given, dict) and "text" in given:  # {"text": [...], "label": [...]}, as on the hub
        labels = given.get("label")
        row = {**row, "choices": given["text"]}
    texts = [words(f"choices[{i}]", text) for i, text in enumerate(list_of(row, "choices"))]
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise RowProblem(f"choices has {len(texts)} entries, but it must have 2 to {len(string.ascii_uppercase)}.")
    if labels is None:
        return texts, []
    names = [_as_text(label) for label in list_of({"choices.label": labels}, "choices.label")]
    if len(names) != len(texts) or len({name.casefold() for name in names}) != len(texts):
        raise RowProblem(
            f"choices.label is {', '.join(names) or 'empty'}, but it must have another label for each of the "
            f"{len(texts)} entries of choices.text."
        )
    return texts, names


def answer_of(row: dict[str, Any], texts: list[str], labels: list[str], answer_is: AnswerIs | None) -> int:
    """Which choice is right.

    It is one of the labels where there are any; otherwise a number counted from 0, a letter, or a choice's text. A
    number beside labels is a label too: where they begin with 1, so does the count.

    Args:
        row: with `answer` or `answerKey`
        texts, labels: of `choices_of`
        answer_is: the one way to read the answer, where the source says so; the labels are letters then

    Raises:
        RowProblem: it means no choice, or may mean several
    """
    key = "answerKey" if "answerKey" in row and "answer" not in row else "answer"
    answer = row.get(key)
    letters = labels or list(string.ascii_uppercase[: len(texts)])
    ways: dict[AnswerIs, list[str]] = {"index": [str(i) for i in range(len(texts))], "letter": letters, "text": texts}
    if answer_is is not None:
        ways = {answer_is: ways[answer_is]}
    elif labels:
        ways = {"letter": labels}
    readings = [(way, place) for way, known in ways.items() for place in _places(answer, known)]
    if len({place for _, place in readings}) > 1:
        raise _ambiguous(key, answer, texts, letters, readings)
    if readings:
        return readings[0][1]
    how = {
        "index": f"0 to {len(texts) - 1} (counted from 0)",
        "letter": f"one of {', '.join(letters)}",
        "text": "the text of a choice",
    }
    allowed = " or ".join(how[way] for way in ways)
    allowed = f"one of {allowed}" if "index" in ways else allowed
    what = repr(answer) if isinstance(answer, int) else found(row, key)
    raise RowProblem(f"{key} is {what}, but it must be {allowed}, for choices has {len(texts)} entries.")


def list_of(row: dict[str, Any], key: str) -> list[Any]:
    """A list, or the text of one: files without nested types, such as CSV, have no other way to write it.

    Raises:
        RowProblem: it is neither
    """
    value = row.get(key)
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, list):
        raise RowProblem(f"{key} is {found({**row, key: value} if key in row else row, key)}, but it must be a list.")
    return value


def _places(answer: Any, known: list[str]) -> list[int]:
    """Where it is among the known ones: as it is written, else with small and capital letters alike."""
    if not isinstance(answer, str | int | float):
        return []
    name = _as_text(answer)
    exact = [place for place, each in enumerate(known) if each.strip() == name]
    return exact or [place for place, each in enumerate(known) if each.strip().casefold() == name.casefold()]


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps, as pandas keeps it
        value = int(value)
    return str(value).strip()


def _ambiguous(
    key: str, answer: Any, texts: list[str], letters: list[str], readings: list[tuple[AnswerIs, int]]
) -> RowProblem:
    says = {"index": "counted from 0", "letter": "as a letter", "text": "as the text of a choice"}
    meant = [f"{says[way]} it is {letters[place]} ({shown(texts[place])})" for way, place in readings]
    ways = list(dict.fromkeys(way for way, _ in readings))
    remedy = f"Say which is meant beside the path: {' or '.join(f'answer_is: {way}' for way in ways)}."
    if len(ways) == 1:
        remedy = "Give the choices different texts, or the answer as a letter."
    return RowProblem(f"{key} is {shown(answer)}, which has several readings: {listing(meant)}. {remedy}")

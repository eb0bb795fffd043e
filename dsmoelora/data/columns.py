"""Which columns make up a format, and which format a set of columns is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dsmoelora.config import DataSource
from dsmoelora.data.keys import READ_COLUMNS
from dsmoelora.data.problems import FormatProblem
from dsmoelora.errors import listing

QUESTIONS = ("question", "question_stem", "instruction")
TURNS = ("messages", "conversation", "dialog", "dialogue")  # what a list of turns is called


@dataclass(frozen=True)
class Columns:
    """A way to write a conversation in columns.

    Args:
        required: a row that has all of these is of this format ...
        unless: ... but not if it has one of these
        optional: what is read beside them
    """

    required: frozenset[str]
    unless: frozenset[str]
    optional: frozenset[str]


def _columns(required: str, optional: Iterable[str] = (), unless: str = "") -> Columns:
    return Columns(frozenset(required.split()), frozenset(unless.split()), frozenset(optional))


# Where a column holds the written answer, choices are but a remark; where anything else fits, text is the whole of it.
_ANSWERS = "output completion"
COLUMNS: dict[str, Columns] = {
    "messages": _columns("messages", TURNS),
    "sharegpt": _columns("conversations"),
    "alpaca": _columns("instruction output", ("input", "history")),
    "prompt_completion": _columns("prompt completion"),
    "multiple_choice": _columns("choices answer", (*QUESTIONS, "input", "answerKey"), _ANSWERS),
    "text": _columns("text"),
}


def format_of(names: Collection[str]) -> str:
    """The format that these columns are.

    Raises:
        FormatProblem: there are several, or none
    """
    known = {*names, "answer"} if "answerKey" in names else set(names)
    fitting = [name for name, each in COLUMNS.items() if each.required <= known and not each.unless & known]
    if fitting in ([], ["text"]):  # other names for messages
        turns = [name for name in TURNS if name in known]
        if len(turns) > 1:
            raise FormatProblem(
                f"its columns are {listing(names)}, and {' and '.join(turns)} may each be the conversation. Say which "
                f"one is meant beside the path, e.g. fields: {{messages: {turns[0]}}}."
            )
        fitting = ["messages"] if turns else fitting
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise FormatProblem(
            f"its columns are {listing(names)}, which fit several formats. Say which one is meant beside the path, "
            f"e.g. format: {' or format: '.join(fitting)}."
        )
    raise FormatProblem(_no_format(names))


def needed(names: list[str], source: DataSource) -> list[str]:
    """Those of a table's columns that are read; all where it is not clear what they are."""
    try:
        chosen = format_of({*names, *source.fields}) if source.format == "auto" else source.format
    except FormatProblem:
        return names
    columns = COLUMNS[chosen]
    read = columns.required | columns.optional | READ_COLUMNS | set(source.fields.values())
    return [name for name in names if name in read] or names


def _no_format(names: Collection[str]) -> str:
    nearest = [
        f"{name} lacks {listing(sorted(known.required - set(names)))}"
        for name, known in COLUMNS.items()
        if known.required & set(names)
    ]
    what = f"its columns are {listing(names) or '(none)'}, which fit no known format"
    what += f" ({'; '.join(nearest)})." if nearest else "."
    known = "; ".join(f"{name}: {' + '.join(sorted(each.required))}" for name, each in COLUMNS.items())
    return (
        f"{what} Known are {known}. Rename the columns (in CSV: in the first line), or name them beside the path, e.g. "
        "fields: {instruction: question, output: reply}."
    )

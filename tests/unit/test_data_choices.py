"""Multiple choice: an answer has one reading, or the source says which."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoelora.config import DataConfig, DataSource
from dsmoelora.data.formats import Conversation, RowParser
from dsmoelora.errors import ConfigError, DataError


def parsed(choices: Any, answer: Any, **options: Any) -> Conversation:
    row = {"question": "q", "choices": choices, "answer": answer}
    return RowParser(DataSource("rows.jsonl", **options), "rows.jsonl", "skip")(1, row)


def letter(choices: Any, answer: Any, **options: Any) -> str:
    found = parsed(choices, answer, **options)
    assert not found.problem
    return str(found.messages[-1]["content"])


NUMBERS = ["1", "2", "3", "4"]
LETTERS = ["B", "A", "C"]


@pytest.mark.parametrize("answer", ["2", 2, 2.0, " 2 "])
def test_a_position_and_a_text(answer: Any) -> None:
    problem = parsed(NUMBERS, answer).problem
    assert "counted from 0 it is C ('3'), as the text of a choice it is B ('2')" in problem
    assert "answer_is: index or answer_is: text" in problem
    assert letter(NUMBERS, answer, answer_is="index") == "C"
    assert letter(NUMBERS, answer, answer_is="text") == "B"


def test_a_letter_and_a_text() -> None:
    problem = parsed(LETTERS, "A").problem
    assert "as a letter it is A ('B'), as the text of a choice it is B ('A')" in problem
    assert "answer_is: letter or answer_is: text" in problem
    assert letter(LETTERS, "A", answer_is="letter") == "A"
    assert letter(LETTERS, "A", answer_is="text") == "B"
    assert letter(LETTERS, "C") == "C"  # both mean the same


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["red", "blue"], "blue", "B"),
        (["red", "blue"], "Blue ", "B"),
        (["US", "us"], "us", "B"),
        (["10", "20", "30"], 20, "B"),
        (["False", "True"], True, "B"),
        (["0", "1"], 1, "B"),
        (["A", "B"], "b", "B"),
    ],
)
def test_one_reading_needs_no_key(choices: list[str], answer: Any, right: str) -> None:
    assert letter(choices, answer) == right


def test_two_choices_with_one_text() -> None:
    problem = parsed(["red", "red", "blue"], "red").problem
    assert "it is A ('red'), as the text of a choice it is B ('red'). Give the choices different texts" in problem


@pytest.mark.parametrize(("answer_is", "answer"), [("index", "A"), ("letter", 0), ("text", "A"), ("text", 0)])
def test_another_reading_than_the_source_says(answer_is: str, answer: Any) -> None:
    assert f"answer is {answer!r}, but it must be " in parsed(["red", "blue"], answer, answer_is=answer_is).problem


def test_labels_are_the_only_reading_unless_the_source_says_so() -> None:
    choices = {"text": ["2", "1"], "label": ["1", "2"]}
    assert letter(choices, "1") == letter(choices, "1", answer_is="letter") == "A"
    assert letter(choices, "1", answer_is="text") == letter(choices, "1", answer_is="index") == "B"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*"0123ABCabc", "red"]), min_size=2, max_size=5), st.sampled_from([*"0123ABCab", "red"])
)
def test_an_answer_is_accepted_only_where_all_readings_agree(choices: list[str], answer: str) -> None:
    """Readings by hand, against the parser."""
    readings = {int(answer)} if answer.isdecimal() and int(answer) < len(choices) else set()
    place = string.ascii_lowercase.find(answer) if len(answer) == 1 else string.ascii_uppercase.find(answer)
    place = string.ascii_lowercase.find(answer.lower()) if len(answer) == 1 else place
    readings |= {place} if 0 <= place < len(choices) else set()
    same = {i for i, text in enumerate(choices) if text == answer}
    readings |= same or {i for i, text in enumerate(choices) if text.lower() == answer.lower()}
    found = parsed(choices, answer)
    assert bool(found.problem) == (len(readings) != 1)
    if not found.problem:
        assert found.messages[-1]["content"] == string.ascii_uppercase[readings.pop()]


def test_nothing_reads_the_key_in_other_formats() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.train\[0\]\.answer_is is 'text', but it must be null with format alpaca"
    ):
        DataConfig(train=[DataSource("a.jsonl", format="alpaca", answer_is="text")])
    parser = RowParser(DataSource("a.jsonl", answer_is="text"), "a.jsonl", "error")
    with pytest.raises(DataError, match=r"answer_is is 'text', but these rows are of format alpaca.*Drop answer_is"):
        parser(1, {"instruction": "a", "output": "b"})

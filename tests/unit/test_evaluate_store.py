"""What an evaluation keeps comes back as it was, and what a kill has torn is done again."""

from __future__ import annotations

from pathlib import Path

from dsmoelora.evaluate.store import Store


def test_answers_come_back_whatever_is_in_them(tmp_path: Path) -> None:
    """Unicode has more that ends a line than JSON lines do."""
    store = Store(tmp_path)
    store.open({"score": "exact"})
    outcomes = [{"answer": f"a{end}b", "score": 1} for end in ("\u2028", "\u2029", "\x85", "\n", "\r", "\x0b", "é")]
    store.add("base", 0, outcomes, 0)
    assert store.finished("base") == {0: outcomes}


def test_a_batch_that_is_torn_in_a_letter_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open({"score": "exact"})
    (tmp_path / "parts" / "rank-00000.jsonl").write_bytes('{"stage": "base", "outcomes": ["é'.encode()[:-1])
    assert store.finished("base") == {}
    store.add("base", 1, [{"answer": "a", "score": 0}], 0)
    assert list(store.finished("base")) == [1]

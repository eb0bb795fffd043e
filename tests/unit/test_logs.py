"""Log messages: warnings come through, noise does not, and other ranks do not repeat it all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from dsmoelora.errors import ConfigError
from dsmoelora.logs import setup_logging


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, deepspeed = logging.getLogger(), logging.getLogger("DeepSpeed")
    before = (root.handlers[:], root.level, deepspeed.handlers[:], deepspeed.level, deepspeed.propagate)
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.handlers[:], root.level, deepspeed.handlers[:], deepspeed.level, deepspeed.propagate = before


def say_everything() -> None:
    logging.getLogger("dsmoelora.test").info("a detail")
    logging.getLogger("dsmoelora.test").warning("a warning")
    logging.getLogger("DeepSpeed").warning("its own warning")
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
    logging.getLogger("dsmoelora.test").error("an error")


@pytest.mark.parametrize(
    ("rank", "verbose", "said"),
    [
        (0, False, ["a warning", "its own warning", "an error"]),
        (0, True, ["a detail", "a warning", "its own warning", "an error"]),
        (3, False, ["an error"]),
    ],
)
def test_who_says_what(capsys: pytest.CaptureFixture[str], rank: int, verbose: bool, said: list[str]) -> None:
    setup_logging(rank, verbose)
    say_everything()
    captured = capsys.readouterr()
    assert [line.partition(": ")[2] for line in captured.err.splitlines()] == said
    assert captured.out == ""
    assert ("(rank 3)" in captured.err) == (rank == 3)


def test_the_environment_sets_any_level(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSMOELORA_LOG_LEVEL", "error")
    setup_logging(0)
    say_everything()
    assert capsys.readouterr().err == "ERROR dsmoelora.test: an error\n"


def test_an_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOELORA_LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigError, match="DSMOELORA_LOG_LEVEL is 'LOUD'"):
        setup_logging(0)

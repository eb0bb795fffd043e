"""What the README tells people to type is there: programs, their flags, files; and its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MADE_BY_THE_READER = ("mine.yaml", "data/mine.jsonl", "runs/", "adapters/", "exported", "models/", "docs/demo.png")


def commands() -> list[list[str]]:
    """Every line of a program of launch/, in words, from the program on; as often as it is said."""
    blocks = re.findall(r"^    (.*launch/\w+\.py .*)$", README, flags=re.MULTILINE)
    inline = re.findall(r"`(?:deepspeed|python)[^`]*launch/\w+\.py[^`]*`", README)
    lines = [*blocks, *(one.strip("`") for one in inline)]
    found = [shlex.split(line.split("  #")[0].replace("...", "")) for line in lines if "runs/<name>" not in line]
    return [words[next(k for k, word in enumerate(words) if word.startswith("launch/")) :] for words in found]


def help_of(program: str, monkeypatch: pytest.MonkeyPatch) -> str:
    module = import_module(f"launch.{Path(program).stem}")
    monkeypatch.setattr("sys.argv", [program, "--help"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        module.main()
    return said.getvalue()


def test_there_are_commands() -> None:
    assert {words[0] for words in commands()} >= {
        f"launch/{name}.py" for name in ("train", "evaluate", "export", "serve")
    }


@pytest.mark.parametrize("program", sorted({words[0] for words in commands()}))
def test_programs_know_their_flags(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(re.findall(r"--[\w.-]+", help_of(program, monkeypatch)))
    given = {word for words in commands() if words[0] == program for word in words if word.startswith("--")}
    assert given <= known, f"{program} knows no {sorted(given - known)}"


def test_files_are_there() -> None:
    words = {
        word for words in commands() for word in words if "/" in word or word.endswith((".yaml", ".json", ".jsonl"))
    }
    files = {word for word in words if not word.startswith(("[", *MADE_BY_THE_READER))}
    assert files and not [file for file in files if not (ROOT / file).exists()]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 20 and not [link for link in links if not (ROOT / link).exists()]

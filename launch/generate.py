"""Talk to a trained adapter: `python launch/generate.py --adapter runs/demo/adapter --prompt "..."`.

One process, without DeepSpeed: a plain transformers model with its experts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import transformers
from transformers import PreTrainedTokenizerBase

from dsmoelora.cli import run_guarded
from dsmoelora.data.chat import Prompt
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.tools import tools_of
from dsmoelora.errors import ModelError, bad_value
from dsmoelora.model import load_trained
from dsmoelora.model.inputs import greedy_answers


def main() -> None:
    """Answer every prompt, greedily."""
    options = parse_options(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_trained(options.adapter, options.base, options.trust_remote_code)
    for prompt in options.prompt:
        if len(options.prompt) > 1:
            print(f"> {prompt}")
        print(answer(model, tokenizer, prompt, options.system, options.max_new_tokens, options.tools))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: no room for an answer, or a file of tools that holds none
    """
    parser = argparse.ArgumentParser(description="Talk to a trained adapter.", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, e.g. runs/demo/adapter")
    parser.add_argument("--prompt", action="append", required=True, help="what the user says; may be repeated")
    parser.add_argument("--system", help="system message, where the chat template knows one")
    parser.add_argument("--tools", type=Path, help="JSON file with functions it may call, as in rows of data")
    parser.add_argument("--base", help="folder of the base model; default: the one named in adapter_config.json")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer at most")
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        raise bad_value("--max-new-tokens", options.max_new_tokens, "1 or more", "The default is 128.")
    options.tools = None if options.tools is None else read_tools(options.tools)
    return options


def read_tools(file: Path) -> list[dict[str, Any]]:
    """The tools in a JSON file, in any form that rows of data may have.

    Raises:
        ConfigError: there are none
    """
    try:
        tools = tools_of({"tools": file.read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError, RowProblem) as problem:
        raise bad_value("--tools", str(file), "a JSON file with a list of functions", str(problem)) from None
    if tools is None:
        raise bad_value("--tools", str(file), "a JSON file with a list of functions", "It names none.")
    return tools


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str | None,
    max_new_tokens: int,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The assistant's greedy answer to one prompt.

    Raises:
        ModelError: the chat template refuses it, as some refuse every system message
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        (text,) = greedy_answers(model, tokenizer, [Prompt(messages, tools)], max_new_tokens)
    except RowProblem as problem:
        if not system:
            raise ModelError(f"The prompt cannot be asked: {problem}") from None
        raise ModelError(f"--system cannot be used: {problem} Leave --system out.") from None
    return text


if __name__ == "__main__":
    sys.exit(run_guarded(main))

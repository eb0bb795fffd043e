"""Talk to a trained adapter: `python launch/generate.py --adapter runs/demo/adapter --prompt "..."`.

`--chat` instead of `--prompt` goes on until an empty line. One process, without DeepSpeed: a plain transformers model
with its experts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import transformers
from transformers import PreTrainedTokenizerBase, TextStreamer

from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.config.run import QUANTIZE
from dsmoelora.data.chat import Prompt
from dsmoelora.data.limits import LimitProblem
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.tools import tools_of
from dsmoelora.data.turns import Message
from dsmoelora.errors import ModelError, bad_value
from dsmoelora.model import load_trained
from dsmoelora.model.inputs import greedy_answers


def main() -> None:
    """Answer every prompt, or talk; greedily."""
    options = parse_options(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_trained(options.adapter, options.base, options.trust_remote_code, options.quantize)
    if options.chat:
        chat(model, tokenizer, options.system, options.max_new_tokens, options.tools)
    for prompt in options.prompt or []:
        if len(options.prompt) > 1:
            print(f"> {prompt}")
        print(answer(model, tokenizer, prompt, options.system, options.max_new_tokens, options.tools))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: no room for an answer, or a file of tools that holds none
    """
    parser = FlagParser(description="Talk to a trained adapter.", allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, e.g. runs/demo/adapter")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="what the user says; may be repeated")
    asked.add_argument("--chat", action="store_true", help="talk in the terminal until an empty line")
    parser.add_argument("--system", help="system message, where the chat template knows one")
    parser.add_argument("--tools", type=Path, help="JSON file with functions it may call, as in rows of data")
    parser.add_argument("--base", help="folder of the base model; default: the one named in adapter_config.json")
    parser.add_argument("--quantize", choices=QUANTIZE, default="none", help="how the base's weights are kept")
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
        ModelError: the chat template refuses it, as some refuse every system message, or it is beyond what the model
            has embeddings for
    """
    messages = [*_opening(system), {"role": "user", "content": prompt}]
    return _answered(model, tokenizer, Prompt(messages, tools), max_new_tokens)


def chat(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    max_new_tokens: int,
    tools: list[dict[str, Any]] | None = None,
) -> None:
    """Answer line by line, with all that was said before, until an empty line or the end of the input.

    Answers appear word by word; `/new` begins anew.

    Raises:
        ModelError: as `answer`
    """
    print("Say something; /new forgets what was said, an empty line ends it.")
    messages = _opening(system)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while said := _line():
        if said == "/new":
            messages = _opening(system)
            continue
        messages.append({"role": "user", "content": said})
        text = _answered(model, tokenizer, Prompt(messages, tools), max_new_tokens, streamer=streamer)
        messages.append({"role": "assistant", "content": text})


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()  # what the shell says next has a line of its own
        return ""


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_new_tokens: int, **options: Any
) -> str:
    try:
        (text,) = greedy_answers(model, tokenizer, [prompt], max_new_tokens, **options)
    except RowProblem as problem:
        if prompt.messages[0]["role"] != "system" or isinstance(problem, LimitProblem):
            raise ModelError(f"The prompt cannot be asked: {problem}") from None
        raise ModelError(f"--system cannot be used: {problem} Leave --system out.") from None
    return text


if __name__ == "__main__":
    sys.exit(run_guarded(main))

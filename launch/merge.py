"""Merge adapters, ours and PEFT's LoRA, into one, or into the weights of their base model.

    python launch/merge.py --adapters adapters/maths adapters/code --out merged
    python launch/merge.py --adapters site-1 site-2 --weights 0.7 0.3 --method svd --rank 16 --out merged
    python launch/merge.py --adapters exported/expert-00 --into-base merged-model

`cat` puts the factors side by side, which is exact; `svd` takes the best update of a rank; `average` is the mean of `b`
where all have the same `a` (FFA-LoRA). Weights are 1 / n where none are given. One process, without DeepSpeed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import transformers

from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.given import open_folders
from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.config import AdapterConfig, ModelConfig
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.export import check_output, peft_base, write_loras
from dsmoelora.export.merge import KEY, Merge, add_to_base, check_base, plan_merge
from dsmoelora.model import load_tokenizer, pretrained

REMEDY = "Give its folder with --model, and --trust-remote-code where it brings code that you trust."


def main() -> None:
    """Merge as the command line says."""
    options = parse_options(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = options.out or options.into_base
    check_output(out, "--out" if options.out else "--into-base")
    folders = open_folders(options.adapters, key=KEY)
    merge = plan_merge(folders, options.weights, options.method, options.rank)
    base = options.model or folders[0].base_model
    shapes = {name: (layer.in_features, layer.out_features) for f in folders for name, layer in f.layers.items()}
    described = peft_base(base, shapes, options.trust_remote_code)
    if options.into_base:
        write_model(options, merge, base)
    elif options.format == "peft":
        write_loras(out, described, {"": merge.lora()})
        print(f'PEFT:  PeftModel.from_pretrained(base_model, "{out}")')
    else:
        write_ours(options, merge, base)
    adapters = "1 adapter" if len(folders) == 1 else f"{len(folders)} adapters"
    how = f"{options.method}, rank {merge.rank}" if options.out else options.method
    print(f"{adapters} on {len(shapes)} layers, merged ({how}): {out}")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: a flag is missing, out of range, or has no meaning beside another
    """
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True, help="folders of ours or of PEFT's LoRA")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each adapter; default: 1 / n")
    parser.add_argument("--method", choices=("cat", "svd", "average"), default="cat", help="default: cat")
    parser.add_argument("--rank", type=int, help="of --method svd; default: the largest of the adapters")
    parser.add_argument("--out", type=Path, help="folder for the merged adapter; must not exist")
    parser.add_argument("--format", choices=("peft", "dsmoelora"), help="of the folder of --out; default: peft")
    parser.add_argument("--into-base", type=Path, metavar="OUT", help="folder for the base model with the update in it")
    parser.add_argument("--model", help="folder of the base model; default: the one that the first adapter names")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    options = parser.parse_args(argv)
    if (options.out is None) == (options.into_base is None):
        raise ConfigError("Give one of --out (an adapter) and --into-base (a model).")
    if options.rank is not None and options.method != "svd":
        raise bad_value("--rank", options.rank, f"left out with --method {options.method}", "Take --method svd.")
    if options.rank is not None and options.rank < 1:
        raise bad_value("--rank", options.rank, "1 or more", "Leave it out for the default.")
    if options.into_base and options.format:
        raise bad_value("--format", options.format, "left out with --into-base, which writes a model", "Drop it.")
    options.format = options.format or "peft"
    return options


def base_model(options: argparse.Namespace, base: str) -> Any:
    """The base model in the dtype that it was saved in, on the CPU."""
    return pretrained(base, REMEDY, dtype="auto", trust_remote_code=options.trust_remote_code)


def write_model(options: argparse.Namespace, merge: Merge, base: str) -> None:
    """The base model with the update in its weights, as transformers saves it."""
    model = base_model(options, base)
    lost = add_to_base(model, merge)
    tokenizer = load_tokenizer(ModelConfig(path=base, trust_remote_code=options.trust_remote_code))

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    written_whole(options.into_base, "--into-base", save)
    print(f"Rounding to {model.dtype} changes {lost:.2g} of the update.")


def write_ours(options: argparse.Namespace, merge: Merge, base: str) -> None:
    """An adapter folder of ours with one expert."""
    lora = merge.lora()
    config = AdapterConfig(r=lora.r, lora_alpha=lora.alpha, num_experts=1, top_k=1, target_modules=list(lora.layers))
    tensors: dict[str, Any] = {}
    for name, (a_RD, b_OR) in lora.layers.items():
        tensors |= {f"{name}.experts.a": a_RD.t()[None], f"{name}.experts.b": b_OR[None]}
    prints = fingerprint(base_model(options, base).named_parameters())
    check_base(merge.folders, prints)
    tokenizer = load_tokenizer(ModelConfig(path=base, trust_remote_code=options.trust_remote_code))
    known = str(Path(base).resolve()) if Path(base).exists() else base
    write_adapter(options.out, config, list(lora.layers), tensors, known, prints, tokenizer.save_pretrained)


def written_whole(out: Path, flag: str, write: Callable[[Path], None]) -> None:
    """Write a folder under another name, and give it its own when it is whole.

    Raises:
        ConfigError: it cannot be written
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"{flag} is {str(out)!r}, which cannot be written ({error}). Name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_guarded(main))

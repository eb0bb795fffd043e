"""Turn a trained mixture into plain PEFT LoRA adapters, which PEFT loads and vLLM serves.

    python launch/export.py --adapter runs/demo/adapter --format peft --out exported
    python launch/export.py --adapter runs/demo/adapter --format average --data data/demo/eval.jsonl --out averaged

`peft` writes one adapter for each expert (exported/expert-00 ...). `average` writes a single one for the average gate
of each layer on a data file, and prints what that costs; with `--fit` the factors `b` are fitted to what the mixture
did there. With the router `constant` an average needs no data and costs nothing. One process, without DeepSpeed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

import transformers

from dsmoelora.adapters.folder_files import adapter_config, read_adapter_config
from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.config import AdapterConfig, DataSource, ModelConfig
from dsmoelora.data import InstructionDataset, load_instructions
from dsmoelora.data.report import all_losses
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.export import (
    Average,
    Lora,
    PeftBase,
    average_experts,
    check_output,
    expert_loras,
    peft_base,
    read_experts,
    same_for_every_token,
    write_loras,
)
from dsmoelora.model import limits_at, load_tokenizer, model_for_inference

NOT_THE_MIXTURE = "A mixture that is routed token by token cannot be merged into one LoRA adapter exactly"
# Of the flags that only --format average has.
DEFAULTS = {"rank": 0, "num_samples": 256, "max_length": None, "on_bad_row": "error", "fit": False}
NAMES = {"max_length": "data.max_length", "on_bad_row": "data.on_bad_row"}  # of flags that are called as in a recipe
MAX_LENGTH = 512  # tokens of a row at most, where nobody says how many and the model has as many positions
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank


def main() -> None:
    """Export as the command line says."""
    options = parse_options(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_output(options.out)
    base = options.model or read_adapter_config(options.adapter)["base_model_name_or_path"]
    config = adapter_config(read_adapter_config(options.adapter))
    if options.format == "peft":
        export_experts(options, base)
    elif config.router == "constant" and options.data is None:
        export_constant(options, base, config)
    else:
        export_average(options, base)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: a flag is missing, out of range, or has no meaning for the format
    """
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, e.g. runs/demo/adapter")
    parser.add_argument("--format", choices=("peft", "average"), required=True, help="one adapter an expert, or one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--model", help="folder of the base model; default: the one named in adapter_config.json")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    average = parser.add_argument_group("--format average")
    average.add_argument("--data", help="data file on which gates and losses are measured; best one not trained on")
    average.add_argument("--fit", action="store_true", default=None, help="fit b to what the mixture did on the rows")
    average.add_argument("--rank", type=int, help="rank of the adapter; default: that of all, which drops nothing")
    average.add_argument("--num-samples", type=int, help=f"rows used at most; default: {DEFAULTS['num_samples']}")
    average.add_argument(
        "--data.max_length", type=int, dest="max_length", help=f"tokens of a row at most; default: {MAX_LENGTH}"
    )
    average.add_argument(
        "--data.on_bad_row", choices=("error", "skip"), dest="on_bad_row", help=f"default: {DEFAULTS['on_bad_row']}"
    )
    options = parser.parse_args(argv)
    if options.format == "peft":
        for name in ("data", *DEFAULTS):
            if getattr(options, name) is not None:
                raise ConfigError(f"{_flag(name)} belongs to --format average. Drop it.")
    for name, least in (("rank", 1), ("num_samples", 1), ("max_length", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise bad_value(_flag(name), value, f"{least} or more", "Leave it out for the default.")
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def _flag(name: str) -> str:
    return f"--{NAMES.get(name, name.replace('_', '-'))}"


def export_experts(options: argparse.Namespace, base: str) -> None:
    """One adapter for each expert."""
    config, experts = read_experts(options.adapter)
    if config.style == "decoder_layer":
        raise bad_value(
            "--format",
            options.format,
            "average for adapter.style decoder_layer, whose experts are the layers of one adapter",
            "Use --format average --data, or the mixture itself with dsmoelora.load_adapter.",
        )
    shapes = {name: factors.in_out for name, factors in experts.items()}
    described = peft_base(base, shapes, options.trust_remote_code)
    loras = expert_loras(config, experts)
    write_loras(options.out, described, loras)
    first, last = options.out / next(iter(loras)), options.out / next(reversed(loras))
    rank = next(iter(loras.values())).r
    print(f"{len(loras)} experts of rank {rank} on {len(experts)} layers: {first} ... {last}")
    if config.shifts_base:
        what = f"the rest takes their start off the base (adapter.init: {config.init})"
        print(f"Trained were experts of rank {config.r}; {what}.")
    if config.num_experts > 1:
        company = " with the shared ones" if config.shared_experts else " alone"
        print(f"{NOT_THE_MIXTURE}: each of these is one expert{company}, with gate 1.")
    print_use(options, described, first, next(iter(loras.values())))


def export_constant(options: argparse.Namespace, base: str, config: AdapterConfig) -> None:
    """A single adapter, exactly the mixture: every token has the same gates (router `constant`)."""
    if options.fit:
        raise ConfigError("--fit fits to what the mixture does on the rows of a file, and there is none. Add --data.")
    refuse_dora(options, config)
    lora, kept = same_for_every_token(options.adapter, options.rank)
    shapes = {name: (a_RD.shape[1], len(b_OR)) for name, (a_RD, b_OR) in lora.layers.items()}
    described = peft_base(base, shapes, options.trust_remote_code)
    write_loras(options.out, described, {"": lora})
    print(f"{config.num_in_layer} experts with the same gates for every token, as one adapter of rank {lora.r}.")
    if options.rank:
        print(f"Rank {lora.r} keeps {100 * kept:.2f}% of its squared norm.")
    print_use(options, described, options.out, lora)


def refuse_dora(options: argparse.Namespace, config: AdapterConfig) -> None:
    """One adapter cannot be what several DoRA experts are.

    Raises:
        ConfigError: they are of that kind
    """
    if config.expert == "dora":
        raise bad_value(
            "--format",
            options.format,
            "peft for experts of kind dora, whose average changes the lengths of the weight's rows too, as no update "
            "of low rank does",
            "Use --format peft, or the mixture itself with dsmoelora.load_adapter.",
        )


def export_average(options: argparse.Namespace, base: str) -> None:
    """A single adapter for the average gates."""
    if options.data is None:
        raise ConfigError("--format average measures gates on a data file. Add --data, e.g. --data data/eval.jsonl.")
    config, experts = read_experts(options.adapter)
    refuse_dora(options, config)
    shapes = {name: factors.in_out for name, factors in experts.items()}
    described = peft_base(base, shapes, options.trust_remote_code)
    tokenizer = load_tokenizer(ModelConfig(path=str(options.adapter), trust_remote_code=options.trust_remote_code))
    limits = limits_at(base, options.trust_remote_code)
    max_length, remarks = limits.length("data.max_length", options.max_length, MAX_LENGTH)
    samples = load_instructions(
        *([DataSource(options.data)], "--data", tokenizer, max_length),
        on_bad_row=options.on_bad_row,
        num_embeddings=limits.num_embeddings,
    )
    for remark in remarks + all_losses(samples.reports):
        print(remark)
    print(f"Measuring base, mixture and average, {min(options.num_samples, len(samples)):,} rows each ...", flush=True)
    remedy = "Give its folder with --model, and --trust-remote-code where it brings code that you trust."
    model = model_for_inference(base, remedy, options.trust_remote_code)
    average = average_experts(model, options.adapter, samples, options.num_samples, options.rank, options.fit)
    write_loras(options.out, described, {"": average.lora})
    print_losses(options, average, samples)
    print_use(options, described, options.out, average.lora)


def print_losses(options: argparse.Namespace, average: Average, samples: InstructionDataset) -> None:
    """What the average costs."""
    used = min(options.num_samples, len(samples))
    print(f"Loss on {used:,} of {len(samples):,} rows of {options.data}, in nats a supervised token:")
    print(f"  base model   {average.base_loss:.4f}")
    print(f"  mixture      {average.mixture_loss:.4f}")
    print(f"  average      {average.average_loss:.4f}   ({average.average_loss - average.mixture_loss:+.4f})")
    if (fit := average.fit) is not None:
        print(f"  fitted       {fit.loss:.4f}   ({fit.loss - average.mixture_loss:+.4f})")
        print(f"Squared distance from the mixture's updates: average {fit.average_error:.1%}, fitted {fit.error:.1%}")
    print(f"{NOT_THE_MIXTURE}: this one does the same for every token.")
    print(f"Rank {average.lora.r} keeps {100 * average.kept:.2f}% of its squared norm.")


def print_use(options: argparse.Namespace, described: PeftBase, folder: Path, lora: Lora) -> None:
    """How to go on."""
    base = described.path
    if described.tied_head:
        print(
            f"{described.tied_head} shares its weight with the base's embeddings: this adapter is right beside the "
            "base, and wrong once it is merged into it, which would change the embeddings too. Do not merge it."
        )
    print(f'PEFT:  PeftModel.from_pretrained(base_model, "{folder}")')
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= lora.r]
    if lora.magnitudes:
        print("vLLM serves no DoRA adapter.")
    elif fitting:
        how = f"--tokenizer {options.adapter} --enable-lora --max-lora-rank {fitting[0]} --lora-modules tuned={folder}"
        print(f"vLLM:  vllm serve {base} {how}")
    else:
        print(f"vLLM serves no LoRA adapter above rank {VLLM_RANKS[-1]}; this one has {lora.r}. Give a lower --rank.")


if __name__ == "__main__":
    sys.exit(run_guarded(main))

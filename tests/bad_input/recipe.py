"""Recipe, command line and the number of ranks."""

from __future__ import annotations

import re

from tests.bad_input.bench import Bench, Case, override
from tests.given_adapters import peft_adapter


def broken_yaml(bench: Bench) -> list[str]:
    return bench.train(recipe="optim: {lr: [1\n")


def unknown_key(bench: Bench) -> list[str]:
    return bench.train(recipe="optim: {lrr: 1}\n")


def key_twice(bench: Bench) -> list[str]:
    return bench.train(recipe="run: {name: again}\n")


def no_recipe_file(bench: Bench) -> list[str]:
    return ["train.py", "--config", str(bench.folder / "recpe.yaml")]


def binary_recipe(bench: Bench) -> list[str]:
    (bench.folder / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    return ["train.py", "--config", str(bench.folder / "recipe.yaml")]


def beside_a_shifted_base(bench: Bench) -> list[str]:
    settings = {"top_k": "null", "router": "constant", "router_start": "sum", "init": "svd"}
    return bench.train(*(word for key, value in settings.items() for word in (f"--adapter.{key}", value)))


def beside_adapters(bench: Bench) -> list[str]:
    folder = peft_adapter(bench.model, bench.folder / "peft", target_modules=["q_proj"])
    drop = bench.folder / "recipe.yaml"
    drop.write_text(re.sub("^adapter:.*$", "", drop.read_text(), flags=re.MULTILINE))
    return bench.train("--adapter.experts_from", f"[{folder}, {folder}]", "--adapter.init", "svd")


EARLY: dict[str, Case] = {
    "the recipe file does not exist": no_recipe_file,
    "the recipe is no text": binary_recipe,
    "the recipe is no YAML": broken_yaml,
    "a key that does not exist": unknown_key,
    "a section comes twice": key_twice,
    "a flag that does not exist": override("--optim.lrr", 1),
    "text where a number belongs": override("--optim.lr", "fast"),
    "a fraction where a whole number belongs": override("--train.max_steps", 1.5),
    "a word that is none of the allowed": override("--optim.name", "adam"),
    "a negative learning rate": override("--optim.lr=-1"),
    "a learning rate that is not a number": override("--optim.lr", ".nan"),
    "an endless learning rate": override("--optim.lr", ".inf"),
    "more experts a token than there are": override("--adapter.top_k", 5),
    "dropout of 1": override("--adapter.lora_dropout", 1),
    "one expert, and a router for it and others": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--adapter.style", "ffn_block"
    ),
    "modules of a decoder layer as experts, chosen by every token": override("--adapter.style", "decoder_layer"),
    "modules of a decoder layer as experts, on several ranks": override(
        "--adapter.style", "decoder_layer", "--adapter.router", "prompt", "--parallel.ep_size", 2
    ),
    "plain LoRA beside plain LoRA": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--adapter.lora_modules", "[o_proj]"
    ),
    "a router that takes no `top_k`": override("--adapter.router", "softmax"),
    "a falling K of negative length": override("--adapter.top_k_warmup=-1"),
    "a falling K where a token uses all": override("--adapter.top_k", 4, "--adapter.top_k_warmup", 1),
    "a falling K of a router that has none": override(
        "--adapter.router", "softmax", "--adapter.top_k", "null", "--adapter.top_k_warmup", 1
    ),
    "a K that falls to the end": override("--adapter.top_k_warmup", 1000),
    "a falling K with a contrastive loss": override("--adapter.top_k_warmup", 1, "--losses.contrastive", 0.1),
    "an expert that has no mixer": override("--adapter.mixer_init", "kaiming"),
    "a balance loss where nothing can be balanced": override("--adapter.top_k", 4, "--losses.balance", 0.1),
    "a contrastive loss for one expert": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--losses.contrastive", 0.1
    ),
    "co-activated experts where a token uses one": override("--adapter.top_k", 1, "--losses.contrastive_coactive", 0.1),
    "co-activated experts where a token uses all": override("--adapter.top_k", 4, "--losses.contrastive_coactive", 0.1),
    "a contrastive temperature of 0": override("--losses.contrastive_temperature", 0),
    "fewer shared experts than none": override("--adapter.shared_experts=-1"),
    "shared experts beside one expert": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--adapter.shared_experts", 1
    ),
    "shared experts with row lengths": override("--adapter.shared_experts", 1, "--adapter.expert", "dora"),
    "shared experts that start from the base weight": override("--adapter.shared_experts", 1, "--adapter.init", "svd"),
    "shared experts with a contrastive loss": override("--adapter.shared_experts", 1, "--losses.contrastive", 0.1),
    "shared experts on other ranks": override("--adapter.shared_experts", 1, "--parallel.ep_size", 2),
    "a start from the base weight for experts with a mixer": override(
        "--adapter.init", "svd", "--adapter.expert", "moslora"
    ),
    "a loss of logits that are the gates": override(
        "--adapter.router", "constant", "--adapter.top_k", "null", "--losses.z", 0.1
    ),
    "rows for a gradient that nothing starts from": override("--adapter.init_samples", 8),
    "no row for a start from the gradient": override("--adapter.init", "gradient", "--adapter.init_samples", 0),
    "a frozen role that the experts do not have": override("--adapter.freeze", "[m]"),
    "a frozen `b`, which starts at 0": override("--adapter.freeze", "[b]"),
    "a preconditioner whose pairs are frozen": override("--adapter.freeze", "[a]", "--optim.preconditioner", "tangent"),
    "a router without training for experts that have not learned": override("--adapter.router", "arrow"),
    "no steps where something has to be trained": override("--train.max_steps", 0),
    "free gates beside a base that was shifted": beside_a_shifted_base,
    "ranks to split of no adapters": override("--adapter.split_ranks", "true"),
    "experts from a folder that does not exist": override("--adapter.experts_from", "[nowhere]"),
    "a start from the base weight beside adapters": beside_adapters,
    "`momentum` with `adamw`": override("--optim.momentum", 0.9),
    "no `bias_correction` with `sgd`": override("--optim.name", "sgd", "--optim.bias_correction", "false"),
    "`betas` with `sgd`": override("--optim.name", "sgd", "--optim.betas", "[0.7, 0.8]"),
    "damping without a preconditioner": override("--optim.damping", 0.1),
    "an end of a learning rate that stays": override("--optim.schedule", "constant", "--optim.min_lr_ratio", 0),
    "a power of the gate of one expert": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--adapter.gate_power", 0.5
    ),
    "a scope of the gate's power 1": override("--adapter.gate_power_scope", "factors_and_input"),
    "a way to exchange tokens that stay": override("--parallel.exchange", "gather"),
    "tokens for a contrastive loss that is off": override("--losses.contrastive_tokens", 32),
    "noise in a base in 4 bits": override("--model.quantize", "nf4", "--optim.flat_noise", 0.05),
    "noise under experts that read the rows of the base": override(
        "--adapter.expert", "dora", "--optim.flat_noise", 0.05
    ),
    "noise that is negative": override("--optim.flat_noise=-0.1"),
    "packing with the router `prompt`": override("--adapter.router", "prompt", "--data.packing", "true"),
    "a base in 4 bits in fp16": override("--model.quantize", "nf4", "--model.dtype", "fp16"),
    "experts that read the rows of a base in 4 bits": override("--model.quantize", "nf4", "--adapter.expert", "dora"),
    "a start from what 4 bits lose, of a base in more": override("--adapter.init", "loftq"),
    "iterations of another start": override("--adapter.loftq_iterations", 2),
    "a start taken off a base in 4 bits": override("--model.quantize", "nf4", "--adapter.init", "svd"),
    "`fp16` on an accelerator without it": override("--model.dtype", "fp16"),
    "a run name with a slash": override("--run.name", "a/b"),
    "a tracker whose package is not installed": override("--train.report_to", "[trackio]"),
    "a score without held-out data": override("--train.eval_score", "exact", "--data.eval", "[]"),
    "rows of a score that is none": override("--train.eval_score_samples", "8"),
    "sample answers without held-out data": override("--train.num_samples", 2, "--data.eval", "[]"),
    # world size and layout
    "a batch that the ranks do not divide": override("--dry-run", "--world-size", 3),
    "`ep_size` does not divide the experts": override("--parallel.ep_size", 3),
    "`ep_size` does not divide the ranks": override("--parallel.ep_size", 4, "--dry-run", "--world-size", 2),
    "no ranks": override("--dry-run", "--world-size", 0),
    "a world size for a real run": override("--world-size", 2),
}

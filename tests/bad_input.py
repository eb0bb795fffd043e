"""The cases behind docs/errors.md: each spoils one thing of a small run that works, and gives the command to start.

A case gets its `Bench`, whose files it may change, and returns the words of a command line. The keys of `CASES` are
the first column of the page's tables.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.helpers import tiny_llama

RECIPE = """
run: {{name: tiny, dir: {folder}/runs}}
model: {{path: {folder}/model, dtype: fp32}}
adapter: {{num_experts: 4, top_k: 2, r: 2, target_modules: [q_proj, v_proj]}}
data: {{train: [{{path: {folder}/train.jsonl}}], eval: [{{path: {folder}/eval.jsonl}}], max_length: 64}}
train: {{max_steps: 2, batch_size: 4, micro_batch_size: 1, save_every: 1, eval_every: 0, report_to: none}}
"""
ROW = {"instruction": "Say it.", "input": "", "output": "It."}


@dataclass(frozen=True)
class Bench:
    """A folder with model, data and recipe.yaml, and where it was asked for a finished run in runs/tiny."""

    folder: Path

    def train(self, *more: object, recipe: str = "") -> list[str]:
        """A command line of launch/train.py; `recipe` is added to the file."""
        path = self.folder / "recipe.yaml"
        path.write_text(path.read_text() + recipe)
        return ["train.py", "--config", str(path), *map(str, more)]

    def deepspeed(self, content: dict[str, Any] | str, *more: object) -> list[str]:
        """The same, with a DeepSpeed file of this content."""
        path = self.folder / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return self.train("--deepspeed", path, *more)

    def rows(self, *rows: object, name: str = "train.jsonl") -> list[str]:
        """The same, with other training rows; text stands as it is."""
        path = self.folder / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return self.train("--data.train", f"[{{path: {path}}}]")

    def spoiled_json(self, file: str, **changes: Any) -> None:
        """Change keys of a JSON file; None takes one out."""
        path = self.folder / file
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def generate(self, *more: object) -> list[str]:
        """A command line of launch/generate.py."""
        return ["generate.py", "--adapter", str(self.adapter), "--prompt", "x", *map(str, more)]

    def export(self, *more: object) -> list[str]:
        """A command line of launch/export.py."""
        out = self.folder / "exported"
        return ["export.py", "--adapter", str(self.adapter), "--out", str(out), "--format", *map(str, more)]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint-2"


def make_bench(folder: Path) -> Bench:
    """A bench on which everything works."""
    tiny_llama(folder / "model", hidden_size=32, intermediate_size=64)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text(8 * (json.dumps(ROW) + "\n"))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return Bench(folder)


Case = Callable[[Bench], list[str]]


def override(*words: object) -> Case:
    """The recipe with these words behind it."""
    return lambda bench: bench.train(*words)


def zero(stage: int = 3, **keys: Any) -> Case:
    """A DeepSpeed file with these keys in `zero_optimization`."""
    return lambda bench: bench.deepspeed({"zero_optimization": {"stage": stage, **keys}})


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# Recipe and command line


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


# Model and tokenizer


def start_from_shared_weight(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", tie_word_embeddings=True)
    return bench.train("--adapter.init", "svd", "--adapter.target_modules", "[lm_head]")


def no_config(bench: Bench) -> list[str]:
    (bench.model / "config.json").unlink()
    return bench.train()


def broken_config(bench: Bench) -> list[str]:
    cut(bench.model / "config.json")
    return bench.train()


def unknown_architecture(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", model_type="nosuchmodel")
    return bench.train()


def no_language_model(bench: Bench) -> list[str]:
    (bench.model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return bench.train()


def no_tokenizer(bench: Bench) -> list[str]:
    for file in bench.model.glob("*token*"):
        file.unlink()
    return bench.train()


def broken_tokenizer(bench: Bench) -> list[str]:
    cut(bench.model / "tokenizer.json")
    return bench.train()


def no_template_and_no_end(bench: Bench) -> list[str]:
    (bench.model / "chat_template.jinja").unlink()
    bench.spoiled_json("model/tokenizer_config.json", eos_token=None)
    return bench.train()


def no_weights(bench: Bench) -> list[str]:
    (bench.model / "model.safetensors").unlink()
    return bench.train()


def cut_weights(bench: Bench) -> list[str]:
    cut(bench.model / "model.safetensors")
    return bench.train()


def pointer_for_weights(bench: Bench) -> list[str]:
    (bench.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return bench.train()


def missing_shard(bench: Bench) -> list[str]:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (bench.model / "model.safetensors.index.json").write_text(json.dumps(index))
    (bench.model / "model.safetensors").rename(bench.model / "model-00001-of-00002.safetensors")
    return bench.train()


def missing_tensor(bench: Bench) -> list[str]:
    path = bench.model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    return bench.train()


def weights_of_another_shape(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", intermediate_size=48)
    return bench.train()


# Data


def not_utf8(bench: Bench) -> list[str]:
    (bench.folder / "train.jsonl").write_bytes(json.dumps(ROW).replace("Say", "S\u00e4y").encode("latin-1"))
    return bench.train()


def late_bad_row(bench: Bench) -> list[str]:
    return bench.rows(ROW, ROW, {"instruction": "Say it."})


def broken_parquet(bench: Bench) -> list[str]:
    return bench.rows("nothing of the kind", name="train.parquet")


def unmatched_quotes(bench: Bench) -> list[str]:
    return bench.rows("instruction,input,output", '"Say it."x,,It.', name="train.csv")


def plain_folder(bench: Bench) -> list[str]:
    return bench.train("--data.train", f"[{{path: {bench.model}}}]")


# Run folder, checkpoint, adapter


def no_checkpoint_there(bench: Bench) -> list[str]:
    return bench.train("--resume", bench.run / "checkpoint-9")


def cut_checkpoint(bench: Bench) -> list[str]:
    cut(next(bench.checkpoint.glob("*.safetensors")))
    return bench.train("--resume", bench.checkpoint)


def rotten_checkpoint(bench: Bench) -> list[str]:
    path = next(bench.checkpoint.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return bench.train("--resume", bench.checkpoint)


def broken_index(bench: Bench) -> list[str]:
    cut(next(bench.checkpoint.glob("*.json")))
    return bench.train("--resume", bench.checkpoint)


def base_as_checkpoint(bench: Bench) -> list[str]:
    return bench.train("--run.name", "new", "--resume", bench.model)


def older_checkpoint(bench: Bench) -> list[str]:
    return bench.train("--resume", bench.run / "checkpoint-1")


def resume_with(*words: object) -> Case:
    """Go on from the last checkpoint with another recipe."""
    return lambda bench: bench.train("--run.name", "new", "--resume", bench.checkpoint, *words)


def resume_other_data(bench: Bench) -> list[str]:
    argv = bench.rows(*9 * [ROW], name="more.jsonl")
    return [*argv, "--run.name", "new", "--resume", str(bench.checkpoint)]


def no_adapter(bench: Bench) -> list[str]:
    return bench.generate("--adapter", bench.folder / "nowhere")


def broken_adapter_config(bench: Bench) -> list[str]:
    cut(bench.adapter / "adapter_config.json")
    return bench.generate()


def other_kind_of_adapter(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", peft_type="LORA")
    return bench.generate()


def adapter_without_start(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", init="svd")
    return bench.generate()


def wrong_adapter_setting(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", r=3)
    return bench.generate()


def cut_adapter(bench: Bench) -> list[str]:
    cut(bench.adapter / "adapter_model.safetensors")
    return bench.generate()


def adapter_without_tokenizer(bench: Bench) -> list[str]:
    for file in bench.adapter.glob("*token*"):
        file.unlink()
    return bench.generate()


def another_base(bench: Bench) -> list[str]:
    other = tiny_llama(bench.folder / "other", hidden_size=32, intermediate_size=64, seed=1)
    return bench.generate("--base", other)


def base_of_another_shape(bench: Bench) -> list[str]:
    return bench.generate("--base", tiny_llama(bench.folder / "other", hidden_size=64))


def base_without_a_tensor(bench: Bench) -> list[str]:
    missing_tensor(bench)
    return bench.generate()


def base_is_gone(bench: Bench) -> list[str]:
    shutil.rmtree(bench.model)
    return bench.generate()


def export_over_something(bench: Bench) -> list[str]:
    (bench.folder / "exported").mkdir()
    (bench.folder / "exported" / "mine").write_text("precious")
    return bench.export("peft")


def export_other_base(bench: Bench) -> list[str]:
    return bench.export("peft", "--model", tiny_llama(bench.folder / "other", hidden_size=64))


def export_base_without_a_tensor(bench: Bench) -> list[str]:
    missing_tensor(bench)
    return bench.export("average", "--data", bench.folder / "eval.jsonl")


def export_average_of_dora(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", expert="dora")
    path = bench.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    lengths = {name.replace(".b", ".magnitude"): b[..., 0] + 1 for name, b in tensors.items() if name.endswith(".b")}
    save_file(tensors | lengths, path)
    return bench.export("average", "--data", bench.folder / "eval.jsonl")


EARLY: dict[str, Case] = {
    # recipe and command line
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
    "plain LoRA beside plain LoRA": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--adapter.lora_modules", "[o_proj]"
    ),
    "a router that takes no `top_k`": override("--adapter.router", "softmax"),
    "an expert that has no mixer": override("--adapter.mixer_init", "kaiming"),
    "a balance loss where nothing can be balanced": override("--adapter.top_k", 4, "--losses.balance", 0.1),
    "a contrastive loss for one expert": override(
        "--adapter.num_experts", 1, "--adapter.top_k", 1, "--losses.contrastive", 0.1
    ),
    "co-activated experts where a token uses one": override("--adapter.top_k", 1, "--losses.contrastive_coactive", 0.1),
    "co-activated experts where a token uses all": override("--adapter.top_k", 4, "--losses.contrastive_coactive", 0.1),
    "a contrastive temperature of 0": override("--losses.contrastive_temperature", 0),
    "a start from the base weight for experts with a mixer": override(
        "--adapter.init", "svd", "--adapter.expert", "moslora"
    ),
    "packing with the router `prompt`": override("--adapter.router", "prompt", "--data.packing", "true"),
    "`fp16` on an accelerator without it": override("--model.dtype", "fp16"),
    "a run name with a slash": override("--run.name", "a/b"),
    "a tracker whose package is not installed": override("--train.report_to", "[trackio]"),
    "sample answers without held-out data": override("--train.num_samples", 2, "--data.eval", "[]"),
    # world size and layout
    "a batch that the ranks do not divide": override("--dry-run", "--world-size", 3),
    "`ep_size` does not divide the experts": override("--parallel.ep_size", 3),
    "`ep_size` does not divide the ranks": override("--parallel.ep_size", 4, "--dry-run", "--world-size", 2),
    "no ranks": override("--dry-run", "--world-size", 0),
    "a world size for a real run": override("--world-size", 2),
    # DeepSpeed file
    "the DeepSpeed file does not exist": override("--deepspeed", "ds_configs/zero33.json"),
    "the DeepSpeed file is no JSON": lambda bench: bench.deepspeed('{"zero_optimization": {'),
    "it is no JSON object": lambda bench: bench.deepspeed("[3]"),
    "its `zero_optimization` is no object": lambda bench: bench.deepspeed({"zero_optimization": 3}),
    "it names no ZeRO stage": lambda bench: bench.deepspeed({}),
    "a ZeRO stage that does not exist": zero(4),
    "`ep_size` with ZeRO-2": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 2}}, "--parallel.ep_size", 2, "--dry-run", "--world-size", 2
    ),
    "another batch size than the recipe's": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "train_batch_size": 7}
    ),
    "an optimizer of its own": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}
    ),
    "`fp16` in the DeepSpeed file alone": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}
    ),
    "ZeRO-0 with `bf16`": lambda bench: bench.deepspeed({"zero_optimization": {"stage": 0}}, "--model.dtype", "bf16"),
    "parameters offloaded below ZeRO-3": zero(2, offload_param={"device": "cpu"}),
    "a key that DeepSpeed does not have": lambda bench: bench.deepspeed({"zero_optimisation": {"stage": 3}}),
    "a key of `zero_optimization` that DeepSpeed does not have": zero(3, overlap_com=True),
    "a share of the optimizer that is no number": zero(3, offload_optimizer={"device": "cpu", "ratio": "half"}),
    "a loss scale that is no number": lambda bench: bench.deepspeed(
        {"zero_optimization": {"stage": 3}, "fp16": {"loss_scale": "big"}}
    ),
    "a value of `zero_optimization` of the wrong type": zero(3, reduce_bucket_size="big"),
    "optimizer state on NVMe": zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
    "ZeRO++'s quantised weights": zero(3, zero_quantized_weights=True),
    # model and tokenizer
    "no model is named": override("--model.path", ""),
    "the model folder does not exist": override("--model.path", "./nowhere"),
    "a hub name that cannot be reached": override("--model.path", "nobody/has-this-model"),
    "a file in place of the model folder": lambda bench: bench.train("--model.path", bench.model / "config.json"),
    "the model has no config.json": no_config,
    "config.json is damaged": broken_config,
    "an architecture that transformers does not know": unknown_architecture,
    "no causal language model": no_language_model,
    "a contrastive loss for experts on the output head": override(
        "--adapter.target_modules", "[q_proj, lm_head]", "--losses.contrastive", 0.1
    ),
    "a layer that the model does not have": override("--adapter.target_modules", "[q_proj, w_proj]"),
    "a layer for plain LoRA that the model does not have": override("--adapter.lora_modules", "[w_proj]"),
    "a layer with a router and with plain LoRA": override("--adapter.lora_modules", "[o_proj, v_proj]"),
    "more singular values than a weight has": override("--adapter.init", "svd", "--adapter.r", 8),
    "a start from a weight that two layers share": start_from_shared_weight,
    "a layer outside of any feed-forward block": override("--adapter.style", "ffn_block"),
    "an attention that cannot be had": override("--model.attention", "flash_attention_2"),
    "the tokenizer is missing": no_tokenizer,
    "tokenizer.json is damaged": broken_tokenizer,
    "neither chat template nor end-of-sequence token": no_template_and_no_end,
    "the model has no weights": no_weights,
    "a weight file is cut short": cut_weights,
    "a weight file is a git-lfs pointer": pointer_for_weights,
    "a shard of the weights is missing": missing_shard,
    "the weights have another shape than config.json says": weights_of_another_shape,
    # data
    "no training data": override("--data.train", "[]"),
    "a data file does not exist": override("--data.train", "[{path: ./nowhere.jsonl}]"),
    "a dataset that the hub does not give": override("--data.train", "[{path: nobody/has-this-data}]"),
    "an unknown kind of file": lambda bench: bench.rows("x", name="train.doc"),
    "an empty data file": lambda bench: bench.rows(),
    "data that is not UTF-8": not_utf8,
    "a row that is no JSON": lambda bench: bench.rows("{'instruction': 1}"),
    "columns of no known format": lambda bench: bench.rows({"left": "a", "right": "b"}),
    "a row without an answer": lambda bench: bench.rows({"instruction": "Say it."}),
    "a role that does not exist": lambda bench: bench.rows({"messages": [{"role": "robot", "content": "x"}]}),
    "a chat that ends with the user": lambda bench: bench.rows(
        {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]}
    ),
    "a damaged Parquet file": broken_parquet,
    "quotes of a CSV file that do not match": unmatched_quotes,
    "a folder that is no saved dataset": plain_folder,
    "a split of a file": lambda bench: bench.train(
        "--data.train", f"[{{path: {bench.folder}/train.jsonl, split: train}}]"
    ),
    "packing streamed sets": override("--data.streaming", "true", "--data.packing", "true"),
    "processes for streamed sets": override("--data.streaming", "true", "--data.num_proc", 2),
    "a shuffle buffer for sets that are not streamed": override("--data.shuffle_buffer", 100),
    "a JSON array that is to be streamed": lambda bench: [
        *bench.rows("[", json.dumps(ROW), "]", name="train.json"),
        *("--data.streaming", "true"),
    ],
    "a negative weight": lambda bench: bench.train(
        "--data.train", f"[{{path: {bench.folder}/train.jsonl, weight: -1}}]"
    ),
}
AFTER_A_RUN: dict[str, Case] = {
    # run folder, disk
    "the folder holds a run already": override(),
    "`--resume` names no folder": no_checkpoint_there,
    "`--resume` names an older checkpoint of the same run": older_checkpoint,
    "the run folder lies below a file": lambda bench: bench.train("--run.dir", bench.folder / "recipe.yaml"),
    "the disk is too small": override("--run.name", "new", "--train.keep_checkpoints", 10**12),
    # adapter
    "the adapter folder does not exist": no_adapter,
    "adapter_config.json is damaged": broken_adapter_config,
    "an adapter of another kind": other_kind_of_adapter,
    "the adapter's settings and weights disagree": wrong_adapter_setting,
    "the adapter's weights are cut short": cut_adapter,
    "the adapter's start is missing": adapter_without_start,
    "the adapter folder has no tokenizer": adapter_without_tokenizer,
    "a base model with other numbers": another_base,
    "a base model of another shape": base_of_another_shape,
    "a base model that lacks a tensor": base_without_a_tensor,
    "the base model is gone": base_is_gone,
    "no room for an answer": lambda bench: bench.generate("--max-new-tokens", 0),
    "the export's folder exists": export_over_something,
    "an export for a base of another shape": export_other_base,
    "an export measured on a base that lacks a tensor": export_base_without_a_tensor,
    "an average of experts of kind `dora`": export_average_of_dora,
    "an average without data": lambda bench: bench.export("average"),
    "data where nothing is measured": lambda bench: bench.export("peft", "--data", "x.jsonl"),
    "a rank of the export below 1": lambda bench: bench.export("average", "--data", "x.jsonl", "--rank", 0),
}
# Seen when weights, all rows or a checkpoint are read, by an engine.
LATE: dict[str, Case] = {
    "a wrong row further down": late_bad_row,
    "a wrong row further down a streamed set": lambda bench: [*late_bad_row(bench), "--data.streaming", "true"],
    "samples too long to leave a token to learn": override("--data.max_length", 4),
    "streamed samples too long for that": override(
        *("--data.streaming", "true"), *("--data.max_length", 4), *("--data.eval", "[]")
    ),
    "the weights lack a tensor": missing_tensor,
    "a file of the checkpoint is cut short": cut_checkpoint,
    "a bit of the checkpoint has turned": rotten_checkpoint,
    "the checkpoint's index is damaged": broken_index,
    "`--resume` names a folder that is no checkpoint": base_as_checkpoint,
    "a checkpoint of another rank R": resume_with("--adapter.r", 3),
    "a checkpoint of other layers": resume_with("--adapter.target_modules", "[q_proj]"),
    "a checkpoint of another optimizer": resume_with("--optim.name", "sgd"),
    "a checkpoint of another start": resume_with("--adapter.init", "svd"),
    "a checkpoint of other data": resume_other_data,
    "a checkpoint of another seed": resume_with("--run.seed", 5),
}
# Between two processes.
TOGETHER: dict[str, Case] = {"the port is taken": override("--run.name", "new")}

"""A trained adapter, read by launch/generate.py, launch/export.py, launch/evaluate.py and serve.py."""

from __future__ import annotations

import json
import shutil

from safetensors.torch import load_file, save_file

from tests.bad_input.bench import ROW, Bench, Case, cut
from tests.bad_input.model import missing_tensor
from tests.helpers import bring_own_code, tiny_llama


def no_adapter(bench: Bench) -> list[str]:
    return bench.generate("--adapter", bench.folder / "nowhere")


def broken_adapter_config(bench: Bench) -> list[str]:
    cut(bench.adapter / "adapter_config.json")
    return bench.generate()


def magic_router(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", router="magic")
    return bench.generate()


def other_kind_of_adapter(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", peft_type="LORA")
    return bench.generate()


def adapter_without_start(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", init="svd")
    return bench.generate()


def adapter_without_taken(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", init="loftq", base_quantization="nf4")
    return bench.generate("--quantize", "nf4")


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


def file_without_tools(bench: Bench) -> list[str]:
    file = bench.folder / "tools.json"
    file.write_text("[]")
    return bench.generate("--tools", file)


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


def base_with_own_code(bench: Bench) -> list[str]:
    bring_own_code(bench.model)
    return bench.generate()


def export_base_with_own_code(bench: Bench) -> list[str]:
    bring_own_code(bench.model)
    return bench.export("peft")


def start_from_it(bench: Bench, *more: object) -> list[str]:
    return bench.train("--run.name", "next", "--adapter.experts_from", f"[{bench.adapter}]", *more)


def start_on_another_shape(bench: Bench) -> list[str]:
    return start_from_it(bench, "--model.path", tiny_llama(bench.folder / "other", hidden_size=64))


def start_from_dora(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", expert="dora")
    return start_from_it(bench)


def evaluated(bench: Bench, score: str, row: object, *more: object) -> list[str]:
    file = bench.folder / "asked.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return bench.evaluate("--data", file, "--score", score, *more)


def another_evaluation(bench: Bench, **known: object) -> list[str]:
    folder = bench.folder / "scores"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(known))
    return evaluated(bench, "loss", ROW, "--out", folder)


def served_prompts(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", router="prompt")
    return ["serve.py", "--adapter", str(bench.adapter), "--continuous-batching"]


def tasks_of_prompts(bench: Bench) -> list[str]:
    bench.spoiled_json("runs/tiny/adapter/adapter_config.json", router="prompt")
    return bench.evaluate("--tasks", "arc_easy")


QUESTION = {"instruction": "Say it."}
AFTER_A_RUN: dict[str, Case] = {
    "the adapter folder does not exist": no_adapter,
    "adapter_config.json is damaged": broken_adapter_config,
    "adapter_config.json has settings that cannot be": magic_router,
    "an adapter of another kind": other_kind_of_adapter,
    "the adapter's settings and weights disagree": wrong_adapter_setting,
    "the adapter's weights are cut short": cut_adapter,
    "the adapter's start is missing": adapter_without_start,
    "what was taken from a base in 4 bits is missing": adapter_without_taken,
    "the adapter folder has no tokenizer": adapter_without_tokenizer,
    "a base model with other numbers": another_base,
    "a base model of another shape": base_of_another_shape,
    "a base model that lacks a tensor": base_without_a_tensor,
    "the base model is gone": base_is_gone,
    "a base model that brings its own code": base_with_own_code,
    "an export for a base model that brings its own code": export_base_with_own_code,
    "a file without tools": file_without_tools,
    "a rank that the adapters to start from contradict": lambda bench: start_from_it(bench, "--adapter.r", 3),
    "layers that leave out some of theirs": lambda bench: start_from_it(bench, "--adapter.target_modules", "[q_proj]"),
    "adapters to start from of a base of another shape": start_on_another_shape,
    "an adapter to start from that rescales rows": start_from_dora,
    "a routed mixture to merge": lambda bench: bench.merge("--out", bench.folder / "merged"),
    "a merge that is to be adapter and model": lambda bench: bench.merge("--out", "x", "--into-base", "y"),
    "weights for more adapters than there are": lambda bench: bench.merge("--out", "x", "--weights", 0.5, 0.5),
    "a merge over something": lambda bench: bench.merge("--into-base", bench.model),
    "no room for an answer": lambda bench: bench.generate("--max-new-tokens", 0),
    "the export's folder exists": export_over_something,
    "an export for a base of another shape": export_other_base,
    "an export measured on a base that lacks a tensor": export_base_without_a_tensor,
    "an average of experts of kind `dora`": export_average_of_dora,
    "an average without data": lambda bench: bench.export("average"),
    "data where nothing is measured": lambda bench: bench.export("peft", "--data", "x.jsonl"),
    "nothing to score": lambda bench: bench.evaluate("--data", "x.jsonl"),
    "rows beside tasks": lambda bench: bench.evaluate("--tasks", "arc_easy", "--data", "x.jsonl"),
    "a folder of tasks without tasks": lambda bench: evaluated(bench, "loss", ROW, "--tasks-dir", bench.folder),
    "tasks for a router of prompts": tasks_of_prompts,
    "no name of a task": lambda bench: bench.evaluate("--tasks", ","),
    "a folder of tasks that is not there": lambda bench: bench.evaluate("--tasks", "x", "--tasks-dir", "nowhere"),
    "rows without an answer": lambda bench: evaluated(bench, "exact", QUESTION),
    "rows to choose from without choices": lambda bench: evaluated(bench, "choice", ROW),
    "an answer without a number": lambda bench: evaluated(bench, "number", ROW),
    "text that asks nothing": lambda bench: evaluated(bench, "exact", {"text": "Once."}),
    "a row too long to be asked": lambda bench: evaluated(bench, "exact", ROW, "--data.max_length", 9),
    "rows of an unknown key": lambda bench: bench.evaluate("--score", "loss", "--data", "{pth: x}"),
    "rows that are no mapping": lambda bench: bench.evaluate("--score", "loss", "--data", "{path"),
    "rows that are not there": lambda bench: bench.evaluate("--score", "loss", "--data", bench.folder / "no.jsonl"),
    "choices where none are made": lambda bench: evaluated(bench, "loss", ROW, "--choices", "texts"),
    "routing of the base": lambda bench: evaluated(bench, "loss", ROW, "--base-only", "--routing"),
    "a flag that this program does not have": lambda bench: bench.evaluate("--data", "x.jsonl", "--scor", "loss"),
    "a score that is none": lambda bench: bench.evaluate("--data", "x.jsonl", "--score", "bleu"),
    "other rows than a folder holds": lambda bench: another_evaluation(bench, score="loss", num_rows=2),
    "an empty batch": lambda bench: evaluated(bench, "loss", ROW, "--batch-size", 0),
    "a folder of another evaluation": lambda bench: another_evaluation(bench, score="exact"),
    "a port that is none": lambda bench: ["serve.py", "--adapter", str(bench.adapter), "--port", "0"],
    "requests mixed for a router of prompts": served_prompts,
    "a rank of the export below 1": lambda bench: bench.export("average", "--data", "x.jsonl", "--rank", 0),
}

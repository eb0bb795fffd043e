"""A whole training step on two ranks, beside transformers' Trainer with PEFT's LoRA of rank E x R.

    python launch/prepare_demo.py
    python benchmarks/step.py
    python benchmarks/step.py --profile         # where the time of one rank goes, in ours
    python benchmarks/step.py --quantize        # ours on a base in 4 bits, too (with --profile: there alone)

Both train the demo's model on the same rows of its data in the same order, with the same DeepSpeed file, batches, dtype
and ranks, in turn, each in processes of their own. The first steps do not count. Also with packed rows, which the
Trainer does not have for such data; there a step holds rows of `data.max_length` tokens: compare tokens a second.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import DEVICE, DTYPE, DTYPE_NAME, setting
from torch import Tensor
from worker import ROOT, run_ranks

from dsmoelora.callbacks.memory import PeakMemory
from dsmoelora.config import AdapterConfig, DataConfig, DataSource, ModelConfig, OptimConfig, Recipe, TrainConfig
from dsmoelora.config.run import QuantizeName
from dsmoelora.data import InstructionDataset, MicroBatch, Packing, load_instructions, load_packing, train_steps
from dsmoelora.engine import Engine
from dsmoelora.model import load_tokenizer
from dsmoelora.parallel import comm

MODEL, DATA = ROOT / "models" / "smollm2-135m", ROOT / "data" / "demo" / "train.jsonl"
DEEPSPEED = ROOT / "ds_configs" / "zero3.json"
NUM_RANKS, NUM_WARM_UP = 2, 2
KEYS = {"seconds": "seconds a step", "cpu": "of the core", "peak": "of the peak"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Clock:
    """Seconds between steps: of the clock, and of this process on its core, which waits and other guests leave out."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []

    def note(self) -> None:
        """A step begins, or the last one has ended."""
        self._times.append((time.perf_counter(), time.process_time()))

    def means(self) -> dict[str, float]:
        """Of the steps after the first."""
        wall, cpu = zip(*self._times[NUM_WARM_UP:], strict=True)
        num_steps = len(wall) - 1
        return {"seconds": (wall[-1] - wall[0]) / num_steps, "cpu": (cpu[-1] - cpu[0]) / num_steps}


def recipe_of(batch_size: int, packing: bool = False, quantize: QuantizeName = "none") -> Recipe:
    """The demo's experts on its attention."""
    return Recipe(
        model=ModelConfig(path=str(MODEL), dtype=DTYPE_NAME, quantize=quantize),
        adapter=AdapterConfig(r=4, num_experts=20, top_k=10, target_modules=TARGETS),
        optim=OptimConfig(warmup_steps=0),
        data=DataConfig(train=[DataSource(str(DATA))], max_length=256, packing=packing),
        train=TrainConfig(batch_size=batch_size, micro_batch_size=batch_size // NUM_RANKS),
    )


def samples_of(recipe: Recipe, num_steps: int) -> InstructionDataset:
    """The rows of an epoch of so many steps, or all of them where they are packed."""
    tokenizer, data = load_tokenizer(recipe.model), recipe.data
    sources = data.train
    if not data.packing:
        lines = DATA.read_text().splitlines()[: num_steps * recipe.train.batch_size]
        file = Path(tempfile.gettempdir()) / f"step-benchmark-{len(lines)}.jsonl"
        comm.together(lambda: file.write_text("\n".join(lines)) if comm.rank() == 0 else None)
        sources = [DataSource(str(file))]
    return load_instructions(sources, "data.train", tokenizer, data.max_length)


def steps_of(
    recipe: Recipe, samples: InstructionDataset, rank: int, packing: Packing | None = None
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of a rank, step by step."""
    pad_token_id = load_tokenizer(recipe.model).pad_token_id
    assert isinstance(pad_token_id, int)
    sizes = {"batch_size": recipe.train.batch_size, "micro_batch_size": recipe.train.micro_batch_size}
    layout = {"rank": rank, "world_size": NUM_RANKS, "pad_token_id": pad_token_id}
    return train_steps(samples, seed=0, packing=packing, **sizes, **layout)


def ours(recipe: Recipe, num_steps: int) -> dict[str, float]:
    """Mean seconds of a step, and supervised tokens of one."""
    samples, packing = samples_of(recipe, num_steps), None
    if recipe.data.packing:
        packing = load_packing(samples.num_tokens, samples.mixture, samples.fingerprint, 0, recipe.data.max_length)
    engine = Engine.build(recipe, json.loads(DEEPSPEED.read_text()))
    steps = steps_of(recipe, samples, comm.rank(), packing)
    supervised, clock = [], Clock()
    for _ in range(num_steps):
        clock.note()
        supervised.append(engine.train_step(next(steps)).num_supervised)
    clock.note()
    return {**clock.means(), "tokens": statistics.mean(supervised)}


def rows_in_our_order(recipe: Recipe, num_steps: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of all rows as the Trainer deals them out one after the other: a micro-batch a rank, each step."""
    samples = samples_of(recipe, num_steps)
    of_ranks = [steps_of(recipe, samples, rank) for rank in range(NUM_RANKS)]
    batches = [next(of_rank)[0] for _ in range(num_steps) for of_rank in of_ranks]
    return [
        (ids_S[real_S].tolist(), labels_S[real_S].tolist())
        for batch in batches
        for ids_S, labels_S, real_S in zip(batch.input_ids, batch.labels, batch.attention_mask.bool(), strict=True)
    ]


def by_peft(recipe: Recipe, num_steps: int) -> dict[str, float]:
    """The same of the Trainer, whose batches are padded to their longest row as ours are."""
    import peft
    import transformers

    rows = rows_in_our_order(recipe, num_steps)

    def collate(batch: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in batch)
        padded = [(ids + [0] * (longest - len(ids)), labels + [-100] * (longest - len(ids))) for ids, labels in batch]
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        ids, labels = (torch.tensor(column) for column in zip(*padded, strict=True))
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    clock = Clock()

    class Noting(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.note()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.note()

    config = json.loads(DEEPSPEED.read_text()) | {"zero_allow_untested_optimizer": True}
    config |= {"train_micro_batch_size_per_gpu": recipe.train.micro_batch_size}
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        deepspeed=config,
        per_device_train_batch_size=recipe.train.micro_batch_size,
        max_steps=num_steps,
        learning_rate=1e-4,
        bf16=torch.bfloat16 == DTYPE,
        use_cpu=DEVICE.type == "cpu",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=DTYPE)
    rank = recipe.adapter.r * recipe.adapter.num_experts
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=TARGETS))
    dataset: Any = rows
    transformers.Trainer(model, arguments, data_collator=collate, train_dataset=dataset, callbacks=[Noting()]).train()
    supervised = sum(sum(label != -100 for label in labels[1:]) for _, labels in rows) / num_steps
    return {**clock.means(), "tokens": supervised}


# What the profiler calls the parts of a step, with all that runs inside of them; nothing lies in two parts.
PARTS = {
    "experts and routers": r"(.*: )?(RoutedExperts|RouterLogits|Decided)(Backward)?",
    "frozen linear layers": r"(.*: )?(LinearFunctionForZeroStage3|_Product)(Backward)?",
    "attention": r"aten::_scaled_dot_product\w+",
    "output head and loss": r"(.*: )?ChunkedNll(Backward)?",
    "ZeRO's hooks and gathers": r"(.*: )?(Pre|Post)BackwardFunction\w*|c10d::\w+",
    "optimizer": r"Optimizer\.step#.*",
}


def profile(num_steps: str, batch_size: str, quantize: QuantizeName) -> None:
    """Rank 0 prints a table of where the time of its thread goes."""
    recipe = recipe_of(int(batch_size), quantize=quantize)
    batches = steps_of(recipe, samples_of(recipe, int(num_steps)), comm.rank())
    engine = Engine.build(recipe, json.loads(DEEPSPEED.read_text()))
    for _ in range(NUM_WARM_UP):
        engine.train_step(next(batches))
    with torch.profiler.profile() as profiler:
        for batch in islice(batches, int(num_steps) - NUM_WARM_UP):
            engine.train_step(batch)
    if comm.rank() == 0:
        events = profiler.key_averages()
        whole = sum(event.self_cpu_time_total for event in events)
        shares = dict.fromkeys(PARTS, 0.0)
        for event in events:
            for part, pattern in PARTS.items():
                is_whole_node = event.key.startswith("autograd::engine") or not event.key.endswith("Backward")
                if re.fullmatch(pattern, event.key) and is_whole_node:
                    shares[part] += event.cpu_time_total / whole
        for part, share in {**shares, "the rest of the model, copies, waits": 1 - sum(shares.values())}.items():
            print(f"{part:40s} {share:5.0%}")


def worker(kind: str, num_steps: str, batch_size: str, quantize: QuantizeName = "none") -> None:
    """Train on this rank; rank 0 prints one line of JSON."""
    if kind == "profile":
        return profile(num_steps, batch_size, quantize)
    memory = PeakMemory()
    memory.start()
    recipe = recipe_of(int(batch_size), packing=kind == "packed", quantize="nf4" if kind == "nf4" else "none")
    measured = (by_peft if kind == "peft" else ours)(recipe, int(num_steps))
    memory.stop()
    if comm.rank() == 0:
        print(json.dumps({"kind": kind, "peak": memory.gib(), **measured}), flush=True)


def main() -> None:
    """Print medians of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the time goes, in ours")
    parser.add_argument("--quantize", action="store_true", help="ours on a base in 4 bits, too")
    args = parser.parse_args()
    print(setting())
    if args.profile:
        quantize = "nf4" if args.quantize else "none"
        run_ranks(__file__, NUM_RANKS, "profile", str(args.steps), str(args.batch_size), quantize)
        return
    kinds = ("ours", *(["nf4"] if args.quantize else []), "peft", "packed")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, lines in found.items():
            batch_size = args.batch_size // 4 if kind == "packed" else args.batch_size  # some four samples share a row
            said = run_ranks(__file__, NUM_RANKS, kind, str(args.steps), str(batch_size), quiet=True)
            lines.append(next(json.loads(line) for line in said.splitlines() if line.startswith('{"kind"')))
    names = {"ours": "routed experts", "nf4": "routed experts, 4 bits", "peft": "Trainer + PEFT"}
    names["packed"] = "routed experts, packed"
    for kind, lines in found.items():
        seconds, cpu, tokens, peak = (
            statistics.median(line[key] for line in lines) for key in ("seconds", "cpu", "tokens", "peak")
        )
        print(
            f"{names[kind]:24s} {seconds:6.2f} s a step ({cpu:.2f} of its core), {tokens / seconds:6.1f} supervised "
            f"tokens a second, peak of a rank {peak:.2f} GiB"
        )

    def ratio(kind: str, of: Callable[[dict[str, float]], float], to: str = "peft") -> float:
        return statistics.median(of(mine) / of(peer) for mine, peer in zip(found[kind], found[to], strict=True))

    if args.quantize:
        cells = (f"{ratio('nf4', lambda line, key=key: line[key], 'ours'):.2f} {what}" for key, what in KEYS.items())
        print(f"a base in 4 bits / in {DTYPE_NAME}: {', '.join(cells)}")

    print(
        f"ours / Trainer + PEFT: {ratio('ours', lambda line: line['seconds']):.2f} seconds a step, "
        f"{ratio('ours', lambda line: line['cpu']):.2f} of the core; packed / Trainer + PEFT: "
        f"{ratio('packed', lambda line: line['tokens'] / line['seconds']):.2f} tokens a second, "
        f"{ratio('packed', lambda line: line['tokens'] / line['cpu']):.2f} a second of the core"
    )


if __name__ == "__main__":
    main()

"""Run folder, disk, checkpoints and the port."""

from __future__ import annotations

import time
from threading import Thread

from dsmoelora.signs_of_life.heartbeat import Phase, Sign, write_sign
from tests.bad_input.bench import ROW, Bench, Case, cut, override
from tests.helpers import tiny_llama


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


def resume_other_base(bench: Bench) -> list[str]:
    other = tiny_llama(bench.folder / "other", hidden_size=32, intermediate_size=64, seed=1)
    return bench.train("--run.name", "new", "--resume", bench.checkpoint, "--model.path", other)


def resume_other_held_out(bench: Bench) -> list[str]:
    bench.rows(*3 * [ROW], name="other.jsonl")
    sets = f"[{{path: {bench.folder / 'other.jsonl'}}}]"
    return bench.train("--run.name", "new", "--resume", bench.checkpoint, "--data.eval", sets)


def run_in_use(bench: Bench) -> list[str]:
    """On another node a rank 0 gives signs of life while the case is tried."""

    def live() -> None:
        for _ in range(100):
            write_sign(bench.run, Sign(0, 2, Phase.TRAIN, time.time(), time.time(), host="elsewhere"))
            time.sleep(0.2)

    Thread(target=live, daemon=True).start()
    return bench.train("--resume", "auto")


AFTER_A_RUN: dict[str, Case] = {
    "the folder holds a run already": override(),
    "`--resume` names no folder": no_checkpoint_there,
    "`--resume` names an older checkpoint of the same run": older_checkpoint,
    "the run folder lies below a file": lambda bench: bench.train("--run.dir", bench.folder / "recipe.yaml"),
    "the disk is too small": override("--run.name", "new", "--train.keep_checkpoints", 10**12),
}
LATE: dict[str, Case] = {
    "another job is at work in the run folder": run_in_use,
    "a file of the checkpoint is cut short": cut_checkpoint,
    "a bit of the checkpoint has turned": rotten_checkpoint,
    "the checkpoint's index is damaged": broken_index,
    "`--resume` names a folder that is no checkpoint": base_as_checkpoint,
    "a checkpoint of another rank R": resume_with("--adapter.r", 3),
    "a checkpoint of other layers": resume_with("--adapter.target_modules", "[q_proj]"),
    "a checkpoint of another optimizer": resume_with("--optim.name", "sgd"),
    "a checkpoint of another start": resume_with("--adapter.init", "svd"),
    "a checkpoint of other data": resume_other_data,
    "a checkpoint of another base model": resume_other_base,
    "a checkpoint of another scale": resume_with("--adapter.lora_alpha", 64),
    "a checkpoint of another kind of loss": resume_with("--losses.balance", 0.01),
    "a checkpoint of another dtype": resume_with("--model.dtype", "bf16"),
    "a checkpoint of other held-out rows": resume_other_held_out,
    "a checkpoint beyond the last step": resume_with("--train.max_steps", 1),
    "a checkpoint of another seed": resume_with("--run.seed", 5),
}
TOGETHER: dict[str, Case] = {"the port is taken": override("--run.name", "new")}

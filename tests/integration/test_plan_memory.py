"""launch/plan.py as a user starts it, on a folder that has no weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]


def plan(*words: object) -> subprocess.CompletedProcess[str]:
    recipe = ROOT / "launch" / "recipes" / "llama2_7b_alpaca.yaml"
    command = [sys.executable, "launch/plan.py", "--config", recipe, "--deepspeed", "ds_configs/zero3.json", *words]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_7b_model_is_planned_without_it(tmp_path: Path) -> None:
    """Llama-2-7B has 6.74 billion numbers: 1.57 GiB in bf16 on each of eight ranks, 12.55 GiB on one."""
    LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32).save_pretrained(tmp_path)
    fits = plan("--model.path", tmp_path, "--gpus", 8, "--gpu", "a100-40", "--price", 2, "--out", tmp_path / "plan.png")
    assert fits.returncode == 0, fits.stderr
    assert "Memory of a rank: 8 x a100-40" in fits.stdout
    assert "1.569   exact" in next(line for line in fits.stdout.splitlines() if "base, partitioned" in line)
    assert "\nfits: " in fits.stdout
    # 94,371,840 trained numbers: gradients of four micro-batches in fp32, of which 7/8 leave a rank; values and moments
    gradients = next(line for line in fits.stdout.splitlines() if line.split()[:2] == ["gradients", "backward"])
    assert gradients.split()[-2:] == [f"{4 * 94_371_840 * 4 * 7 / 8 / 2**20:,.1f}", "0.0"]
    assert "a checkpoint: 135.0 MiB of a rank, 1,080 MiB of all" in fits.stdout
    assert max(map(len, fits.stdout.splitlines())) <= 100
    assert "Seconds of a step: 8 x a100-40" in fits.stdout
    (said,) = re.findall(r"bound by (\w+) \(it waits for ([^)]*)\)", " ".join(fits.stdout.split()))
    shares = {bound: int(share) for bound, share in re.findall(r"(\w+) (\d+) %", said[1])}
    assert said[0] == max(shares, key=lambda bound: shares[bound]) and abs(sum(shares.values()) - 100) <= 2
    assert "at 2 a device and hour" in fits.stdout
    (rate,) = re.findall(r"^([\d,]+ tokens/s), mfu", fits.stdout, re.MULTILINE)
    (step,) = re.findall(r"^([\d.]+ s) a step, bound", fits.stdout, re.MULTILINE)
    assert f"| {rate}, 1.2 hours | 128 x 512 tokens in {step}, " in (ROOT / "docs" / "planning.md").read_text()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    too_much = plan("--model.path", tmp_path, "--gpus", 1, "--gpu", "rtx-4090", "--train.micro_batch_size", 128)
    assert too_much.returncode == 1
    assert "1 x rtx-4090: does not fit, by what is estimated: " in too_much.stderr
    assert "Change what is largest: " in too_much.stderr

"""Every command of docs/compose.md, in its order, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsmoelora import load_adapter
from dsmoelora.run.files import read_metrics
from tests.conftest import release
from tests.forked import Program
from tests.given_adapters import logits, with_peft
from tests.launched import ROOT, make_workshop

PAGE = (ROOT / "docs" / "compose.md").read_text()
COMMANDS = re.findall(r"^    (python launch/.+)$", re.sub(r"^```sh\n.*?^```", "", PAGE, flags=re.M | re.S), flags=re.M)
SCRIPT = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.M | re.S)[0]
PATIENCE_S = 240.0
RECIPE = """
run: {dir: runs, seed: 3}
model: {path: model, dtype: fp32}
adapter: {target_modules: [q_proj, v_proj]}
optim: {warmup_steps: 0}
data: {train: [{path: train.jsonl}], eval: [{path: eval.jsonl}], max_length: 64}
train: {max_steps: 4, batch_size: 4, micro_batch_size: 2, eval_every: 4, save_every: 0, report_to: none}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone's launch/, mine.yaml and the data that the page names."""
    folder = make_workshop(tmp_path_factory.mktemp("compose"))
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "mine.yaml").write_text(RECIPE)
    (folder / "data").mkdir()
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for place, name in enumerate(("maths", "code", "site-1", "site-2")):
        (folder / "data" / f"{name}.jsonl").write_text("".join(rows[place::4]))
    return folder


@pytest.fixture(scope="module")
def composed(workshop: Path) -> Path:
    """The folder when all commands of the page have run."""
    for command in COMMANDS:
        _, program, *words = shlex.split(command)
        before = Path.cwd()
        os.chdir(workshop)
        try:
            running = Program([str(ROOT / program), *words], os.environ | {"OMP_NUM_THREADS": "1"})
            out, err = running.communicate(PATIENCE_S)
        finally:
            os.chdir(before)
        assert running.returncode == 0, f"{command}\n{out}\n{err}"
    return workshop


def test_the_page_has_cat_in_five_commands() -> None:
    section = PAGE.partition("## CAT in five commands")[2].partition("\n## ")[0]
    assert section.count("\n    python launch/") == 5
    assert len(COMMANDS) == 13


def test_cat_trains_two_numbers_a_layer_and_is_one_lora(composed: Path) -> None:
    both = load_file(composed / "runs" / "both" / "adapter" / "adapter_model.safetensors")
    for place, name in enumerate(("maths", "code")):
        alone = load_file(composed / "runs" / name / "adapter" / "adapter_model.safetensors")
        for tensor, value in alone.items():
            assert torch.equal(both[tensor][place], value[0]), "frozen factors are those of the folders"
    numbers = {name: value for name, value in both.items() if name.endswith("router.weight")}
    assert all(value.shape == (2, 1) and value.any() for value in numbers.values()) and len(numbers) == 2 * 2
    model = composed / "model"
    expected = logits(load_adapter(AutoModelForCausalLM.from_pretrained(model), composed / "runs" / "both" / "adapter"))
    for found in (with_peft(model, composed / "both"), AutoModelForCausalLM.from_pretrained(composed / "both-model")):
        torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(model))).abs().max() > 1e-3


def test_arrow_is_written_and_evaluated_without_a_step(composed: Path) -> None:
    rows = read_metrics(composed / "runs" / "arrow" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0] and "eval/loss" in rows[0]
    assert (composed / "runs" / "arrow" / "DONE").exists()
    tensors = load_file(composed / "runs" / "arrow" / "adapter" / "adapter_model.safetensors")
    for name, value in tensors.items():
        if name.endswith("router.weight"):
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(2))


def test_the_others_are_what_the_page_says(composed: Path) -> None:
    def described(name: str) -> dict[str, object]:
        text = (composed / "runs" / name / "adapter" / "adapter_config.json").read_text()
        found: dict[str, object] = json.loads(text)
        return found

    assert (described("ranks")["num_experts"], described("ranks")["r"]) == (8, 1)
    assert (described("routed")["router"], described("routed")["num_experts"]) == ("softmax", 2)
    assert described("more-code")["num_experts"] == 1
    first = read_metrics(composed / "runs" / "more-code" / "metrics.jsonl")[0]["eval/loss"]
    last = read_metrics(composed / "runs" / "code" / "metrics.jsonl")[-1]["eval/loss"]
    assert first == pytest.approx(last, rel=1e-6), "it begins where the adapter ended"
    assert json.loads((composed / "smaller" / "adapter_config.json").read_text())["r"] == 2


def test_the_lines_of_python_run(composed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They make what the command makes."""
    monkeypatch.chdir(composed)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    written = load_adapter(AutoModelForCausalLM.from_pretrained("model"), "runs/arrow/adapter")
    torch.testing.assert_close(logits(names["model"]), logits(written), rtol=1e-5, atol=1e-6)


@release
def test_federated_rounds(workshop: Path, tmp_path: Path) -> None:
    """The script as it stands: after each round the sites' mean, and one `a` for all of them."""
    folder = tmp_path / "sites"
    shutil.copytree(workshop, folder, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-euc", SCRIPT], cwd=folder, env=environment, check=True, timeout=4 * PATIENCE_S)

    def tensors(name: str) -> dict[str, torch.Tensor]:
        return load_file(folder / "runs" / name / "adapter_model.safetensors")

    start = tensors("round-1")
    for round_ in (1, 2):
        merged, sites = tensors(f"round-{round_}"), [tensors(f"round-{round_}-site-{site}/adapter") for site in (1, 2)]
        for name, value in merged.items():
            if name.endswith(".a"):
                assert all(torch.equal(one[name], start[name]) for one in (merged, *sites))
            else:
                torch.testing.assert_close(value, (sites[0][name] + sites[1][name]) / 2, rtol=1e-6, atol=1e-9)
                assert not torch.equal(sites[0][name], sites[1][name])

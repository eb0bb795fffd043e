"""`--fit`: the best `b` for the `a` of a mixture, against least squares on the activations themselves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.config import DataSource, ModelConfig
from dsmoelora.data import load_instructions
from dsmoelora.errors import ConfigError
from dsmoelora.export.fitted import Moments
from dsmoelora.model import load_tokenizer
from launch import export
from tests.helpers import tiny_llama
from tests.unit.test_export import BLOCKS, CONFIG, PROMPTS, logits, make_adapter, run, with_peft

ROWS = [
    {"instruction": f"Say {word}.", "output": word[::-1]} for word in ["yes", "no", "perhaps", "never", "often", "once"]
]
MOSLORA = AdapterConfig(r=3, num_experts=4, top_k=2, expert="moslora", target_modules=["q_proj", "o_proj"])


def test_moments_give_what_least_squares_on_all_tokens_gives() -> None:
    rng = torch.Generator().manual_seed(0)
    z_TF, b_OF = (torch.randn(size, generator=rng, dtype=torch.float64) for size in ((200, 12), (7, 12)))
    gate_TE = torch.rand(200, 4, generator=rng, dtype=torch.float64)
    mixed_TF = z_TF * gate_TE.repeat_interleave(3, 1)
    moments = Moments.empty(12)
    for part in range(4):
        moments.add(z_TF[50 * part : 50 * (part + 1)], gate_TE[50 * part : 50 * (part + 1)])
    y_TO = mixed_TF @ b_OF.t()
    expected = torch.linalg.lstsq(z_TF, y_TO).solution.t()
    start_OF = b_OF * gate_TE.mean(0).repeat_interleave(3)
    found = moments.fitted(b_OF, start_OF)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one in (found, start_OF, b_OF):
        square, whole = moments.errors(b_OF, one)
        assert square == pytest.approx(float((y_TO - z_TF @ one.t()).square().sum()))
        assert whole == pytest.approx(float(y_TO.square().sum()))


def test_where_no_token_says_otherwise_the_average_stays() -> None:
    rng = torch.Generator().manual_seed(0)
    z_TF, b_OF = torch.randn(3, 12, generator=rng).double(), torch.randn(7, 12, generator=rng).double()
    moments = Moments.empty(12)
    moments.add(z_TF, torch.rand(3, 4, generator=rng).double())
    start_OF = 0.5 * b_OF
    change_OF = moments.fitted(b_OF, start_OF) - start_OF
    unseen_F = torch.linalg.qr(z_TF.t(), mode="complete").Q[:, 3:]  # three tokens show three of twelve directions
    assert change_OF.norm() > 0.1
    assert (change_OF @ unseen_F).norm() < 1e-6 * change_OF.norm()
    assert torch.equal(Moments.empty(12).fitted(b_OF, start_OF), start_OF)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "config",
    [CONFIG, BLOCKS, PROMPTS, MOSLORA, replace(CONFIG, init="svd")],
    ids=["per-linear", "ffn-block", "prompt", "moslora", "svd"],
)
def test_the_fit_is_never_further_from_the_mixture_than_the_average(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, config: AdapterConfig
) -> None:
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv: tuple[Any, ...] = ("--adapter", adapter, "--format", "average", "--data", data)
    run(monkeypatch, *argv, "--out", tmp_path / "average")
    capsys.readouterr()
    run(monkeypatch, *argv, "--fit", "--out", tmp_path / "fitted")
    said = capsys.readouterr().out
    distances = [float(share) for share in re.findall(r"(?:average|fitted) ([\d.]+)%", said)]
    assert len(distances) == 2 and distances[1] < distances[0]

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name, _ in adapted_layers(model)}

    def note(name: str) -> Any:
        def hook(experts: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name].append((inputs[1], output - inputs[0]))

        return hook

    for name, layer in adapted_layers(model):
        layer.experts.register_forward_hook(note(name))
    samples = load_instructions([DataSource(str(data))], "x", load_tokenizer(ModelConfig(str(adapter))), 512)
    for index in range(len(samples)):
        ids, labels = (torch.tensor([part]) for part in samples.sample(index))
        with torch.no_grad():
            model(input_ids=ids, labels=labels, use_cache=False)
    shift = {name: torch.zeros(()) for name in seen}
    if config.init == "svd":  # the exported adapters take the start off the base, the experts were trained without it
        start = load_file(adapter / "start.safetensors")
        shift = {
            name: config.scale / 4 * torch.einsum("edr,eor->do", start[f"{name}.experts.a"], start[f"{name}.experts.b"])
            for name in seen
        }
    errors = {kind: dict.fromkeys(seen, 0.0) for kind in ("average", "fitted")}
    for kind in errors:
        tensors = load_file(tmp_path / kind / "adapter_model.safetensors")
        for name, parts in seen.items():
            a_RD, b_OR = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            for x_TD, y_TO in parts:
                wanted_TO = y_TO - x_TD @ shift[name] if shift[name].dim() else y_TO
                errors[kind][name] += float((x_TD @ a_RD.t() @ b_OR.t() - wanted_TO).square().sum())
    for name in seen:
        assert errors["fitted"][name] <= errors["average"][name] * (1 + 1e-4) + 1e-8, name
    assert sum(errors["fitted"].values()) < 0.99 * sum(errors["average"].values())
    assert not torch.equal(*(logits(with_peft(base_path, tmp_path / kind)) for kind in errors))


def test_a_tied_head_must_not_be_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = replace(CONFIG, lora_modules=["lm_head"])
    for is_tied in (True, False):
        base = tiny_llama(tmp_path / f"base-{is_tied}", tie_word_embeddings=is_tied)
        adapter = make_adapter(base, tmp_path / f"adapter-{is_tied}", config)
        run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / f"out-{is_tied}")
        said = "lm_head shares its weight with the base's embeddings" in capsys.readouterr().out
        assert said == is_tied


def test_nothing_is_fitted_to_single_experts() -> None:
    with pytest.raises(ConfigError, match=r"--fit belongs to --format average\. Drop it"):
        export.parse_options(["--adapter", "a", "--format", "peft", "--out", "b", "--fit"])

"""The base model as it is loaded: what of it is switched off, and which attention it can have."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

from dsmoelora.config import ModelConfig
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import (
    load_model,
    load_tokenizer,
    model_without_weights,
    trained_tokenizer,
    watched_loading,
    without_dropout,
)
from dsmoelora.model.loading import load_model_config
from dsmoelora.signs_of_life import waits
from tests.architectures import save_model
from tests.helpers import bring_own_code, tiny_llama


@pytest.mark.parametrize(
    ("described", "was_on"),
    [
        (GPT2Config(resid_pdrop=0.2), {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        (LlamaConfig(), {}),
        (MixtralConfig(router_jitter_noise=0.01), {"router_jitter_noise": 0.01}),
        (OPTConfig(dropout=0.0, layerdrop=0.3), {"layerdrop": 0.3}),
    ],
)
def test_what_makes_a_forward_pass_random_is_switched_off(
    described: PretrainedConfig, was_on: dict[str, float]
) -> None:
    assert without_dropout(described) == was_on
    assert all(getattr(described, key) == 0.0 for key in was_on)
    assert without_dropout(described) == {}


def test_a_loaded_model_has_no_dropout_of_its_own(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path)  # 0.1 in three places
    model = load_model(ModelConfig(path=str(folder), dtype="fp32"), {"zero_optimization": {"stage": 0}}).train()
    with torch.no_grad():
        assert torch.equal(model(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


def test_each_tensor_that_is_loaded_is_a_sign_of_life_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "FIRST_WORD_S", 0.05)
    monkeypatch.setattr(waits, "LOOK_EVERY_S", 0.01)
    config = ModelConfig(path=str(save_model("llama", tmp_path)), dtype="fp32")
    beats: list[int] = []
    with watched_loading("the model", lambda: beats.append(1), speaks=True):
        deadline = time.monotonic() + 10
        while not beats and time.monotonic() < deadline:  # a first look at nothing
            time.sleep(0.01)
        num_tensors = len(list(load_model(config, {"zero_optimization": {"stage": 0}}).parameters()))
        all_of_them = f"Waiting for the weights of the model ({num_tensors} of {num_tensors} tensors are here), since"
        deadline = time.monotonic() + 10
        while (all_of_them not in caplog.text or len(beats) < 2) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert all_of_them in caplog.text
    assert len(beats) > 1


def test_a_package_that_a_models_code_lacks_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    bring_own_code(folder)
    code = folder / "own_llama.py"
    code.write_text("import nobody_has_this\n" + code.read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own_llama.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(path=str(folder), trust_remote_code=True)
    for load in (
        lambda: load_model_config(config),
        lambda: load_tokenizer(config),
        lambda: trained_tokenizer(folder, trust_remote_code=True),
    ):
        with pytest.raises(ModelError, match="not found in your environment: nobody_has_this"):
            load()


def test_an_attention_that_the_model_cannot_have_is_answered_with_one_that_it_can(tmp_path: Path) -> None:
    folder = str(save_model("gemma2", tmp_path))
    with pytest.raises(
        ConfigError, match=r"model\.attention is 'sdpa', but it must be eager for this model\. .*capped"
    ):
        model_without_weights(ModelConfig(path=folder, attention="sdpa"))
    assert model_without_weights(ModelConfig(path=folder, attention="eager")).device.type == "meta"

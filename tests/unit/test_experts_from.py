"""Experts that start from adapters: they do what these did, and what cannot be started from is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.given import settings_of
from dsmoelora.cli import parse_command
from dsmoelora.config.adapter_options import RouterName
from dsmoelora.errors import CheckpointError, ConfigError
from tests.architectures import save_model
from tests.fixed_gate import fix_gates
from tests.given_adapters import (
    dense_updates,
    expert_updates,
    logits,
    other_base,
    our_adapter,
    peft_adapter,
    started_from,
    with_peft,
)
from tests.helpers import tiny_llama

OURS = AdapterConfig(r=2, lora_alpha=12, num_experts=3, top_k=2, target_modules=["q_proj", "down_proj"])
BLOCKS = AdapterConfig(
    r=2,
    num_experts=3,
    top_k=2,
    style="ffn_block",
    target_modules=["gate_proj", "up_proj", "down_proj"],
    lora_modules=["q_proj"],
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def peft_folder(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_adapter(base_path, tmp_path_factory.mktemp("peft") / "adapter")


PEFT_SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"up_proj": 9}},
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 7}, "use_rslora": True, "lora_alpha": 5},
]


@pytest.mark.parametrize("settings", PEFT_SETTINGS, ids=str)
def test_one_folder_of_peft_gives_the_logits_of_peft(base_path: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = peft_adapter(base_path, tmp_path / "adapter", **settings)
    ours, theirs = logits(started_from(base_path, folder)), logits(with_peft(base_path, folder))
    assert (ours - logits(AutoModelForCausalLM.from_pretrained(base_path))).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_weights_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's `Conv1D`."""
    base_path = save_model("gpt2", tmp_path / "base")
    folder = peft_adapter(base_path, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    ours, theirs = started_from(base_path, folder).double(), with_peft(base_path, folder).double()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("router", get_args(RouterName))
def test_the_same_folder_twice_is_the_folder(base_path: Path, peft_folder: Path, router: Any) -> None:
    """For every router, for gates sum to 1."""
    top_k = {"top_k": 1} if router == "sigmoid_bias" else {}  # its bias has nothing to choose among two of two
    twice = started_from(base_path, peft_folder, peft_folder, router=router, **top_k)
    torch.testing.assert_close(logits(twice), logits(with_peft(base_path, peft_folder)), rtol=1e-6, atol=1e-6)


def test_mixed_ranks_and_scales_are_the_dense_updates(base_path: Path, tmp_path: Path) -> None:
    folders = [
        peft_adapter(base_path, tmp_path / "one", seed=1),
        peft_adapter(base_path, tmp_path / "two", seed=2, r=5, lora_alpha=35, target_modules=["q_proj"]),
        our_adapter(base_path, tmp_path / "three", OURS, seed=3),
    ]
    model = started_from(base_path, *folders)
    found = expert_updates(model)
    dense = [dense_updates(with_peft(base_path, folder)) for folder in folders[:2]]
    mixture = expert_updates(load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folders[2]))
    assert set(found) == {*dense[0], *dense[1], *mixture}
    for name, update_EOD in found.items():
        none = torch.zeros_like(update_EOD[0])
        wanted = [dense[0].get(name, none), dense[1].get(name, none), *mixture.get(name, none.expand(3, -1, -1))]
        torch.testing.assert_close(update_EOD, torch.stack(wanted), rtol=1e-6, atol=1e-7)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").experts.a.shape == (5, 64, 5)


def test_what_is_padded_can_learn(base_path: Path, tmp_path: Path, peft_folder: Path) -> None:
    """Columns of `a` beyond an adapter's rank are those of a random start, those of `b` are 0."""
    wide = peft_adapter(base_path, tmp_path / "wide", r=5)
    model = started_from(base_path, peft_folder, wide)
    fresh = AutoModelForCausalLM.from_pretrained(base_path)
    inject(fresh, AdapterConfig(r=5, num_experts=2, target_modules=["q_proj", "up_proj"]))
    for (_, layer), (_, other) in zip(adapted_layers(model), adapted_layers(fresh), strict=True):
        assert torch.equal(layer.experts.a[0, :, 3:], other.experts.a[0, :, 3:])
        assert not layer.experts.b[0, :, 3:].any() and layer.experts.b[1].all()


@pytest.mark.parametrize("expert", ["lora", "moslora"])
def test_mixers_are_folded_or_kept(base_path: Path, tmp_path: Path, peft_folder: Path, expert: Any) -> None:
    mixed = AdapterConfig(r=2, num_experts=2, expert="moslora", target_modules=["q_proj"])
    folder = our_adapter(base_path, tmp_path / "mixed", mixed)
    model = started_from(base_path, folder, peft_folder, expert=expert)
    found = expert_updates(model)["model.layers.1.self_attn.q_proj"]
    trained = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder)
    wanted = expert_updates(trained)["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(found[:2], wanted, rtol=1e-5, atol=1e-7)
    of_peft = dense_updates(with_peft(base_path, peft_folder))["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(found[2], of_peft, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_experts_take_along_what_was_taken_off_their_base(base_path: Path, tmp_path: Path, num_experts: int) -> None:
    config = AdapterConfig(r=2, num_experts=num_experts, top_k=1, init="svd", target_modules=["q_proj", "v_proj"])
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    trained, started = (
        load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder),
        started_from(base_path, folder),
    )
    if num_experts > 1:
        for model in (trained, started):
            for _, layer in adapted_layers(model):
                fix_gates(layer, torch.tensor([0.5, 0.2, 0.3]))
    torch.testing.assert_close(logits(started), logits(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [OURS, BLOCKS], ids=["per-linear", "ffn-block"])
def test_one_folder_of_ours_goes_on_with_its_routers(base_path: Path, tmp_path: Path, config: AdapterConfig) -> None:
    folder = our_adapter(base_path, tmp_path / "adapter", config)
    started = started_from(base_path, folder, style=config.style, top_k=2)
    trained = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder)
    assert torch.equal(logits(started), logits(trained))


def test_plain_layers_of_one_of_several_folders_belong_to_each_of_its_experts(base_path: Path, tmp_path: Path) -> None:
    one, two = (our_adapter(base_path, tmp_path / str(seed), BLOCKS, seed=seed) for seed in (1, 2))
    found = expert_updates(started_from(base_path, one, two))["model.layers.0.self_attn.q_proj"]
    for expert, folder in enumerate([one] * 3 + [two] * 3):
        trained = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folder)
        wanted = expert_updates(trained)["model.layers.0.self_attn.q_proj"][0]
        torch.testing.assert_close(found[expert], wanted, rtol=1e-6, atol=1e-8)


def test_ranks_read_the_experts_that_they_hold(base_path: Path, tmp_path: Path, peft_folder: Path) -> None:
    folders = [str(our_adapter(base_path, tmp_path / "adapter", OURS)), str(peft_folder)]
    config = AdapterConfig(experts_from=folders, **settings_of(folders, {}))
    whole = AutoModelForCausalLM.from_pretrained(base_path)
    inject(whole, config)
    for held in (range(0, 2), range(2, 4)):
        part = AutoModelForCausalLM.from_pretrained(base_path)
        inject(part, config, held)
        for (_, own), (_, all_) in zip(adapted_layers(part), adapted_layers(whole), strict=True):
            for factor in ("a", "b"):
                assert torch.equal(getattr(own.experts, factor), getattr(all_.experts, factor)[held.start : held.stop])


def test_an_adapter_trained_from_others_needs_them_no_more(base_path: Path, tmp_path: Path, peft_folder: Path) -> None:
    model = started_from(base_path, peft_folder, peft_folder)
    prints = fingerprint(AutoModelForCausalLM.from_pretrained(base_path).named_parameters())
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    config = AdapterConfig(
        experts_from=["gone"], num_experts=2, r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]
    )
    write_adapter(tmp_path / "new", config, [n for n, _ in adapted_layers(model)], tensors, str(base_path), prints)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), tmp_path / "new")
    assert torch.equal(logits(loaded), logits(model))


def command(*flags: str) -> AdapterConfig:
    return parse_command([*flags, "--model.path", "x"]).recipe.adapter


def test_the_command_line_asks_the_folders(base_path: Path, tmp_path: Path, peft_folder: Path) -> None:
    wide = peft_adapter(base_path, tmp_path / "wide", r=5, lora_alpha=20, target_modules=["q_proj", "v_proj"])
    given = ["--adapter.experts_from", json.dumps([str(wide), str(peft_folder)])]
    config = command(*given)
    assert (config.num_experts, config.r, config.lora_alpha, config.top_k) == (2, 5, 20.0, 1)
    layers = {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    assert set(config.target_modules) == layers
    said = command(*given, "--adapter.lora_alpha", "3", "--adapter.target_modules", "all-linear")
    assert (said.lora_alpha, said.target_modules, said.r) == (3.0, "all-linear", 5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA rescales the rows of the weight"),
    "bias": ({"bias": "lora_only"}, "it brings biases along"),
    "modules": ({"modules_to_save": ["lm_head"]}, "it brings whole modules along"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "of linear layers alone, and it has"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_more_than_plain_lora_is_refused(base_path: Path, tmp_path: Path, what: str) -> None:
    settings, message = REFUSED[what]
    folder = peft_adapter(base_path, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigError, match=message):
        started_from(base_path, folder)


def test_a_start_that_was_taken_off_the_base_is_refused(base_path: Path, tmp_path: Path, peft_folder: Path) -> None:
    path = peft_folder.rename(tmp_path / "adapter") / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ConfigError, match="init_lora_weights: pissa_niter_4"):
        started_from(base_path, path.parent)
    path.write_text(json.dumps(said))
    path.parent.rename(peft_folder)


def test_shared_experts_are_refused(base_path: Path, tmp_path: Path) -> None:
    config = AdapterConfig(r=2, num_experts=2, shared_experts=1, router="constant", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="and this one has shared experts"):
        started_from(base_path, our_adapter(base_path, tmp_path / "adapter", config))


def test_lengths_of_rows_are_refused(base_path: Path, tmp_path: Path) -> None:
    config = AdapterConfig(num_experts=2, expert="dora", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"adapter\.expert: dora"):
        started_from(base_path, our_adapter(base_path, tmp_path / "adapter", config))


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_another_base_is_refused(base_path: Path, tmp_path: Path, kind: str) -> None:
    """By its numbers where the folder has a fingerprint, else by its shapes."""
    if kind == "ours":
        folder, base = our_adapter(base_path, tmp_path / "adapter", OURS), other_base(base_path, tmp_path / "base")
        message = "was trained on another base model: model.embed_tokens.weight has other numbers"
    else:
        folder, base = peft_adapter(base_path, tmp_path / "adapter"), tiny_llama(tmp_path / "base", hidden_size=32)
        message = "proj of 64 in- and .* out-features, and the model has one of 32 in- and"
    with pytest.raises(CheckpointError, match=message):
        started_from(base, folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4}, "adapter.num_experts is 4, but it must be 2, the number of experts"),
        ({"r": 8}, "adapter.r is 8, but it must be 3, the largest rank"),
        ({"target_modules": ["q_proj"]}, "such that it names all layers of .* leaves out model.layers.0.mlp.up_proj"),
        (
            {"lora_modules": ["q_proj"], "target_modules": ["up_proj"]},
            "brings others to model.layers.0.self_attn.q_proj",
        ),
        ({"init": "svd"}, "adapter.init is 'svd'"),
        ({"init": "gradient"}, "adapter.init is 'gradient'"),
        ({"shared_experts": 1}, "adapter.shared_experts is 1, but it must be 0 with adapter.experts_from"),
        ({"expert": "dora"}, "adapter.expert is 'dora'"),
    ],
)
def test_contradictions_are_refused(base_path: Path, peft_folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started_from(base_path, peft_folder, peft_folder, **settings)


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def another_kind(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def another_rank(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 7}))


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_weights, "cannot be read"),
        (no_weights, "has no adapter_model.safetensors"),
        (not_finite, "that are not finite"),
        (another_kind, "this one has 'IA3'"),
        (another_rank, "says rank 7"),
        (no_folder, "is no adapter folder"),
    ],
)
def test_damaged_folders_are_refused(
    base_path: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = peft_adapter(base_path, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        started_from(base_path, folder)


def test_ranks_as_experts_with_equal_gates_are_the_mean_of_the_adapters(base_path: Path, tmp_path: Path) -> None:
    """Of mixed ranks and scales, and of a mixture, whose experts count as adapters."""
    folders = [
        peft_adapter(base_path, tmp_path / "one", seed=1),
        peft_adapter(base_path, tmp_path / "two", seed=2, r=5, lora_alpha=35, rank_pattern={"q_proj": 2}),
        our_adapter(base_path, tmp_path / "three", OURS, seed=3),
    ]
    model = started_from(base_path, *folders, split_ranks=True)
    dense = [dense_updates(with_peft(base_path, folder)) for folder in folders[:2]]
    mixture = expert_updates(load_adapter(AutoModelForCausalLM.from_pretrained(base_path), folders[2]))
    num_experts, num_adapters = 3 + 5 + 3 * 2, 2 + 3
    for name, layer in adapted_layers(model):
        assert layer.experts.a.shape[::2] == layer.experts.b.shape[::2] == (num_experts, 1)
        mean = sum(updates[name] for updates in dense if name in updates)
        mean = (mean + mixture[name].sum(0) if name in mixture else mean) / num_adapters
        torch.testing.assert_close(expert_updates(model)[name].mean(0), mean, rtol=1e-5, atol=1e-7)
    padding = dict(adapted_layers(model))["model.layers.0.self_attn.q_proj"].experts
    assert padding.a[5:8].any(1).all() and not padding.b[5:8].any(), "what the adapter lacks may learn"


@pytest.mark.parametrize("plain_base", ["moslora", "svd", "blocks"])
def test_ranks_of_every_kind_of_ours(base_path: Path, tmp_path: Path, plain_base: str) -> None:
    """Mixers, a shifted base, plain layers beside routed ones."""
    kinds: dict[str, AdapterConfig] = {
        "moslora": AdapterConfig(r=2, num_experts=2, expert="moslora", target_modules=["q_proj"]),
        "svd": AdapterConfig(r=2, num_experts=2, init="svd", target_modules=["q_proj"]),
        "blocks": BLOCKS,
    }
    folder = our_adapter(base_path, tmp_path / "adapter", kinds[plain_base])
    whole = expert_updates(started_from(base_path, folder, style=kinds[plain_base].style))
    split = expert_updates(started_from(base_path, folder, split_ranks=True))
    for name, update_EOD in whole.items():
        torch.testing.assert_close(split[name].mean(0), update_EOD.mean(0), rtol=1e-4, atol=1e-7)


def test_ranks_hold_some_of_the_ranks(base_path: Path, tmp_path: Path) -> None:
    """A rank that begins in the middle of an adapter reads what it holds."""
    folders = [str(peft_adapter(base_path, tmp_path / str(seed), seed)) for seed in (1, 2)]
    config = AdapterConfig(experts_from=folders, split_ranks=True, **settings_of(folders, {"split_ranks": True}))
    whole, part = (AutoModelForCausalLM.from_pretrained(base_path) for _ in range(2))
    inject(whole, config)
    inject(part, config, range(2, 4))
    for (_, own), (_, all_) in zip(adapted_layers(part), adapted_layers(whole), strict=True):
        assert torch.equal(own.experts.a, all_.experts.a[2:4]) and torch.equal(own.experts.b, all_.experts.b[2:4])


def test_what_cannot_be_split_is_refused(base_path: Path, peft_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.split_ranks is True, but it must be left at False where"):
        AdapterConfig(split_ranks=True)
    with pytest.raises(ConfigError, match="one number is no mixer"):
        started_from(base_path, peft_folder, split_ranks=True, expert="moslora")

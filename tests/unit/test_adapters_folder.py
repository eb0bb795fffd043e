"""The adapter folder: what is written comes back, and what does not belong together is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import router_buffers, write_adapter
from dsmoelora.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from dsmoelora.config.adapter_options import ExpertName, RouterName
from dsmoelora.errors import CheckpointError, ModelError
from tests.helpers import tiny_llama


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(base_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_path).eval()


@pytest.fixture
def adapted(base: PreTrainedModel) -> PreTrainedModel:
    """A model whose experts have learned something."""
    model = copy.deepcopy(base)
    inject(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weights_of(model).values():
            parameter.normal_(std=0.05, generator=generator)
    return model


CONFIG = AdapterConfig(
    r=3, lora_alpha=12, use_rslora=True, num_experts=5, top_k=2, target_modules=["q_proj", "up_proj"]
)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model: PreTrainedModel, base: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    layers = dict(adapted_layers(model))
    prints = fingerprint(base.named_parameters())
    weights = {name: value.detach() for name, value in weights_of(model).items()} if weights is None else weights
    write_adapter(folder, CONFIG, list(layers), weights, "models/tiny", prints)
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    ids_BS = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        return model(ids_BS).logits


def test_a_loaded_adapter_gives_the_same_logits(
    base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    loaded = load_adapter(base, folder)
    assert loaded is base
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(adapted.eval()))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", CONFIG_FILE, WEIGHTS_FILE]


BLOCKS: dict[str, Any] = {
    "style": "ffn_block",
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
    "lora_modules": ["q_proj", "v_proj"],
}
ROUTERS_AND_EXPERTS = [
    *((router, "lora") for router in get_args(RouterName) if router != "arrow"),  # learns nothing
    *(("top_p", expert) for expert in get_args(ExpertName) if expert != "lora"),
]


@pytest.mark.parametrize("places", [{"target_modules": ["q_proj", "up_proj"]}, BLOCKS], ids=["per-linear", "ffn-block"])
@pytest.mark.parametrize(("router", "expert"), ROUTERS_AND_EXPERTS)
def test_every_router_and_expert_comes_back_with_all_that_it_learned(
    base: PreTrainedModel, tmp_path: Path, router: Any, expert: Any, places: dict[str, Any]
) -> None:
    model = copy.deepcopy(base)
    config = AdapterConfig(r=3, num_experts=5, router=router, expert=expert, **places)
    inject(model, config)
    with torch.no_grad():
        for number, parameter in enumerate(weights_of(model).values()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        for steps in router_buffers(model).values():
            steps.copy_(torch.tensor([40, -3, 0, 17, -900]))
    assert bool(router_buffers(model)) == (router == "sigmoid_bias")
    tensors = {name: value.detach() for name, value in weights_of(model).items()} | router_buffers(model)
    folder = tmp_path / "adapter"
    prints = fingerprint(base.named_parameters())
    write_adapter(folder, config, [name for name, _ in adapted_layers(model)], tensors, "models/tiny", prints)
    expected = logits(model.eval())
    assert not torch.equal(logits(base), expected)
    assert torch.equal(logits(load_adapter(base, folder)), expected)


def test_an_adapter_loads_on_its_base_in_another_dtype(
    base_path: Path, base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16), folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = logits(adapted.eval())
    assert (logits(loaded).float() - expected).norm() < 0.05 * expected.norm()


def test_the_folder_says_what_it_is(base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    description = json.loads((folder / CONFIG_FILE).read_text())
    assert description["peft_type"] == "DSMOELORA"
    assert description["base_model_name_or_path"] == "models/tiny"
    settings = ("r", "lora_alpha", "use_rslora", "num_experts", "top_k", "gate_power")
    assert [description[name] for name in settings] == [3, 12, True, 5, 2, 1.0]
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors.keys() == weights_of(adapted).keys(), "the frozen base is no part of an adapter"
    shapes = {name: tuple(tensors[f"model.layers.0.mlp.up_proj.{name}"].shape) for name in ("experts.a", "experts.b")}
    assert shapes == {"experts.a": (5, 64, 3), "experts.b": (5, 128, 3)}


def other_numbers(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)


def other_shape(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)


def missing_layer(model: PreTrainedModel) -> None:
    del model.model.layers[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_numbers, r"layers\.0\.self_attn\.q_proj\.weight has other numbers"),
        (other_shape, r"layers\.1\.mlp\.up_proj\.weight has shape \[96, 64\], not \[128, 64\]"),
        (missing_layer, r"adapts model\.layers\.1\.self_attn\.q_proj, which this model does not have"),
    ],
)
def test_another_base_is_refused_and_left_alone(
    base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path, change: Any, words: str
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    change(base)
    with pytest.raises(CheckpointError, match=words + r".*Load the adapter on 'models/tiny'"):
        load_adapter(base, folder)
    assert not list(adapted_layers(base))


def test_an_adapted_model_is_refused(base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="routed experts already"):
        load_adapter(adapted, save(adapted, base, tmp_path / "adapter"))


def cut_in_half(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def without_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["model.layers.1.mlp.up_proj.experts.b"]
    save_file(tensors, folder / WEIGHTS_FILE)


def with_one_expert_less(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "model.layers.1.mlp.up_proj.experts.b"
    save_file(tensors | {name: tensors[name][:1].clone()}, folder / WEIGHTS_FILE)


def without_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def half_a_config(folder: Path) -> None:
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text[: len(text) // 2])


def with_setting(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        description = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(description | {name: value}))

    return change


def config_without_layers(folder: Path) -> None:
    description = json.loads((folder / CONFIG_FILE).read_text())
    del description["layers"]
    (folder / CONFIG_FILE).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_in_half, r"adapter_model\.safetensors cannot be read"),
        (without_weights, r"adapter_model\.safetensors cannot be read"),
        (without_one_tensor, r"does not fit.*layers\.1\.mlp\.up_proj\.experts\.b"),
        (with_one_expert_less, r"does not fit.*layers\.1\.mlp\.up_proj\.experts\.b"),
        (without_config, r"adapter_config\.json cannot be read"),
        (half_a_config, r"adapter_config\.json is damaged"),
        (config_without_layers, r"adapter_config\.json is damaged.*layers"),
        (with_setting("r", "two"), r"adapter_config\.json is damaged"),
        (with_setting("router", "magic"), r"adapter_config\.json is damaged: adapter\.router is 'magic'.*softmax_topk"),
        (with_setting("lora_dropout", None), r"adapter_config\.json is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(
    base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path, damage: Any, words: str
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.empty(0), "is empty"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
    ],
)
def test_empty_and_non_finite_tensors_are_not_written_and_an_older_folder_stays(
    base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path, value: Tensor, words: str
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = "model.layers.0.self_attn.q_proj.experts.b"
    weights = {name: tensor.detach() for name, tensor in weights_of(adapted).items()}
    with pytest.raises(CheckpointError, match=rf"was not written.*{name}.*{words}"):
        save(adapted, base, folder, weights | {name: value})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_newer_adapter_replaces_the_older_one(
    base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path
) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    doubled = {name: 2 * tensor.detach() for name, tensor in weights_of(adapted).items()}
    save(adapted, base, folder, doubled)
    assert all(torch.equal(tensor, doubled[name]) for name, tensor in load_file(folder / WEIGHTS_FILE).items())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_peft_refuses_our_folder(base: PreTrainedModel, adapted: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(adapted, base, tmp_path / "adapter")
    before = logits(base)
    with pytest.raises((KeyError, ValueError), match="DSMOELORA"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(base), before), "nothing of it is loaded"


def test_we_refuse_a_folder_of_peft(base: PreTrainedModel, tmp_path: Path) -> None:
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"peft_type 'LORA', but must have 'DSMOELORA'.*peft package"):
        load_adapter(base, tmp_path)

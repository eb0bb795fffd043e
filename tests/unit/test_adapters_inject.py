"""Putting routed experts on the models of the Llama family, and running what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import RoutedLinear, adapted_layers, adapter_context, match_targets
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import recompute_activations
from tests.architectures import adapt

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "smollm": lambda: LlamaConfig(**SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36},
                                  tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),  # with biases on q, k and v
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),  # 4 x 16 is not the hidden size
}  # fmt: skip


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()


def token_ids(num_sequences: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 97, (num_sequences, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_wraps_what_the_targets_name_and_freezes_the_rest(family: str) -> None:
    model = make_model(family)
    names = inject(model, AdapterConfig(r=3, num_experts=5, top_k=2, target_modules=["v_proj", "q_proj", "down_proj"]))
    places = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")  # in the order of the model
    assert names == [f"model.layers.{layer}.{place}" for layer in (0, 1) for place in places]
    assert [name for name, _ in adapted_layers(model)] == names
    wanted = {f"{name}.{part}" for name in names for part in ("experts.a", "experts.b", "router.weight")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, RoutedLinear)
        num_out, num_in = layer.base.weight.shape
        assert layer.experts.a.shape == (5, num_in, 3)
        assert layer.experts.b.shape == (5, num_out, 3)
        assert layer.router.weight.shape == (5, num_in)
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("targets", ["model.layers.1.mlp.down_proj", "1.mlp.down_proj", ["mlp.down_proj", "nose"]])
def test_a_target_is_a_whole_name_or_its_end(targets: str | list[str]) -> None:
    model = make_model()
    if isinstance(targets, str):
        assert match_targets(model, [targets]) == ["model.layers.1.mlp.down_proj"]
        return
    with pytest.raises(ConfigError, match=r"(?s)adapter\.target_modules.*'nose'.*q_proj.*all-linear"):
        match_targets(model, targets)


def test_all_linear_in_a_list() -> None:
    """As a recipe may write it: the value itself where it stands alone, else an error whose remedies work."""
    model = make_model()
    assert AdapterConfig(target_modules=["all-linear"]) == AdapterConfig(target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"must be all-linear alone, or names.*target_modules: all-linear\."):
        match_targets(model, ["all-linear", "lm_head"])
    assert match_targets(model, "all-linear") and match_targets(model, ["q_proj", "lm_head"])


@pytest.mark.parametrize("wrong", ["proj", "Q_PROJ", "embed_tokens", "input_layernorm", "mlp"])
def test_a_target_that_is_no_linear_layer_is_an_error_and_the_model_stays_as_it_was(wrong: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=rf"adapter\.target_modules is '{wrong}'.*the model, which has: down_proj"):
        inject(model, AdapterConfig(target_modules=["q_proj", wrong]))
    assert not list(adapted_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 4, "top_k": 5}, ("adapter.top_k is 5", "at most adapter.num_experts = 4", "Lower")),
        ({"r": 0}, ("adapter.r is 0", "1 or more", "Set adapter.r")),
        ({"num_experts": 0}, ("adapter.num_experts is 0", "1 or more")),
        ({"lora_dropout": 1.0}, ("adapter.lora_dropout is 1.0", "below 1", "switches dropout off")),
        ({"lora_alpha": 0.0}, ("adapter.lora_alpha is 0.0", "above 0")),
        ({"gate_power": -1.0}, ("adapter.gate_power is -1.0", "0 or more", "chain rule")),
        ({"target_modules": []}, ("adapter.target_modules is []", "all-linear")),
        (
            {"mixer_init": "kaiming"},
            ("adapter.mixer_init is 'kaiming'", "null with adapter.expert = lora", "one that does: moslora"),
        ),
    ],
)
def test_wrong_settings_name_key_value_and_remedy(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        AdapterConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_a_second_injection_is_refused() -> None:
    model = adapt(make_model())
    with pytest.raises(ModelError, match=r"has routed experts already\. Load the base model again"):
        inject(model, AdapterConfig())


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_scale(use_rslora: bool, scale: float) -> None:
    assert AdapterConfig(r=4, lora_alpha=16, use_rslora=use_rslora).scale == scale


def starting_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_starting_values_come_from_seed_layer_and_expert_alone() -> None:
    many = starting_values(adapt(make_model(), trained=False))
    torch.manual_seed(123)  # neither the random state nor the other layers matter
    few = starting_values(adapt(make_model("qwen2"), trained=False, target_modules=["v_proj"]))
    assert len(few) == 2 * 3
    for name, value in few.items():
        assert torch.equal(value, many[name]), name
    more_experts = starting_values(adapt(make_model(), trained=False, num_experts=7))
    for name in (name for name in many if name.endswith("experts.a")):
        assert torch.equal(more_experts[name][:5], many[name]), name
    other_seed = starting_values(adapt(make_model(), trained=False, seed=1))
    tensors = [value for values in (many, other_seed) for name, value in values.items() if not name.endswith("b")]
    firsts = torch.cat([tensor.flatten(1)[:, 0] for tensor in tensors])
    assert len(firsts.unique()) == len(firsts), "every layer, expert and seed starts elsewhere"


def test_starting_values_do_not_depend_on_the_defaults_of_torch() -> None:
    expected = starting_values(adapt(make_model(), trained=False))
    model = make_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = starting_values(adapt(model, trained=False))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_starting_values_are_kaiming_uniform_and_zero() -> None:
    layer: Any = next(layer for _, layer in adapted_layers(adapt(make_model(), False, r=64)))
    bound = 32**-0.5  # uniform on +-1/sqrt(D), whose standard deviation is the bound / sqrt(3)
    for value in (layer.experts.a, layer.router.weight):
        assert value.abs().max() <= bound
    assert layer.experts.a.abs().max() > 0.99 * bound
    assert abs(layer.experts.a.std() / (bound / 3**0.5) - 1) < 0.02
    assert not layer.experts.b.any()


def test_gaussian_starting_values_are_normal_with_the_deviation_that_peft_takes() -> None:
    layer: Any = next(layer for _, layer in adapted_layers(adapt(make_model(), False, r=64, init="gaussian")))
    a = layer.experts.a.detach().double()
    assert abs(a.std() * 64 - 1) < 0.02 and abs(a.mean()) < 0.02 / 64
    for deviations in (1.0, 2.0):
        expected = torch.erf(torch.tensor(deviations / 2**0.5)).item()
        assert abs((a.abs() < deviations / 64).double().mean() - expected) < 0.01
    assert not layer.experts.b.any()
    assert not torch.equal(a[0], a[1]), "experts start apart"


@pytest.mark.parametrize("mixer_init", ["kaiming", "orthogonal", None])
def test_mixers_start_from_seed_layer_and_expert_alone(mixer_init: Any) -> None:
    settings: dict[str, Any] = {"expert": "moslora", "mixer_init": mixer_init, "r": 32}
    five, seven = (starting_values(adapt(make_model(), False, num_experts=n, **settings)) for n in (5, 7))
    mixers = {name: value for name, value in five.items() if name.endswith("experts.m")}
    assert len(mixers) == len([name for name in five if name.endswith("experts.a")])
    for name, m_ERR in mixers.items():
        assert torch.equal(m_ERR, seven[name][:5])
        if mixer_init == "orthogonal":
            torch.testing.assert_close(m_ERR @ m_ERR.mT, torch.eye(32).expand(5, 32, 32), rtol=0, atol=1e-5)
        else:  # uniform in +-1/sqrt(R)
            assert 0.99 * 32**-0.5 < m_ERR.abs().max() <= 32**-0.5
            assert m_ERR.std().item() == pytest.approx(96**-0.5, rel=0.03)
    firsts = torch.stack([m_RR[0, 0] for m_ERR in mixers.values() for m_RR in m_ERR])
    assert len(firsts.unique()) == len(firsts), "every layer and expert starts elsewhere"


@pytest.mark.parametrize("training", [False, True])
def test_padding_on_the_left_equals_padding_on_the_right(training: bool) -> None:
    model = adapt(make_model(), lora_dropout=0.3 if training else 0.0).train(training)
    lengths = [9, 4, 6]
    logits = []
    for side in ("left", "right"):
        ids_BS, mask_BS = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
        real = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
        for row, (place, n) in enumerate(zip(real, lengths, strict=True)):
            ids_BS[row, place] = token_ids(3)[row, :n]
            mask_BS[row, place] = 1
        adapter_context(model).tokens = BatchTokens(token_keys(0, torch.arange(3), mask_BS))
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out_BSV = model(ids_BS, attention_mask=mask_BS, position_ids=positions_BS).logits
        logits.append(torch.cat([out_SV[place] for out_SV, place in zip(out_BSV, real, strict=True)]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def gradients(model: Any) -> dict[str, Tensor]:
    keys_BS = token_keys(0, torch.arange(2), torch.ones(2, 9, dtype=torch.int64))
    adapter_context(model).tokens = BatchTokens(keys_BS)
    model.train()
    model(token_ids(), labels=token_ids()).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and grad.any() for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain = adapt(make_model(), lora_dropout=0.2)
    recomputing = copy.deepcopy(plain)
    recompute_activations(recomputing)
    expected = gradients(plain)
    for name, grad in gradients(recomputing).items():
        assert torch.equal(grad, expected[name]), name


class AllOnOneDevice(TorchDispatchMode):
    """Fails at the first operation that reads or makes a tensor on another device; sees backward passes too."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, Tensor) or tensor.device.type == self.device, f"{func} on {tensor.device}"
        return result


@pytest.mark.parametrize(("num_experts", "gate_power"), [(5, 0.5), (1, 1.0)])
def test_every_tensor_is_made_on_the_device_of_the_model(num_experts: int, gate_power: float) -> None:
    """Traced on torch's device without memory, where the CPU is the stranger that it would be for a GPU."""
    with torch.device("meta"):
        model = make_model(dtype=torch.bfloat16)
        ids_BS, mask_BS = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)
        sequence_ids_B = torch.arange(2)
    settings: dict[str, Any] = {"num_experts": num_experts, "top_k": 1, "gate_power": gate_power, "lora_dropout": 0.1}
    adapt(model, trained=False, **settings).train()
    with AllOnOneDevice("meta") as trace:
        adapter_context(model).tokens = BatchTokens(token_keys(0, sequence_ids_B, mask_BS))
        model(ids_BS).logits.float().sum().backward()
    assert trace.num_operations > 100
    for name, parameter in model.named_parameters():
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16), name
        assert (parameter.grad is not None) == parameter.requires_grad, name

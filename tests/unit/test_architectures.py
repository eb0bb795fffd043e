"""Experts on the layers of many architectures, each built from a tiny configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import RoutedLinear, adapted_layers, match_targets, untouched
from dsmoelora.errors import ConfigError, ModelError
from tests.architectures import ARCHITECTURES, ROUTED_BASES, adapt, make_model, token_ids

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_all_linear_leaves_out_head_embeddings_routers_and_other_senses(name: str) -> None:
    architecture, model = ARCHITECTURES[name], make_model(name)
    names = match_targets(model, "all-linear")
    assert sorted({name.rpartition(".")[2] for name in names}) == architecture.layers
    assert len(names) == architecture.num_layers
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    left_out = [name for name in linears if name not in names]
    assert left_out and all(name.startswith(architecture.left_out) for name in left_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_the_adapted_model_equals_the_base_to_the_last_bit_at_step_0(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    with torch.no_grad():
        before = model(token_ids()).logits
        assert torch.equal(adapt(model, trained=False)(token_ids()).logits, before)
        assert not torch.equal(adapt(make_model(name, dtype))(token_ids()).logits, before)


@every_architecture
def test_every_tensor_of_every_adapter_gets_a_gradient(name: str) -> None:
    model = adapt(make_model(name), top_k=5).train()
    logits_BSV = model(token_ids(4), attention_mask=torch.ones(4, 9, dtype=torch.int64)).logits
    functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), token_ids(4)[:, 1:].flatten()).backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.any(), parameter_name
    experts = [layer.experts for _, layer in adapted_layers(model)]
    assert all(bank.a.grad.flatten(1).any(1).all() for bank in experts), "an expert without a gradient"


@every_architecture
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = adapt(make_model(name))
    prompt_BS = token_ids(2, 6)
    prompt_BS[0, :2] = 0  # left padding
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "attention_mask": (prompt_BS != 0).long()}
    cached = model.generate(prompt_BS, use_cache=True, **settings)
    fresh = model.generate(prompt_BS, use_cache=False, **settings)
    assert cached.sequences.shape == (2, 11)
    assert torch.equal(cached.sequences, fresh.sequences)
    for one, other in zip(cached.logits, fresh.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_a_layer_adds_what_the_formula_says(name: str) -> None:
    """With all experts chosen: y = base(x) + s sum_e softmax(x W_r^T)_e x a_e b_e^T."""
    model = adapt(make_model(name), top_k=5, lora_alpha=6.0)
    for _, layer in adapted_layers(model):
        assert isinstance(layer, RoutedLinear)
        weight_OD = layer.base.weight.T if isinstance(layer.base, Conv1D) else layer.base.weight
        x_TD = torch.randn(7, weight_OD.shape[1])
        gate_TE = (x_TD @ layer.router.weight.T).softmax(-1)
        bank = layer.experts
        expected_TO = x_TD @ weight_OD.T + (layer.base.bias if layer.base.bias is not None else 0)
        for expert in range(5):
            expected_TO = expected_TO + 2.0 * gate_TE[:, expert, None] * (x_TD @ bank.a[expert] @ bank.b[expert].T)
        torch.testing.assert_close(layer(x_TD), expected_TO, rtol=1e-4, atol=1e-5)  # a 2-dim input
        torch.testing.assert_close(layer(x_TD.view(1, 7, 1, -1))[0, :, 0], expected_TO, rtol=1e-4, atol=1e-5)


@every_architecture
def test_a_name_that_the_model_lacks_is_answered_with_a_value_that_works(name: str) -> None:
    model, attention = make_model(name), ARCHITECTURES[name].attention
    with pytest.raises(ConfigError, match=r"adapter\.target_modules is 'nose'.*the model, which has: ") as error:
        inject(model, AdapterConfig(target_modules=["nose"]))
    assert f"Set adapter.target_modules to [{', '.join(attention)}], " in str(error.value)
    names = inject(model, AdapterConfig(target_modules=attention))
    assert {name.rpartition(".")[2] for name in names} == set(attention)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_the_default_target_modules_are_refused_where_there_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is 'q_proj', but it must be the name of a linear layer"):
        inject(make_model(name), AdapterConfig())


@pytest.mark.parametrize("name", ROUTED_BASES)
def test_routed_experts_of_the_base_are_named_as_untouched(name: str) -> None:
    experts = "model.layers.1.mlp.experts" if name == "qwen3-moe" else "model.layers.0.mlp.experts and 1 more like it"
    sentences = untouched(make_model(name))
    assert f"routed experts stay as they are, without adapters: {experts}." in sentences[0]
    gates = ["model.layers.0.mlp.shared_expert_gate and 1 more like it."] if name == "qwen2-moe" else []
    assert [sentence.split(": ")[1] for sentence in sentences[1:]] == gates


def test_a_model_that_sees_is_said_to_learn_from_text_alone() -> None:
    (sentence,) = untouched(make_model("gemma3-vision"))
    assert "model.language_model; left out: vision_tower." in sentence
    names = inject(
        model := make_model("gemma3-vision"), AdapterConfig(target_modules=["q_proj"])
    )  # both parts have one
    assert names == [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert not any(isinstance(module, RoutedLinear) for module in model.model.vision_tower.modules())


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(ROUTED_BASES) - {"gemma3-vision"}))
def test_of_other_models_nothing_is_said(name: str) -> None:
    assert untouched(make_model(name)) == []


@pytest.mark.parametrize(("name", "target", "kind"), [("mixtral", "gate", "MixtralTopKRouter"),
                                                     ("qwen2-moe", "experts", "Qwen2MoeExperts")])  # fmt: skip
def test_what_is_no_linear_layer_is_named_by_its_kind(name: str, target: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"\({target} is a {kind}, which takes no adapter\)"):
        inject(make_model(name), AdapterConfig(target_modules=[target]))


class ListOfExperts(nn.Module):
    """A block as older code writes it: a linear router and one small network an expert, beside a shared one."""

    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(8, num_experts)
        self.latent = nn.Linear(8, 8)
        self.experts = nn.ModuleList(self.network() for _ in range(num_experts))
        self.shared_experts = self.network()

    def network(self) -> nn.ModuleDict:
        return nn.ModuleDict({"up_proj": nn.Linear(8, 3), "down_proj": nn.Linear(3, 8)})


def test_routed_experts_that_are_linear_layers_are_left_out_or_refused() -> None:
    model = nn.Sequential(ListOfExperts(), ListOfExperts())
    shared = ["shared_experts.up_proj", "shared_experts.down_proj"]
    expected = [f"{block}.{name}" for block in (0, 1) for name in ["latent", *shared]]
    assert match_targets(model, "all-linear") == expected
    assert match_targets(model, ["shared_experts.up_proj"]) == ["0.shared_experts.up_proj", "1.shared_experts.up_proj"]
    with pytest.raises(ConfigError, match=r"is 'up_proj'.*6 such layers \(0\.experts\.0\.up_proj, .*\)") as error:
        match_targets(model, ["up_proj"])
    assert "set it to shared_experts.up_proj." in str(error.value)
    assert [sentence.split(": ")[1] for sentence in untouched(model)] == [
        "0.experts and 1 more like it.",
        "0.gate and 1 more like it.",
    ]
    assert match_targets(model, ["gate"]) == ["0.gate", "1.gate"], "a router that is asked for by name is a layer"


class FusedExperts(nn.Module):
    """All routed experts in one parameter, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 8, 8))


class BlockOfExperts(nn.Module):
    """Fused experts beside a linear router, a shared expert and a layer that is neither; `config` tells the number."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_local_experts=3, num_experts_per_tok=2)
        self.chooser = nn.Linear(8, 3)
        self.shared_expert = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8))
        self.shared_expert_gate = nn.Linear(8, 1)
        self.experts = FusedExperts()
        self.latent = nn.Linear(8, 4)


def test_a_router_is_told_by_its_place_and_its_number_of_outputs() -> None:
    model = BlockOfExperts()
    assert match_targets(model, "all-linear") == ["shared_expert.0", "shared_expert.1", "latent"]
    assert [sentence.split(": ")[1] for sentence in untouched(model)] == ["experts.", "chooser, shared_expert_gate."]


class GlmLayer(nn.Module):
    """Named as in GLM-4's own code: 4 heads of queries, 2 of keys, 2 of values in one product; gate and up in one."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.ModuleDict({"query_key_value": nn.Linear(8, 8 + 2 * 4), "dense": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(8, 2 * 20), "dense_4h_to_h": nn.Linear(20, 8)})

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BSD, k_BSC, v_BSC = self.self_attention["query_key_value"](x_BSD).split([8, 4, 4], dim=-1)
        k_BSD, v_BSD = (part.repeat(1, 1, 2) for part in (k_BSC, v_BSC))
        heads = (part.unflatten(-1, (4, 2)).transpose(1, 2) for part in (q_BSD, k_BSD, v_BSD))
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x_BSD = x_BSD + self.self_attention["dense"](attended.transpose(1, 2).flatten(2))
        gate, up = self.mlp["dense_h_to_4h"](x_BSD).chunk(2, dim=-1)
        down: Tensor = self.mlp["dense_4h_to_h"](functional.silu(gate) * up)
        return x_BSD + down


def test_a_fused_query_key_value_of_fewer_key_heads_is_one_layer() -> None:
    model = nn.ModuleDict({"layer": GlmLayer(), "output_layer": nn.Linear(8, 9)})
    attention, x_BSD = ["query_key_value", "dense"], torch.randn(2, 5, 8)
    named = [f"layer.self_attention.{name}" for name in attention]
    assert match_targets(model, attention) == named
    assert "output_layer" in match_targets(model, "all-linear")
    before = model["layer"](x_BSD)
    adapt(model, trained=False, target_modules=attention)
    assert torch.equal(model["layer"](x_BSD), before)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.experts.b)
    model["layer"](x_BSD).sum().backward()
    assert [name for name, layer in adapted_layers(model) if layer.experts.a.grad.any()] == named


def test_a_model_that_reads_weights_past_the_layer_is_refused() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, use_mambapy=False)
    model = MambaForCausalLM(config).eval()
    inject(model, AdapterConfig(r=2, num_experts=2, top_k=1, target_modules=["dt_proj"]))
    with pytest.raises(ModelError, match=r"dt_proj, but the model reads its \w+ itself.*Take this layer out"):
        model(torch.arange(4)[None])
    assert not hasattr(next(adapted_layers(model))[1], "weight")


class Quantised(nn.Linear):
    """Stands for layers with a forward pass of their own."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def test_layers_with_a_forward_pass_of_their_own_are_none() -> None:
    model = nn.Sequential(Quantised(4, 4), nn.MultiheadAttention(4, 1))
    with pytest.raises(ConfigError, match=r"no plain linear layer\. It has NonDynamic.*, Quantised instead"):
        inject(model, AdapterConfig(target_modules="all-linear"))


@pytest.mark.parametrize("router", ["softmax_topk", "prompt"])
def test_the_output_head_gets_no_router(router: str) -> None:
    model = make_model("llama")
    with pytest.raises(ConfigError, match=r"target_modules is \['q_proj', 'lm_head'\].*Name lm_head in adapter\.lora_"):
        adapt(model, target_modules=["q_proj", "lm_head"], router=router)
    assert not list(adapted_layers(model))


@pytest.mark.parametrize("key", ["target_modules", "lora_modules"])
def test_the_output_head_sees_too_little_for_dropout(key: str) -> None:
    settings: dict[str, Any] = {"num_experts": 1, "top_k": 1} if key == "target_modules" else {}
    with pytest.raises(
        ConfigError, match=rf"dropout is 0\.1, but .*head \(lm_head\)\. Leave lm_head out of adapter\.{key}"
    ):
        adapt(make_model("llama"), lora_dropout=0.1, **settings | {key: ["lm_head"]})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_output_head_gets_plain_lora_by_name(name: str) -> None:
    """Tied to the embeddings (GPT-2) or not."""
    model = adapt(make_model(name), target_modules=ARCHITECTURES[name].attention, lora_modules=["lm_head"])
    assert not model.lm_head.router.shapes
    last_BV = model(token_ids(), logits_to_keep=1).logits[:, 0]
    torch.testing.assert_close(last_BV, model(token_ids()).logits[:, -1], rtol=1e-4, atol=1e-5)
    last_BV.sum().backward()
    assert model.lm_head.experts.b.grad.any()

"""One router a decoder layer, whose target modules are its experts (MiLoRA), against weights that are merged by prompt.

Shapes: `B` sequences, `S` their length, `D` in-features, `M` target modules of a decoder layer, `R` rank.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers, adapter_context, eject
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.given.folders import open_folder
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.adapters.targets.decoder_layers import decoder_layers_of
from dsmoelora.config import LossesConfig, ParallelConfig, Recipe
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import recompute_activations
from dsmoelora.optim import trainables
from tests.architectures import ARCHITECTURES, adapt, make_model, token_ids
from tests.unit.test_adapters_styles import BLOCKS

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
MODULES = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
SCALE, LENGTH, PROMPTS = 2.0, 8, [3, 5, 1]


def make_base() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=2)).double()


def milora(**settings: Any) -> AdapterConfig:
    settings = {
        "r": 3,
        "lora_alpha": 3 * SCALE,
        "num_experts": 7,
        "top_k": 3,
        "target_modules": "all-linear",
    } | settings
    return AdapterConfig(style="decoder_layer", router="prompt", **settings)


def make_adapted(**settings: Any) -> Any:
    """In fp64, with experts that say something and routers that tell prompts apart."""
    model = make_base()
    inject(model, milora(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.experts.b.normal_(std=0.3, generator=generator)
        for _, router in routers(model):
            for parameter in router.parameters():
                parameter.normal_(generator=generator)
    return model.eval()


def rows() -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, S); prompts of several lengths."""
    ids_BS = torch.randint(3, 50, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(5))
    return ids_BS, ids_BS.masked_fill(torch.arange(LENGTH) < torch.tensor(PROMPTS)[:, None], -100)


def pooled(x_SD: Tensor, pooling: str, weight_1D: Tensor | None) -> Tensor:
    """(D,) of the states of a prompt."""
    if pooling == "attention":
        assert weight_1D is not None
        return (x_SD @ weight_1D[0]).softmax(0) @ x_SD
    return x_SD[-1] if pooling == "last" else x_SD.mean(0)


def gates_of(x_SD: Tensor, values: dict[str, Tensor], place: str, pooling: str, top_k: int) -> Tensor:
    """(M,) for a prompt with these states, at a decoder layer."""
    weight_1D = values.get(f"{place}.router.pooling_weight")
    share_M = (values[f"{place}.router.weight"] @ pooled(x_SD, pooling, weight_1D)).softmax(0)
    kept_M = share_M.where(share_M >= share_M.topk(top_k).values[-1], 0.0)
    return kept_M / kept_M.sum()


def dense_loss(base: Any, values: dict[str, Tensor], pooling: str, top_k: int) -> Tensor:
    """Row by row: choose the modules of a decoder layer, put their updates into its weights, and run that layer."""
    logits = []
    for ids_S, num_prompt in zip(rows()[0], PROMPTS, strict=True):
        x_1SD = base.model.embed_tokens(ids_S[None])
        rotary = base.model.rotary_emb(x_1SD, torch.arange(LENGTH)[None])
        for number, layer in enumerate(base.model.layers):
            place = f"model.layers.{number}"
            gate_M = gates_of(x_1SD[0, :num_prompt], values, place, pooling, top_k)
            weights = {}
            for gate, module in zip(gate_M, MODULES, strict=True):
                (a_DR,), (b_OR,) = (values[f"{place}.{module}.experts.{factor}"] for factor in "ab")
                weights[f"{module}.weight"] = layer.get_submodule(module).weight + SCALE * gate * b_OR @ a_DR.T
            x_1SD = functional_call(layer, weights, (x_1SD,), {"position_embeddings": rotary})
        logits.append(base.lm_head(base.model.norm(x_1SD))[0])
    return mean_nll(torch.stack(logits))


def loss_of(model: Any) -> Tensor:
    ids_BS, labels_BS = rows()
    return mean_nll(model(ids_BS, labels=labels_BS).logits)


def mean_nll(logits_BSV: Tensor) -> Tensor:
    return cross_entropy(logits_BSV[:, :-1].flatten(0, 1), rows()[1][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("pooling", "top_k", "more"),
    [("mean", 3, {}), ("last", 2, {}), ("attention", 3, {}), ("mean", 7, {"expert": "moslora"})],
)
def test_a_prompt_is_answered_by_weights_with_the_updates_of_its_modules(
    pooling: str, top_k: int, more: dict[str, Any], recompute: bool
) -> None:
    """Loss and all gradients, in fp64."""
    model = make_adapted(pooling=pooling, top_k=top_k, **more).train()
    if recompute:
        recompute_activations(model)
    values = {of.name: parameter.detach().clone().requires_grad_() for of, parameter in trainables(model)}
    folded = dict(values)
    for name in [name for name in values if name.endswith(".m")]:
        b_name = name.removesuffix("m") + "b"
        folded[b_name] = values[b_name] @ values[name].mT
    loss, expected = loss_of(model), dense_loss(make_base(), folded, pooling, top_k)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    assert expected.item() != pytest.approx(loss_of(make_base()).item(), rel=1e-3), "the experts say something"
    for of, parameter in trainables(model):
        wanted = values[of.name].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-8, msg=of.name)
    assert all(router.weight.grad.any() for _, router in routers(model))


def test_layers_that_are_called_within_a_checkpoint_route_there() -> None:
    """As older versions of transformers do: hooks and all are called again."""
    model = make_adapted().train()
    expected = loss_of(model)
    expected.backward()
    wanted = {of.name: parameter.grad.clone() for of, parameter in trainables(model)}
    model.zero_grad()
    model.model.layers = torch.nn.ModuleList(_Recomputed(layer) for layer in model.model.layers)
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for of, parameter in trainables(model):
        torch.testing.assert_close(parameter.grad, wanted[of.name.replace(".layer.", ".")], msg=of.name)


class _Recomputed(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False, **kwargs)
        return y


def test_a_decoder_layer_has_one_router_and_each_module_one_expert() -> None:
    shapes = {of.name: of.shape for of, _ in trainables(make_adapted(pooling="attention"))}
    assert {name: shape for name, shape in shapes.items() if "router" in name} == {
        f"model.layers.{number}.router.{name}": shape
        for number in range(2)
        for name, shape in (("weight", (7, 24)), ("pooling_weight", (1, 24)))
    }
    assert shapes["model.layers.1.mlp.down_proj.experts.a"] == (1, 40, 3)
    assert len(shapes) == 2 * (7 * 2 + 2)


def test_before_the_first_step_the_model_is_the_base_and_eject_gives_it_back() -> None:
    model, ids_BS = make_base(), rows()[0]
    inject(model, milora())
    expected_BSV = make_base()(ids_BS).logits
    assert torch.equal(model(ids_BS).logits, expected_BSV)
    copied = copy.deepcopy(model)
    eject(model)
    assert model.state_dict().keys() == make_base().state_dict().keys()
    assert not any(module._forward_pre_hooks for module in model.model.layers.modules())
    assert torch.equal(model(ids_BS).logits, expected_BSV)
    assert torch.equal(copied(ids_BS).logits, expected_BSV), "a copy has a router of its own"


def test_losses_and_counts_are_those_of_one_router_a_decoder_layer() -> None:
    model = make_adapted().float().train()
    log = RoutingLog(model, LossesConfig(balance=0.7), torch.device("cpu"))
    context = adapter_context(model)
    context.log, context.tokens = log, BatchTokens(real_BS=torch.ones_like(rows()[0], dtype=torch.bool))
    log.begin_step(3 * LENGTH, scale=1.0)
    with log.listening():
        loss_of(model)
    (balance,) = log.loss_values(log.sums).tolist()
    log.finish_step(log.sums)
    routing = log.take_window()
    assert routing.layers == ["model.layers.0", "model.layers.1"]
    assert [sum(used) for used in routing.tokens] == [3 * 3 * LENGTH] * 2, "K modules for every token of a prompt"
    base, values = make_base().float(), {of.name: parameter.detach() for of, parameter in trainables(model)}
    share_BM = torch.stack(
        [
            (values["model.layers.0.router.weight"] @ pooled(x_SD[:num_prompt], "mean", None)).softmax(0)
            for x_SD, num_prompt in zip(base.model.embed_tokens(rows()[0]), PROMPTS, strict=True)
        ]
    )
    used_BM = share_BM >= share_BM.topk(3, dim=1).values[:, -1:]
    assert routing.tokens[0] == (LENGTH * used_BM.sum(0)).tolist()
    assert 1.0 <= balance <= 7.0


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_modules_of_a_prompt_serve_its_whole_answer(use_cache: bool) -> None:
    """Token by token with merged weights that the prompt alone has chosen."""
    model, ids_BS = make_adapted(), rows()[0]
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    padded_BS = torch.nn.functional.pad(ids_BS, (2, 0))
    mask_BS = torch.nn.functional.pad(torch.ones_like(ids_BS), (2, 0))
    answers = [model.generate(ids_BS, **kwargs)[:, LENGTH:]]
    answers.append(model.generate(padded_BS, attention_mask=mask_BS, **kwargs)[:, LENGTH + 2 :])
    assert torch.equal(*answers)
    base, values = make_base().eval(), {of.name: parameter.detach() for of, parameter in trainables(model)}
    for ids_S, answer_S in zip(ids_BS, answers[0], strict=True):
        merged = copy.deepcopy(base)
        x_1SD, rotary = merged.model.embed_tokens(ids_S[None]), merged.model.rotary_emb
        with torch.no_grad():
            for number, layer in enumerate(merged.model.layers):
                place = f"model.layers.{number}"
                gate_M = gates_of(x_1SD[0], values, place, "mean", 3)
                for gate, module in zip(gate_M, MODULES, strict=True):
                    (a_DR,), (b_OR,) = (values[f"{place}.{module}.experts.{factor}"] for factor in "ab")
                    layer.get_submodule(module).weight += SCALE * gate * b_OR @ a_DR.T
                x_1SD = layer(x_1SD, position_embeddings=rotary(x_1SD, torch.arange(LENGTH)[None]))
        assert torch.equal(merged.generate(ids_S[None], **kwargs)[0, LENGTH:], answer_S)


def modules_of(name: str) -> list[str]:
    """Names of an architecture's layers that every decoder layer has."""
    targets, plain, _ = BLOCKS.get(name, (ARCHITECTURES[name].attention, [], 0))
    return plain if name == "qwen3-moe" else [*targets, *plain]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_in_all_its_tensors(name: str) -> None:
    targets = modules_of(name)
    more: dict[str, Any] = {"style": "decoder_layer", "router": "prompt", "pooling": "attention"}
    model = adapt(make_model(name), target_modules=targets, num_experts=len(targets), top_k=len(targets), **more)
    assert len(dict(routers(model))) == 2
    ids_BS = token_ids(4)
    labels_BS = ids_BS.masked_fill(torch.arange(ids_BS.shape[1]) < 4, -100)
    model.train()(ids_BS, attention_mask=torch.ones_like(ids_BS), labels=labels_BS).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), parameter_name


def test_the_adapter_folder_brings_all_of_it_back(tmp_path: Path) -> None:
    model, base, ids_BS = make_adapted(pooling="attention"), make_base(), rows()[0]
    tensors = {of.name: parameter.detach() for of, parameter in trainables(model)}
    layers, prints = [name for name, _ in adapted_layers(model)], fingerprint(base.named_parameters())
    write_adapter(tmp_path / "adapter", milora(pooling="attention"), layers, tensors, "models/tiny", prints)
    assert torch.equal(load_adapter(base, tmp_path / "adapter")(ids_BS).logits, model(ids_BS).logits)
    with pytest.raises(ConfigError, match=r"modules of decoder layers \(MiLoRA\).*--format average"):
        open_folder(tmp_path / "adapter", "adapter.experts_from")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": "softmax_topk"}, "adapter.router is 'softmax_topk', but it must be prompt with adapter.style"),
        ({"shared_experts": 1}, "adapter.shared_experts is 1, but it must be 0 with adapter.style = decoder_layer"),
        ({"init": "svd"}, "adapter.init is 'svd', but it must be kaiming, gaussian or gradient with adapter.style"),
        ({"experts_from": ["maths"]}, "adapter.experts_from is"),
        ({"num_experts": 1, "top_k": 1, "router": "softmax_topk"}, "2 or more where adapter.style is decoder_layer"),
    ],
)
def test_what_goes_with_routers_of_one_layer_alone_is_refused(settings: dict[str, Any], words: str) -> None:
    settings = {"router": "prompt", "num_experts": 7, **settings}
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(style="decoder_layer", target_modules="all-linear", **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": ParallelConfig(ep_size=7)}, "parallel.ep_size is 7, but it must be 1 with adapter.style"),
        ({"losses": LossesConfig(contrastive=0.1)}, "losses.contrastive is 0.1, but it must be 0 with adapter.style"),
    ],
)
def test_a_recipe_that_wants_several_experts_in_a_layer_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(adapter=milora(), **sections)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_experts": 5},
            ("adapter.num_experts is 5", "model.layers.0 has 7 (self_attn.q_proj,", "num_experts to 7"),
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "layers.1.mlp.up_proj"], "num_experts": 2, "top_k": 1},
            ("adapter.num_experts is 2", "model.layers.1 has 3", "those that only some decoder layers have"),
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused_and_it_stays_as_it_was(
    settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    model = make_base()
    with pytest.raises(ConfigError) as caught:
        inject(model, milora(**settings))
    for word in words:
        assert word in str(caught.value)
    assert not list(routers(model)) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_outside_of_decoder_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules is 'lm_head'.*in adapter\.lora_modules"):
        decoder_layers_of(make_base(), ["lm_head", "model.layers.0.mlp.up_proj"], 1)


def test_a_model_without_a_config_or_with_routers_of_its_own_is_refused() -> None:
    model = make_base()
    model.model.layers[0].router = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"model\.layers\.0 has a router of its own"):
        inject(model, milora())
    part = make_base().model.layers
    with pytest.raises(ModelError, match=r"whose config has hidden_size"):
        inject(torch.nn.ModuleDict({"layers": part}), milora())

"""The contrastive losses: values and gradients, which neither splitting nor computing a layer twice changes."""

from __future__ import annotations

import gc
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.contrastive import ContrastiveLosses
from dsmoelora.adapters.contrastive.formula import coactive_together, experts_apart, unit_features
from dsmoelora.adapters.contrastive.sample import sample_tokens
from dsmoelora.adapters.experts.similarity import cosine_matrix, cross_grams, largest_and_mean
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.config import LossesConfig, Recipe
from dsmoelora.errors import ConfigError
from tests.helpers import tiny_llama
from tests.largest_tensor import LargestTensor
from tests.plain_contrastive import of_tokens
from tests.two_layers import NUM_EXPERTS, WIDTH, TwoLayers

TOP_K, LENGTH, NUM_ROWS = 2, 7, 8
TAU = 0.3
LOSSES = LossesConfig(contrastive=0.7, contrastive_coactive=0.4, contrastive_temperature=TAU, contrastive_tokens=5)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, which tokens are real, and keys."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(NUM_ROWS, LENGTH, WIDTH, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (NUM_ROWS, 1), generator=generator)
    real_BS = torch.arange(LENGTH) < lengths
    return x, real_BS, token_keys(0, torch.arange(NUM_ROWS), real_BS)


def run_step(
    network: TwoLayers,
    losses: ContrastiveLosses,
    num_parts: int,
    world_size: int = 1,
    sequences_BS: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """A step in several micro-batches, each as on a rank of its own: gradients of the losses, and of the inputs."""
    network.zero_grad()
    context = adapter_context(network)
    context.losses = losses
    losses.begin_step(NUM_ROWS, scale=world_size)
    whole = *batch(), torch.zeros(NUM_ROWS, LENGTH).long() if sequences_BS is None else sequences_BS
    grads_x = []
    for x, real, keys, sequences in zip(*(each.chunk(num_parts) for each in whole), strict=True):
        longest = int(real.sum(-1).max())  # as micro-batches are cut
        of_sequences = None if sequences_BS is None else sequences[:, :longest]
        context.tokens = BatchTokens(keys[:, :longest], real[:, :longest], of_sequences)
        x = x[:, :longest].clone().requires_grad_()
        (0.0 * network(x).sum()).backward()
        grads_x.append(nn.functional.pad(x.grad, (0, 0, 0, LENGTH - longest)))
    grads = {name: p.grad / world_size for name, p in network.named_parameters() if p.grad is not None}
    return grads, torch.cat(grads_x) / world_size


def reference(network: TwoLayers, losses: LossesConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses in fp64 from outputs of all experts for all tokens, and the inputs they depend on."""
    adapter_context(network).losses, network.recompute = None, False
    inputs_of: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}
    handles = []
    for name, layer in adapted_layers(network):

        def note(_: Any, inputs: tuple[Any, ...], name: str) -> None:
            inputs_of[name] = inputs[0].flatten(0, -2)

        def remember(_: Any, inputs: tuple[Any, ...], others: dict[str, Any], name: str) -> None:
            seen[name] = inputs[2] != 0, others.get("ratio_LO")

        handles.append(layer.register_forward_pre_hook(partial(note, name=name)))
        handles.append(layer.experts.register_forward_pre_hook(partial(remember, name=name), with_kwargs=True))
    x, real_BS, keys_BS = batch()
    x.requires_grad_()
    with adapter_context(network).hooks(handles):
        network(x)
    found = []
    for name, layer in adapted_layers(network):
        x_TD, (selected_TE, ratio_EO) = inputs_of[name], seen[name]
        a, b = layer.experts.a.double(), layer.experts.b.double()
        a = a if layer.experts.m is None else a @ layer.experts.m.double()
        b = b if ratio_EO is None else ratio_EO.double().unsqueeze(-1) * b
        outputs_TEO = torch.einsum("td,edr,eor->teo", x_TD.double(), a, b)
        key = ContrastiveLosses(network, losses, torch.device("cpu"), TOP_K)._keys[name]
        sample = sample_tokens(keys_BS, real_BS, None, key, losses.contrastive_tokens)
        for row in range(NUM_ROWS):
            places = sample.places_BN[row][sample.real_BN[row]]
            found.append(torch.stack(of_tokens(outputs_TEO[places], selected_TE[places], TAU)))
    apart, together = torch.stack(found).mean(0)
    return apart, together, x


@pytest.mark.parametrize("expert", ["lora", "moslora", "dora"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("num_parts", "world_size"), [(1, 1), (4, 1), (8, 2)])
def test_values_and_gradients_are_those_of_the_formulas(
    num_parts: int, world_size: int, recompute: bool, expert: str
) -> None:
    network = TwoLayers(recompute, top_k=TOP_K, expert=expert)
    losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
    found, found_x = run_step(network, losses, num_parts, world_size)
    values = dict(zip(losses.loss_names, losses.loss_values(losses.sums).tolist(), strict=True))
    apart, together, x = reference(network, LOSSES)
    assert values == pytest.approx({"contrastive": apart.item(), "contrastive_coactive": together.item()}, rel=1e-5)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = LOSSES.contrastive * apart + LOSSES.contrastive_coactive * together
    *grads, grad_x = torch.autograd.grad(total, [*parameters.values(), x], allow_unused=True)
    for name, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name
    assert sum(grad is not None and bool(grad.abs().max() > 1e-3) for grad in grads) >= 4, "a and b of both layers"
    assert (found_x - grad_x).abs().max() <= 1e-4 * grad_x.abs().max()


@pytest.mark.parametrize("router", ["softmax", "noisy_topk", "top_p", "threshold", "sigmoid_bias", "prompt"])
def test_every_router_says_which_outputs_take_part(router: str) -> None:
    top_k = TOP_K if router in ("noisy_topk", "sigmoid_bias", "prompt") else None
    network = TwoLayers(router=router, top_k=top_k)
    adapter_context(network).tokens = BatchTokens(prompt_BS=batch()[1])
    losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), top_k or NUM_EXPERTS)
    run_step(network, losses, 1)
    apart, together, _ = reference(network, LOSSES)
    assert losses.loss_values(losses.sums).tolist() == pytest.approx([apart.item(), together.item()], rel=1e-5)
    assert bool(losses.sums[1] == 0) == (router == "softmax"), "no unselected experts"


@pytest.mark.parametrize("name", ["contrastive", "contrastive_coactive"])
def test_each_loss_alone_is_that_part_of_both(name: str) -> None:
    network = TwoLayers(top_k=TOP_K)
    both = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
    run_step(network, both, 1)
    alone = ContrastiveLosses(
        network,
        LossesConfig(**{name: 0.1}, contrastive_temperature=TAU, contrastive_tokens=5),
        torch.device("cpu"),
        TOP_K,
    )
    run_step(network, alone, 2)
    assert alone.loss_names == [name]
    expected = dict(zip(both.loss_names, both.loss_values(both.sums).tolist(), strict=True))[name]
    assert alone.loss_values(alone.sums).tolist() == pytest.approx([expected], rel=1e-6)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (2, 3, 4), a (3, 4, 2), b (3, 5, 2) and selected experts (2, 3, 3)."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 3, 4), (3, 4, 2), (3, 5, 2))
    x, a, b = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    selected = torch.tensor([[[1, 1, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    return x, a, b, selected


def losses_of(x: Tensor, a: Tensor, b: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """In the dtype of the inputs."""
    b_OF = b.transpose(0, 1).flatten(1)
    grams = (b_OF.T @ b_OF).view(3, 2, 3, 2).transpose(1, 2)
    unit = unit_features(torch.einsum("bnd,edr->bner", x, a), grams)
    real = torch.ones(2, 3, dtype=torch.bool)
    same = real.unsqueeze(-1) & real.unsqueeze(-2)
    return experts_apart(unit, grams, selected, same, TAU, num_used=2), coactive_together(
        unit, grams, selected, real, TAU
    )


def test_losses_of_rows_are_those_of_whole_outputs() -> None:
    x, a, b, selected = problem()
    apart, together = losses_of(x, a, b, selected)
    outputs = torch.einsum("bnd,edr,eor->bneo", x, a, b)
    for row in range(2):
        wanted = of_tokens(outputs[row], selected[row], TAU)
        torch.testing.assert_close((apart[row], together[row]), wanted, rtol=1e-8, atol=1e-10)


def test_gradients_are_right_to_second_differences() -> None:
    x, a, b, selected = problem()
    inputs = [each.requires_grad_() for each in (x, a, b)]
    assert torch.autograd.gradcheck(lambda *given: torch.cat(losses_of(*given, selected)), inputs)


def test_at_zero_outputs_there_is_a_value_and_no_gradient() -> None:
    network = TwoLayers(top_k=TOP_K)
    with torch.no_grad():
        for _, layer in adapted_layers(network):
            layer.experts.b.zero_()
    losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
    found, found_x = run_step(network, losses, 1)
    assert not found_x.any() and not any(grad.any() for grad in found.values())
    assert (losses.loss_values(losses.sums) > 0.5).all()


def test_nothing_is_added_in_evaluation_or_when_switched_off() -> None:
    network = TwoLayers(top_k=TOP_K).eval()
    losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
    _, found_x = run_step(network, losses, 1)
    assert not losses.sums.any() and not found_x.any()
    off = ContrastiveLosses(network.train(), LossesConfig(), torch.device("cpu"), TOP_K)
    assert off.loss_names == [] and not len(off.loss_values(off.sums))
    run_step(network, off, 1)
    assert not off.sums.any()


def test_sequences_of_a_packed_row_are_apart() -> None:
    """Each row holds a sequence of one token, which has nobody to pair with, and another one."""
    _, real_BS, keys_BS = batch()
    sequences_BS = (torch.arange(LENGTH) > 0).long().expand(NUM_ROWS, -1)
    sample = sample_tokens(keys_BS, real_BS, sequences_BS, 1, LENGTH)
    for row in range(NUM_ROWS):
        places = sample.places_BN[row] % LENGTH
        for one, n in zip(places.tolist(), range(LENGTH), strict=True):
            for other, m in zip(places.tolist(), range(LENGTH), strict=True):
                real = bool(real_BS[row, one] & real_BS[row, other] & sample.real_BN[row, n] & sample.real_BN[row, m])
                assert bool(sample.same_BNM[row, n, m]) == (real and (one == 0) == (other == 0))
    network = TwoLayers(top_k=TOP_K)
    values = []
    for sequences in (None, sequences_BS):
        losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
        run_step(network, losses, 1, sequences_BS=sequences)
        values.append(losses.loss_values(losses.sums).tolist())
    assert values[0][0] != pytest.approx(values[1][0], rel=1e-3), "pairs of tokens fall away"
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-6), "pairs within a token do not"


def test_tokens_are_real_and_differ_between_layers_and_sequences_alone() -> None:
    _, real_BS, keys_BS = batch()
    sample = sample_tokens(keys_BS, real_BS, None, 1, 4)
    rows = torch.arange(NUM_ROWS).unsqueeze(-1).expand(-1, 4)
    assert torch.equal(sample.places_BN // LENGTH, rows)
    assert real_BS.flatten()[sample.places_BN[sample.real_BN]].all()
    assert torch.equal(sample.real_BN.sum(-1), real_BS.sum(-1).clamp(max=4))
    for places, real in zip(sample.places_BN, sample.real_BN, strict=True):
        assert len(set(places[real].tolist())) == int(real.sum()), "none is drawn twice"
    wider = sample_tokens(*(nn.functional.pad(each, (0, 3)) for each in (keys_BS, real_BS)), None, 1, 4)
    chosen, wider_chosen = sample.places_BN % LENGTH, wider.places_BN % (LENGTH + 3)
    assert torch.equal(chosen[sample.real_BN], wider_chosen[wider.real_BN]), "whatever the padding"
    assert not torch.equal(sample.places_BN, sample_tokens(keys_BS, real_BS, None, 2, 4).places_BN)


def test_no_tensor_has_tokens_experts_and_out_features() -> None:
    """The largest tensor of a step is no larger than without the losses, far below (sampled tokens, E, O)."""
    layer, num_tokens, out_features = nn.Linear(32, 4096, bias=False), 32, 4096
    network = nn.Sequential(layer)
    inject(network, AdapterConfig(r=2, num_experts=NUM_EXPERTS, top_k=2, target_modules=["0"]))
    losses = ContrastiveLosses(network, LossesConfig(contrastive=1, contrastive_coactive=1), torch.device("cpu"), TOP_K)
    context = adapter_context(network)
    real_BS = torch.ones(1, num_tokens, dtype=torch.bool)
    context.tokens = BatchTokens(token_keys(0, torch.arange(1), real_BS), real_BS)
    sizes = []
    for attached in (None, losses):
        context.losses = attached
        losses.begin_step(1, scale=1)
        with LargestTensor() as largest:
            network(torch.randn(1, num_tokens, 32)).sum().backward()
        sizes.append(largest.numel)
    assert losses.sums.all()
    assert sizes[0] == num_tokens * out_features, "the output itself"
    assert sizes[1] == sizes[0]
    assert sizes[1] < 16 * NUM_EXPERTS * out_features // 2


def test_layers_of_a_block_take_part_and_plain_ones_do_not(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, num_hidden_layers=1))
    settings: dict[str, Any] = {"style": "ffn_block", "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    inject(model, AdapterConfig(r=2, num_experts=4, top_k=2, lora_modules=["q_proj"], **settings))
    losses = ContrastiveLosses(model.train(), LOSSES, torch.device("cpu"), TOP_K)
    losses.begin_step(2, scale=1)
    context, tokens_BS = adapter_context(model), torch.arange(2 * LENGTH).view(2, LENGTH)
    real_BS = torch.ones_like(tokens_BS).bool()
    context.losses, context.tokens = losses, BatchTokens(token_keys(0, torch.arange(2), real_BS), real_BS)
    model(tokens_BS).logits.sum().backward()
    # at b = 0 all cosines are 0, and every selected expert has two unselected ones to be told from
    _, together = losses.loss_values(losses.sums).tolist()
    assert together == pytest.approx(math.log(1 + 2), rel=1e-5), "the mean over three layers, of four"


def test_recomputed_layers_keep_no_tokens_for_it() -> None:
    network = TwoLayers(recompute=True, top_k=TOP_K)
    losses = ContrastiveLosses(network, LOSSES, torch.device("cpu"), TOP_K)
    losses.begin_step(NUM_ROWS, scale=1)
    context = adapter_context(network)
    x, real_BS, keys_BS = batch()
    context.tokens = BatchTokens(keys_BS, real_BS)
    context.losses = losses
    y = network(x.requires_grad_())
    shape = (NUM_ROWS, LOSSES.contrastive_tokens)
    tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.is_floating_point()]
    assert not [one.shape for one in tensors if one.dim() == 3 and one.shape[:2] == shape]
    y.sum().backward()
    assert losses.sums.all(), "the backward pass draws them anew"


@pytest.mark.parametrize("loss", ["contrastive", "contrastive_coactive"])
def test_planted_groups_pull_experts_apart(loss: str) -> None:
    """Two planted groups of tokens and experts that start nearly equal: nothing but the loss tells them apart.

    From the same start, after 100 steps, the mean cosine between experts is lower by 0.3 at least with the loss.
    """
    without, with_loss = (mean_cosine_after_training(LossesConfig(**weights)) for weights in ({}, {loss: 0.1}))
    assert without > 0.4
    assert with_loss < without - 0.3


def mean_cosine_after_training(config: LossesConfig) -> float:
    """Four experts, two a token, learn one linear map on both groups."""
    generator, width = torch.Generator().manual_seed(0), 8
    centres = 3 * torch.randn(2, width, generator=generator)
    target = torch.randn(width, width, generator=generator) @ torch.randn(width, width, generator=generator) / width
    network = nn.Sequential(nn.Linear(width, width, bias=False))
    inject(network, AdapterConfig(r=2, num_experts=4, top_k=2, lora_alpha=4, target_modules=["0"], seed=1))
    experts: Any = next(layer for _, layer in adapted_layers(network)).experts
    with torch.no_grad():
        network[0].base.weight.zero_()  # type: ignore[union-attr]
        experts.a.copy_(experts.a[:1] + 0.1 * experts.a)
    losses = ContrastiveLosses(network.train(), config, torch.device("cpu"), TOP_K)
    context = adapter_context(network)
    context.losses = losses
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.02)
    for step in range(100):
        x = centres[torch.randint(2, (4, 16), generator=generator)]
        x = x + 0.3 * torch.randn(x.shape, generator=generator)
        real_BS = torch.ones(4, 16, dtype=torch.bool)
        context.tokens = BatchTokens(token_keys(0, 4 * step + torch.arange(4), real_BS), real_BS)
        losses.begin_step(4, scale=1)
        optimizer.zero_grad()
        (network(x) - x @ target).square().mean().backward()
        optimizer.step()
    *_, mean = largest_and_mean(cosine_matrix(experts.a.detach(), experts.b.detach())).tolist()
    return float(mean)


def test_cross_grams_are_products_of_all_pairs() -> None:
    b = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cross_grams(b), torch.einsum("eor,foq->efrq", b, b))


@pytest.mark.parametrize(
    ("adapter", "losses", "words"),
    [
        ({"num_experts": 1}, {"contrastive": 0.1}, ("losses.contrastive is 0.1", "no routers")),
        ({"top_k": 1}, {"contrastive_coactive": 0.1}, ("losses.contrastive_coactive is 0.1", "top_k is 1")),
        ({"num_experts": 4, "top_k": 4}, {"contrastive_coactive": 0.1}, ("no unselected experts",)),
        ({"router": "softmax"}, {"contrastive_coactive": 0.1}, ("no unselected experts",)),
        ({}, {"contrastive": -0.1}, ("losses.contrastive is -0.1", "0 or more")),
        ({}, {"contrastive_coactive": -0.1}, ("losses.contrastive_coactive is -0.1", "0 or more")),
        ({}, {"contrastive_temperature": 0.0}, ("losses.contrastive_temperature is 0.0", "above 0")),
        ({}, {"contrastive_tokens": 1}, ("losses.contrastive_tokens is 1", "2 or more")),
    ],
)
def test_losses_that_would_do_nothing_are_refused(
    adapter: dict[str, Any], losses: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(adapter=AdapterConfig(**adapter), losses=LossesConfig(**losses))
    for word in words:
        assert word in str(caught.value)

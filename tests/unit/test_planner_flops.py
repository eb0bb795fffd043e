"""The planner's operations by formula against torch's own count of what real tensors compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dsmoelora.adapters import Factor, adapter_context, inject
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.keyed.keys import key_columns, token_keys
from dsmoelora.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, ParallelConfig, Recipe, TrainConfig
from dsmoelora.model import recompute_activations
from dsmoelora.model.output_head import ChunkedLoss
from dsmoelora.optim.rows import Trainable
from dsmoelora.parallel.placement import ExpertPlacement
from dsmoelora.planner import device_of_run, token_flops
from dsmoelora.planner.flops import Source, TokenFlops, Work, model_flops, optimizer_flops
from dsmoelora.planner.shapes import ParameterShape
from dsmoelora.planner.stand_in import pass_bytes

ROWS, LENGTH, WIDTH, INNER, VOCABULARY, LAYERS = 2, 12, 32, 48, 96, 3
LLAMA = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    num_hidden_layers=LAYERS,
)
ALONE = ExpertPlacement(3, 1, 1, 0)
GPT2 = GPT2Config(n_embd=WIDTH, n_inner=INNER, n_head=4, vocab_size=VOCABULARY, n_layer=LAYERS, n_positions=64)


def recipe_of(checkpointing: bool = False, **adapter: Any) -> Recipe:
    options: dict[str, Any] = {"num_experts": 3, "r": 2, "top_k": 2, "target_modules": "all-linear"} | adapter
    return Recipe(
        model=ModelConfig(dtype="fp32", attention="eager"),
        adapter=AdapterConfig(**options),
        data=DataConfig(max_length=LENGTH),
        train=TrainConfig(micro_batch_size=ROWS, batch_size=ROWS, loss_chunk=7, activation_checkpointing=checkpointing),
    )


def counted_by_torch(shape: Any, recipe: Recipe) -> int:
    """Products of a forward and a backward pass with real numbers, the last token of a row being no target's place."""
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="eager")
    inject(model, recipe.adapter)
    model.train()
    if recipe.train.activation_checkpointing:
        recompute_activations(model)
    loss = ChunkedLoss.of(model, recipe.train.loss_chunk)
    assert loss is not None
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    places = torch.arange(LENGTH - 1).expand(ROWS, -1)

    def call() -> Any:
        return model(ids, logits_to_keep=places, use_cache=False)

    with FlopCounterMode(display=False) as counter:
        loss.nll_sum(call, torch.arange(places.numel()), ids[:, 1:].flatten(), 1.0).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "adapter"),
    [
        (LLAMA, {}),
        (LLAMA, {"lora_dropout": 0.1}),  # the experts make their features themselves
        (LLAMA, {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
        (LLAMA, {"router": "noisy_topk"}),
        (LLAMA, {"router": "constant", "top_k": None}),
        (LLAMA, {"expert": "moslora"}),
        (LLAMA, {"expert": "dora"}),
        (LLAMA, {"expert": "dora", "freeze": ["magnitude", "router"]}),
        (GPT2, {}),
        (GPT2, {"expert": "dora"}),  # whose layers have biases
    ],
)
def test_the_formulas_are_what_torch_counts(shape: Any, adapter: dict[str, Any], checkpointing: bool) -> None:
    recipe = recipe_of(checkpointing, **adapter)
    planned = pass_bytes(shape, recipe, ALONE)
    found = counted_by_torch(shape, recipe)
    assert sum(planned.flops.values()) == found
    # the log of a run sums up what routers say by products too, which no formula counts
    asked_for = sum(one.flops * times for one, times in planned.operations.items())
    assert found <= asked_for < 1.005 * found


def test_parts_follow_from_the_sizes() -> None:
    flops = pass_bytes(LLAMA, recipe_of(target_modules=["q_proj", "k_proj", "v_proj"]), ALONE).flops
    tokens, features = ROWS * LENGTH, 3 * 2
    narrow = WIDTH // 2
    layer = 2 * WIDTH**2 + 2 * WIDTH * narrow + 3 * WIDTH * INNER
    assert flops[Source.BASE, Work.FORWARD] == 2 * tokens * LAYERS * layer
    assert flops[Source.ATTENTION, Work.FORWARD] == 4 * ROWS * LENGTH**2 * WIDTH * LAYERS
    assert flops[Source.ATTENTION, Work.BACKWARD] == 2 * flops[Source.ATTENTION, Work.FORWARD]
    down, up = 3 * features * WIDTH, features * (WIDTH + 2 * narrow)
    assert flops[Source.EXPERTS, Work.FORWARD] == 2 * tokens * LAYERS * (down + up)
    assert flops[Source.ROUTERS, Work.FORWARD] == 2 * tokens * LAYERS * 3 * 3 * WIDTH
    assert flops[Source.HEAD, Work.FORWARD] == 2 * (tokens - ROWS) * WIDTH * VOCABULARY
    assert flops[Source.HEAD, Work.BACKWARD] == flops[Source.HEAD, Work.FORWARD]
    # the first layer's inputs are embeddings, which learn nothing
    assert flops[Source.EXPERTS, Work.BACKWARD] == 2 * flops[Source.EXPERTS, Work.FORWARD] - 2 * tokens * down


def test_a_layer_that_is_computed_again_is_no_progress() -> None:
    once, again = (pass_bytes(LLAMA, recipe_of(checkpointing), ALONE).flops for checkpointing in (False, True))
    # but that the first layer's inputs get a gradient then, which nobody reads
    narrow, columns = WIDTH // 2, 3 * (3 * 2 + 3)  # of q, k and v: features and logits
    to_inputs = WIDTH * (WIDTH + 2 * narrow + columns)
    assert model_flops(again) - model_flops(once) == 2 * ROWS * LENGTH * to_inputs
    assert sum(once.values()) < sum(again.values())


def test_a_pass_is_planned_alike_again_and_leaves_no_tensor_without_memory_behind() -> None:
    """Columns of dropout's masks are kept for the life of a process, which may train after its plan."""
    key_columns.cache_clear()
    recipe = recipe_of(lora_dropout=0.1)
    assert pass_bytes(LLAMA, recipe, ALONE) == pass_bytes(LLAMA, recipe, ALONE)
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32)
    inject(model, recipe.adapter)
    ids = torch.arange(LENGTH).expand(ROWS, -1)
    adapter_context(model).tokens = BatchTokens(token_keys(0, torch.arange(ROWS), torch.ones_like(ids)))
    assert torch.isfinite(model.train()(input_ids=ids).logits.sum()).item()


def test_a_packed_base_computes_as_much() -> None:
    recipe = recipe_of()
    packed = replace(recipe, model=replace(recipe.model, quantize="nf4"))
    flops = [pass_bytes(LLAMA, one, ALONE).flops for one in (recipe, packed)]
    assert flops[0] == flops[1]


def test_a_token_costs_more_in_a_longer_row() -> None:
    flops = pass_bytes(LLAMA, recipe_of(), ALONE).flops
    token = TokenFlops.of(flops, ROWS, LENGTH)
    assert token.in_row(LENGTH) * ROWS * LENGTH == pytest.approx(model_flops(flops))
    assert token.in_row(2 * LENGTH) - token.in_row(LENGTH) == pytest.approx(LAYERS * 3 * 4 * LENGTH * WIDTH)


@pytest.mark.parametrize(("rule", "products"), [("none", 0), ("scaled", 2), ("tangent", 4)])
def test_the_preconditioner(rule: Any, products: int) -> None:
    """Against torch's count of the rule's own products on the rows of a whole factor."""
    rows, rank, experts = 10, 3, 2
    of = Trainable("x.a", "x", Factor.A, (experts, rows, rank))
    shape = ParameterShape("x.a", experts * rows * rank, 1, of)
    a, grad = torch.randn(2, experts, rows, rank)
    square = torch.randn(experts, rank, rank)
    with FlopCounterMode(display=False) as counter:
        if products:
            torch.bmm(a.mT, a)
            torch.bmm(grad, square)
        if products == 4:
            torch.bmm(a.mT, grad)
            torch.bmm(a, square)
    assert optimizer_flops([shape], OptimConfig(preconditioner=rule)) == counter.get_total_flops()


def test_a_run_knows_what_its_tokens_cost_wherever_its_experts_lie(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    recipe = recipe_of()
    recipe.model.path = str(tmp_path)
    parallel = ParallelConfig(ep_size=3, exchange="gather")
    spread = replace(recipe, parallel=parallel, train=replace(recipe.train, device="h200"))
    packed = replace(recipe, model=replace(recipe.model, quantize="nf4"))
    packed = replace(packed, adapter=replace(recipe.adapter, init="loftq"))  # which a plain base would refuse
    cost = token_flops(spread)
    assert cost is not None and cost == token_flops(recipe) == token_flops(packed)
    assert cost.in_row(LENGTH) == model_flops(pass_bytes(LLAMA, recipe, ALONE).flops) / ROWS / LENGTH
    device = device_of_run(spread)
    assert device is not None and device.name == "h200"
    if not torch.cuda.is_available():
        assert device_of_run(recipe) is None  # a CPU's peak is in no list

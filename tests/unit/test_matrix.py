"""Every expert with every router, style, start and preconditioner trains, or is refused with the documented reason."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters.starts.gradient import gradient_start
from dsmoelora.config import InitName
from dsmoelora.config.adapter_options import ExpertName, RouterName
from dsmoelora.errors import ConfigError
from dsmoelora.optim import OptimConfig, build_optimizer, trainables

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
STYLES: dict[str, dict[str, Any]] = {
    "per_linear": {"target_modules": ["q_proj", "down_proj"]},
    "ffn_block": {
        "style": "ffn_block",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "lora_modules": ["v_proj"],
    },
    "decoder_layer": {
        "style": "decoder_layer",
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "lora_modules": ["v_proj"],
    },
}
NUM_STEPS = 3


def train(optim: OptimConfig, **settings: Any) -> tuple[list[float], list[str]]:
    """The losses of a few steps, and the names of tensors that did not move."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    config = AdapterConfig(r=2, num_experts=4, **settings)
    inject(model, config)
    optimizer = build_optimizer(model, optim)
    before = {of.name: parameter.detach().clone() for of, parameter in trainables(model)}
    ids_BS = torch.randint(0, 32, (6, 10))
    labels_BS = ids_BS.masked_fill(torch.arange(10) < 4, -100)
    losses = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids_BS, labels=labels_BS).loss
        loss.backward()
        if config.init == "gradient" and not losses:
            gradient_start(model, config)
        else:
            optimizer.step()
        losses.append(loss.item())
    return losses, [of.name for of, parameter in trainables(model) if torch.equal(parameter, before[of.name])]


@pytest.mark.parametrize("preconditioner", ["none", "scaled", "tangent"])
@pytest.mark.parametrize(
    ("expert", "router", "style"), list(product(get_args(ExpertName), get_args(RouterName), STYLES))
)
def test_every_cell_trains(expert: Any, router: Any, style: str, preconditioner: Any) -> None:
    refused = {("arrow", "ffn_block"): r"per_linear with adapter\.router = arrow"}
    if style == "decoder_layer" and router != "prompt":
        refused[router, style] = r"per_linear with adapter\.router = arrow|prompt with adapter\.style = decoder_layer"
    if (router, style) in refused:
        with pytest.raises(ConfigError, match=refused[router, style]):
            AdapterConfig(expert=expert, router=router, **STYLES[style])
        return
    damping = {} if preconditioner == "none" else {"damping": 0.1, "damping_abs": 1e-3}
    optim = OptimConfig(name="adamw", lr=5e-3, preconditioner=preconditioner, **damping)
    chosen = {"top_k": 4} if style == "decoder_layer" else {}  # what no prompt chooses does not learn
    losses, still = train(optim, expert=expert, router=router, **STYLES[style], **chosen)
    assert losses[-1] < losses[0]
    assert not still, "every tensor takes part"


@pytest.mark.parametrize(("expert", "init"), list(product(get_args(ExpertName), get_args(InitName))))
def test_every_start_trains_or_says_why_not(expert: Any, init: Any) -> None:
    settings = {"expert": expert, "init": init, **STYLES["per_linear"]}
    if init in ("svd", "loftq") and expert != "lora":
        with pytest.raises(ConfigError, match=rf"adapter\.init is '{init}'.*adapter\.expert = {expert}"):
            AdapterConfig(**settings)
        return
    if init == "loftq":  # trained in test_loftq.py
        with pytest.raises(ConfigError, match=r"its start is found while the base is packed into 4 bits\. Train with"):
            train(OptimConfig(lr=5e-3), **settings)
        return
    losses, still = train(OptimConfig(lr=5e-3), **settings)
    assert losses[-1] < losses[0] and not still

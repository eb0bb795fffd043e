"""Every architecture under ZeRO-3 on two ranks: the losses of plain torch, and an adapter that others can load."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dsmoelora import load_adapter
from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from tests.architectures import ARCHITECTURES, save_model
from tests.conftest import PoolFactory
from tests.engine_ranks import Job, Share, assert_parity, batches_of, build_engine, numbers_of
from tests.plain_training import global_batch, make_recipe, preconditioned, train_plainly

# b starts at 0, and Adam's first step would make its rounding noise as large as the learning rate
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5, "warmup_steps": 0}
SCALED = SGD | {"preconditioner": "scaled", "damping": 0.1, "damping_abs": 1e-3}
CHAT = [{"role": "user", "content": "abc"}]


@dataclass
class Outcome:
    """What one rank brings home.

    Args:
        share: of the training
        logits_BSV: of the first global batch, after the last step
        answer: to `CHAT`
    """

    share: Share
    logits_BSV: Tensor
    answer: str


def train_and_save(job: Job, folder: Path) -> Outcome:
    """Run a job, save its adapter, and look at the trained model; called on every rank."""
    engine = build_engine(job)
    results = [engine.train_step(batches_of(job, step)) for step in range(job.recipe.train.max_steps)]
    engine.save_adapter(folder)
    ids_BS, mask_BS, _ = global_batch(0)
    with torch.no_grad():
        logits_BSV = engine.model.eval()(ids_BS, attention_mask=mask_BS).logits
    share = Share(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.lr for result in results],
        engine.evaluate(batches_of(job, 0)),
        engine.optimizer.num_steps,
        numbers_of(engine),
    )
    return Outcome(share, logits_BSV, engine.generate([Prompt(CHAT)], max_new_tokens=3)[0])


def recipe_for(name: str, base: Path, optim: dict[str, Any]) -> Recipe:
    """Two steps with adapters on every linear layer; all experts are chosen, so rounding chooses none."""
    adapter = {"target_modules": "all-linear", "num_experts": 3, "top_k": 3, "r": 3, "lora_dropout": 0.1}
    recipe = make_recipe(base, adapter=adapter, optim=optim, max_steps=2, seed=1)
    return replace(recipe, model=replace(recipe.model, attention=ARCHITECTURES[name].implementation))


def without_dropout(base: Path, folder: Path) -> Path:
    """A copy of a model whose own dropout is 0 (GPT-2's is 0.1), as the engine has it."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    off = {key: 0.0 for key in config if key.endswith("pdrop")}
    (folder / "config.json").write_text(json.dumps(config | off))
    return folder


def answer_of(model: Any, folder: Path) -> str:
    """The greedy answer to `CHAT`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output_BS = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    return str(tokenizer.decode(output_BS[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    ("name", "optim"),
    [pytest.param(name, SGD, id=name) for name in ARCHITECTURES]
    + [pytest.param(name, SCALED, id=f"{name}-scaled") for name in ("gpt2", "phi3")],
)
def test_two_ranks_train_as_plain_torch_does_and_save_an_adapter_that_loads(
    worker_pool: PoolFactory, tmp_path: Path, name: str, optim: dict[str, Any]
) -> None:
    base = save_model(name, tmp_path / "base")
    recipe = recipe_for(name, base, optim)
    with preconditioned(recipe.optim, []) if "preconditioner" in optim else nullcontext():
        expected = train_plainly(recipe_for(name, without_dropout(base, tmp_path / "plain"), optim))
    assert len({*expected.losses, expected.final_loss}) == 3
    folder = tmp_path / "adapter"
    outcomes = worker_pool(2).run(train_and_save, Job(recipe), folder)
    assert_parity([outcome.share for outcome in outcomes], expected, weight_tolerance=1e-4)

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    ids_BS, mask_BS, _ = global_batch(0)
    with torch.no_grad():
        logits_BSV = model(ids_BS, attention_mask=mask_BS).logits
    answer = answer_of(model, folder)
    for outcome in outcomes:
        torch.testing.assert_close(outcome.logits_BSV, logits_BSV, rtol=1e-4, atol=1e-5)
        assert outcome.answer == answer


class AllLogits(LlamaForCausalLM):
    """A model whose forward pass cannot be told which logits are wanted."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:  # type: ignore[override]
        assert "logits_to_keep" not in others
        return super().forward(input_ids=input_ids, **others)


def train_on_all_logits(recipe: Recipe) -> list[float]:
    """The losses of two steps; called on every rank."""
    from dsmoelora.engine import Engine
    from dsmoelora.model import load_tokenizer

    model = AllLogits.from_pretrained(recipe.model.path, dtype=torch.float32)
    recipe = replace(recipe, train=replace(recipe.train, micro_batch_size=24))
    engine = Engine(recipe, {"zero_optimization": {"stage": 3}}, model, load_tokenizer(recipe.model))
    return [engine.train_step(batches_of(Job(recipe), step)).loss for step in range(2)]


def test_a_model_that_always_makes_all_logits_trains_as_well(worker_pool: PoolFactory, tmp_path: Path) -> None:
    recipe = recipe_for("llama", save_model("llama", tmp_path / "base"), SGD)
    expected = train_plainly(recipe).losses
    for losses in worker_pool(2).run(train_on_all_logits, recipe):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)

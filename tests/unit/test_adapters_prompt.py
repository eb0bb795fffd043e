"""The router that looks at the prompt once: in training, in a plain call, and while an answer is generated."""

from __future__ import annotations

import copy
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import adapted_layers, adapter_context, eject
from dsmoelora.adapters.routers.prompt import prompt_tokens
from dsmoelora.errors import ModelError

LENGTH = 7


@pytest.fixture
def model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=97, num_hidden_layers=2, pad_token_id=0, eos_token_id=2, **sizes)
        )
        inject(model, AdapterConfig(r=2, num_experts=4, top_k=2, router="prompt", target_modules="all-linear"))
        for _, layer in adapted_layers(model):
            layer.experts.b.data.normal_(std=0.1)
            layer.router.weight.data.normal_(std=0.5)
    return model.eval()


def token_ids(num_sequences: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (num_sequences, length), generator=torch.Generator().manual_seed(5))


def watch_gates(model: Any) -> list[Tensor]:
    """A list that gets the gates (B, S, E) of the last layer's router at every call."""
    *_, (_, layer) = adapted_layers(model)
    num_sequences = len(token_ids())
    gates: list[Tensor] = []
    layer.router.register_forward_hook(lambda _, __, output: gates.append(output.view(num_sequences, -1, 4)))
    return gates


def test_the_prompt_ends_before_the_first_supervised_token() -> None:
    mask_BS = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels_BS = torch.tensor([[-100, -100, 5, -100, -100], [-100, 4, 5, 6, 7], [-100] * 5])
    expected_BS = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(prompt_tokens(mask_BS, labels_BS), expected_BS), "one token at least, no padding, or all of it"
    assert torch.equal(prompt_tokens(mask_BS, None), mask_BS.bool())


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_gates_of_the_prompt_hold_for_the_whole_answer(model: Any, use_cache: bool) -> None:
    gates = watch_gates(model)
    with torch.no_grad():
        model.generate(token_ids(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache)
    assert [gate.shape[1] for gate in gates] == ([LENGTH, 1, 1, 1, 1] if use_cache else [7, 8, 9, 10, 11])
    for gate in gates:
        assert torch.equal(gate, gates[0][:, :1].expand_as(gate))
    assert len(gates[0][:, 0].unique(dim=0)) == 3, "each prompt has its own"


def test_answers_with_and_without_a_cache_are_the_same_also_beside_padding(model: Any) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        answers = [
            model.generate(token_ids(), use_cache=use_cache, **kwargs)[:, LENGTH:] for use_cache in (True, False)
        ]
        padded = torch.nn.functional.pad(token_ids(), (4, 0))
        mask = torch.nn.functional.pad(torch.ones_like(token_ids()), (4, 0))
        answers.append(model.generate(padded, attention_mask=mask, **kwargs)[:, LENGTH + 4 :])
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_the_next_prompt_is_routed_anew(model: Any) -> None:
    gates = watch_gates(model)
    with torch.no_grad():
        model.generate(token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        model.generate(token_ids().flip(0), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        model(token_ids())
    torch.testing.assert_close(gates[2][:, 0], gates[0][:, 0].flip(0))
    torch.testing.assert_close(gates[4], gates[0])


def test_a_hand_written_loop_over_a_cache_keeps_the_prompts_gates(model: Any) -> None:
    gates = watch_gates(model)
    with torch.no_grad():
        cache = model(token_ids(), use_cache=True).past_key_values
        model(token_ids(length=1), past_key_values=cache, use_cache=True)
    assert torch.equal(gates[1], gates[0][:, :1])


def test_in_training_what_comes_after_the_prompt_does_not_move_its_gates(model: Any) -> None:
    gates, labels = watch_gates(model.train()), token_ids().clone()
    labels[:, :4] = -100
    model(token_ids(), labels=labels).loss.backward()
    changed = token_ids()
    changed[:, 4:] += 1
    model(changed, labels=labels)
    assert torch.equal(gates[0], gates[1])
    context = adapter_context(model)
    context.tokens = replace(context.tokens, prompt_BS=torch.arange(LENGTH).expand(3, -1) < 4)
    model(changed)
    assert torch.equal(gates[0], gates[2]), "said by the training loop"
    for _, layer in adapted_layers(model):
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.any()


def test_a_part_of_the_model_does_not_know_the_prompt(model: Any) -> None:
    with pytest.raises(ModelError, match=r"(?s)q_proj.*router `prompt`.*as a whole"):
        model.model(token_ids())


def test_a_copy_of_the_model_remembers_its_own_prompt(model: Any) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        before = model.generate(token_ids(), **kwargs)
        copied = copy.deepcopy(model)
        for _, layer in adapted_layers(model):
            layer.experts.b.data.zero_()
        assert torch.equal(copied.generate(token_ids(), **kwargs), before)
        assert not torch.equal(model.generate(token_ids(), **kwargs), before)


def test_eject_gives_the_base_back_and_leaves_a_copy_alone(model: Any) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    copied = copy.deepcopy(model)
    gates = watch_gates(model)
    eject(copied)
    assert copied.generate == types.MethodType(LlamaForCausalLM.generate, copied)
    assert not copied._forward_pre_hooks
    with torch.no_grad():
        base_BSV = copied(token_ids()).logits
        copied.generate(token_ids(), **kwargs)
        model.generate(token_ids(), **kwargs)
        assert len(gates) == 4 and torch.equal(gates[3][:, 0], gates[0][:, 0]), "still watched"
        inject(copied, AdapterConfig(r=2, num_experts=4, top_k=2, router="prompt"))
        assert torch.equal(copied(token_ids()).logits, base_BSV)

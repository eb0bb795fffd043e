"""Samples of a packed row are computed as if each stood alone: in many architectures, and with every attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_flash_attention_utils

from dsmoelora import AdapterConfig, inject
from dsmoelora.adapters import AdapterContext, adapted_layers, adapter_context
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.config import DataConfig, Recipe
from dsmoelora.data import MicroBatch
from dsmoelora.data.loader import Row, collate
from dsmoelora.data.packing_probe import check_probe, check_takes_positions, probe
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model.inputs import fill_context, model_inputs
from tests.host_waits import HostWaits

VOCABULARY = 100
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # attention that matters
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 3},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 3},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3},
    "phi3": {},
    "glm4": {"head_dim": 8},
}


def tiny_model(kind: str, attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A random model in fp32 from a tiny configuration."""
    config = transformers.AutoConfig.for_model(kind, **SMALL | MODELS.get(kind, {}) | overrides)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def packed_batch() -> MicroBatch:
    """Two rows of samples of 5, 1, 7 and of 4, 6 tokens; every token but the first of a sample is a target."""
    generator = torch.Generator().manual_seed(1)
    lengths_of_rows, num_columns = [(5, 1, 7), (4, 6)], 13
    ids, mask, labels, sequences, positions = (torch.zeros(2, num_columns, dtype=torch.int64) for _ in range(5))
    labels.fill_(-100)
    number = 70
    for i, lengths in enumerate(lengths_of_rows):
        begin = 0
        for length in lengths:
            here = slice(begin, begin + length)
            ids[i, here] = torch.randint(1, VOCABULARY, (length,), generator=generator)
            mask[i, here] = 1
            labels[i, begin + 1 : begin + length] = ids[i, begin + 1 : begin + length]
            positions[i, here] = torch.arange(length)
            sequences[i, here] = number
            begin, number = begin + length, number + 1
        positions[i, begin:] = torch.arange(num_columns - begin)
    return MicroBatch(ids, mask, labels, sequences, int((labels != -100).sum()), int(mask.sum()), positions)


def alone(batch: MicroBatch) -> list[MicroBatch]:
    """The samples of a packed batch, each a batch of its own, under the same sequence ids."""
    found = []
    for sequence in batch.sequence_ids[batch.attention_mask == 1].unique().tolist():
        here = (batch.sequence_ids == sequence) & (batch.attention_mask == 1)
        ids, labels = batch.input_ids[here].unsqueeze(0), batch.labels[here].unsqueeze(0)
        found.append(MicroBatch(ids, torch.ones_like(ids), labels, torch.tensor([sequence]), 1, ids.numel()))
    return found


def logits_of(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """(B, S, V), with the dropout masks of these sequences where the model is adapted."""
    if any(True for _ in adapted_layers(model)):
        adapter_context(model).tokens = BatchTokens(
            token_keys(0, batch.sequence_ids, batch.attention_mask, batch.position_ids)
        )
    logits: Tensor = model(**model_inputs(batch, model.config._attn_implementation, CPU)).logits
    return logits


def assert_samples_stand_alone(model: PreTrainedModel) -> None:
    """Losses of all tokens, and logits, equal those of every sample by itself."""
    batch = packed_batch()
    packed_BSV = logits_of(model, batch)
    for sample in alone(batch):
        here = (batch.sequence_ids == int(sample.sequence_ids)) & (batch.attention_mask == 1)
        found_SV, wanted_SV = packed_BSV[here], logits_of(model, sample)[0]
        torch.testing.assert_close(found_SV, wanted_SV, rtol=1e-4, atol=1e-4)
        targets = sample.input_ids[0, 1:]
        found, wanted = (
            nn.functional.cross_entropy(logits_SV[:-1], targets, reduction="none")
            for logits_SV in (found_SV, wanted_SV)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_samples_do_not_see_each_other(kind: str, attention: str) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers computes Gemma 2, which caps attention logits, in eager attention")
    model = tiny_model(kind, attention)
    check_takes_positions(model)
    check_probe(model, logits_of(model, probe(VOCABULARY)))
    assert_samples_stand_alone(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_of_adapters_are_those_of_samples_alone(attention: str) -> None:
    """In training, with dropout: a token's mask belongs to its sample and its place there."""
    model = tiny_model("llama", attention)
    inject(model, AdapterConfig(r=2, num_experts=3, top_k=2, lora_dropout=0.3, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for _, layer in adapted_layers(model):
        layer.experts.b.data.normal_(std=0.1, generator=generator)
    model.train()
    assert_samples_stand_alone(model)
    batch = packed_batch()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = []
    for parts in ([batch], alone(batch)):
        for part in parts:
            logits_BSV = logits_of(model, part)
            nn.functional.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1), part.labels[:, 1:].flatten(), reduction="sum"
            ).backward()
        grads.append([parameter.grad for parameter in trainable])
        model.zero_grad()
    for packed, separate in zip(*grads, strict=True):
        assert packed is not None and separate is not None and packed.abs().max() > 0
        torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4 * float(separate.abs().max()))


def varlen_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """What `flash_attn_varlen_func` computes, sequence by sequence."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32 and causal
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = []
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        q, k, v = (tensor[begin:end].transpose(0, 1) for tensor in (q_THD, k_THD, v_THD))
        groups = len(q) // len(k)
        k, v = (tensor.repeat_interleave(groups, dim=0) for tensor in (k, v))
        scores = (q @ k.transpose(1, 2)) * (softmax_scale or q.shape[-1] ** -0.5)
        mask = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def refuse(*_: Any, **__: Any) -> Tensor:
    """Flash attention of rows as wholes: packed samples would see each other."""
    raise AssertionError("attention over whole rows")


@torch.no_grad()
def test_flash_attention_gets_the_borders_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own code runs; the kernel, which needs a GPU, is replaced by what it computes."""
    kernels = (refuse, varlen_attention, None, refuse, refuse)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    model = tiny_model("llama")
    batch = packed_batch()
    wanted_BSV = logits_of(model, batch)
    model.config._attn_implementation = "flash_attention_2"
    found_BSV = logits_of(model, batch)
    real_BS = batch.attention_mask == 1
    torch.testing.assert_close(found_BSV[real_BS], wanted_BSV[real_BS], rtol=1e-4, atol=1e-4)
    check_probe(model, logits_of(model, probe(VOCABULARY)))


@torch.no_grad()
def test_a_model_whose_samples_see_each_other_is_refused() -> None:
    """With a cache, transformers does not look where positions restart."""
    model = tiny_model("llama")
    inputs = model_inputs(probe(VOCABULARY), "sdpa", CPU) | {"use_cache": True}
    with pytest.raises(ModelError, match=r"data\.packing is true, but LlamaForCausalLM .* see each other"):
        check_probe(model, model(**inputs).logits)


@torch.no_grad()
def test_a_model_that_gives_no_numbers_is_refused() -> None:
    logits_BSV = logits_of(tiny_model("llama"), probe(VOCABULARY))
    logits_BSV[0, -1, 0] = torch.nan
    with pytest.raises(ModelError, match=r"data\.packing is true, but LlamaForCausalLM"):
        check_probe(tiny_model("llama"), logits_BSV)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    model = tiny_model("bloom", "eager", n_layer=1, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM cannot be trained on packed rows: it takes no position_ids"):
        check_takes_positions(model)


def test_the_host_waits_for_nothing_that_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for an accelerator: all copies come out of pinned memory, and `collate` has pinned it."""
    pinned: set[Tensor] = set()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.add(tensor) or tensor)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor in pinned)
    batch, meta, context, waits = (
        packed_batch().with_tensors(Tensor.pin_memory),
        torch.device("meta"),
        AdapterContext(),
        HostWaits(),
    )
    of_batch = len(pinned)
    with waits:
        inputs = model_inputs(batch, "flash_attention_2", meta)
        fill_context(context, batch, 0, meta)
    found = [value for value in (*inputs.values(), *vars(context.tokens).values()) if isinstance(value, Tensor)]
    assert [tensor.device for tensor in found] == [meta] * 8
    assert waits.copies and all(waits.copies)
    assert len(pinned) == of_batch + 1, "nothing is pinned in the step but the borders that this attention alone wants"


def test_a_batch_is_pinned_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)

    class Samples:
        def sample(self, index: int) -> tuple[list[int], list[int]]:
            return [4, 5, 6], [-100, 5, 6]

    rows = [Row(np.array([0]), 0, 3), Row(np.array([0]), 1, 3, counts=False)]
    for is_there, wanted in ((False, 0), (True, 6)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=is_there: there)
        collate(Samples(), rows, 0, (2, 6), packed=True)
        assert len(pinned) == wanted


@torch.no_grad()
def test_rows_of_one_sample_are_told_by_their_mask() -> None:
    batch = alone(packed_batch())[0]
    inputs = model_inputs(batch, "sdpa", CPU)
    assert inputs.keys() == {"input_ids", "attention_mask", "use_cache"} and inputs["use_cache"] is False


def test_a_router_that_decides_for_a_whole_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.packing is True, .* false with adapter.router `prompt`"):
        Recipe(adapter=AdapterConfig(router="prompt"), data=DataConfig(packing=True))

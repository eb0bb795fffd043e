"""Logits of few places, and the loss that is made chunk by chunk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from dsmoelora import AdapterConfig, inject
from dsmoelora.model.output_head import ChunkedLoss, ChunkedNll, can_keep_logits
from tests.architectures import ARCHITECTURES

WEIGHT = 0.25
KEEPS_LOGITS = Version(transformers.__version__) >= Version("5.21")
needs_places = pytest.mark.skipif(not KEEPS_LOGITS, reason="transformers is older than 5.21")


def tiny_model(name: str) -> Any:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        architecture.config(), attn_implementation=architecture.implementation
    )
    return model.eval().requires_grad_(False)


def rows(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, S), places (B, P) and targets (B, P) of which some are none."""
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(4, vocab_size, (3, 9), generator=generator)
    places_BP = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(3)])
    targets_BP = torch.randint(4, vocab_size, (3, 5), generator=generator)
    return ids_BS, places_BP, targets_BP.masked_fill(torch.rand(3, 5, generator=generator) < 0.3, -100)


def embedded(model: Any, ids_BS: Tensor) -> Tensor:
    """A leaf that stands for the tokens."""
    embeddings: Tensor = model.get_input_embeddings()(ids_BS)
    return embeddings.detach().requires_grad_()


@needs_places
@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(name: str, size: int) -> None:
    """Soft caps and scales included, for every architecture of docs/models.md."""
    model = tiny_model(name)
    ids_BS, places_BP, targets_BP = rows(model.config.get_text_config().vocab_size)
    x = embedded(model, ids_BS)
    logits_BPV = torch.take_along_dim(model(inputs_embeds=x).logits, places_BP.unsqueeze(-1), dim=1)
    wanted = nn.functional.cross_entropy(logits_BPV.flatten(0, 1), targets_BP.flatten(), reduction="sum")
    (WEIGHT * wanted).backward()
    assert x.grad is not None
    wanted_grad, x.grad = x.grad, None
    loss = ChunkedLoss.of(model, size)
    assert loss is not None
    wanted_T = (targets_BP != -100).flatten().nonzero().squeeze(-1)
    call = lambda: model(inputs_embeds=x, logits_to_keep=places_BP)  # noqa: E731
    found = loss.nll_sum(call, wanted_T, targets_BP.flatten()[wanted_T], gradient=WEIGHT)
    (WEIGHT * found).backward()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, wanted_grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        without = loss.nll_sum(call, wanted_T, targets_BP.flatten()[wanted_T], gradient=1.0)
    assert without == found and not without.requires_grad
    assert "forward" not in vars(model.get_output_embeddings())


def test_the_gradient_is_exact_whatever_comes_from_above() -> None:
    """In fp64, with one that was not expected."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(11, 4, dtype=torch.float64, generator=generator)
    targets_T = torch.randint(11, (7,), generator=generator)

    def nll_sum(hidden_TD: Tensor) -> Tensor:
        return ChunkedNll.apply(hidden_TD, targets_T, lambda h: (h @ weight_VD.t()).tanh(), 3, 0.1).double()

    # the gradient of fp32 logits, which is what losses are made of
    logits_TV = (hidden_TD @ weight_VD.t()).tanh()
    wanted = torch.autograd.grad(nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum"), hidden_TD)
    found = torch.autograd.grad(3 * nll_sum(hidden_TD), hidden_TD)
    torch.testing.assert_close(found[0], 3 * wanted[0], rtol=1e-5, atol=1e-6)


def test_small_gradients_are_not_lost_in_fp16() -> None:
    """A loss scale is there to keep them; formed without it, they would be 0 before it could."""
    hidden_TD = torch.full((1, 2), 1e-3, dtype=torch.float16, requires_grad=True)
    weight_VD = torch.tensor([[1e-4, 0.0], [0.0, 1e-4]], dtype=torch.float16)
    grads = []
    for gradient in (1.0, 2.0**15):
        nll = ChunkedNll.apply(hidden_TD, torch.tensor([0]), lambda h: h @ weight_VD.t(), 4, gradient / 1e4)
        grads.append(torch.autograd.grad(nll, hidden_TD, torch.tensor(2.0**15 / 1e4))[0])
    exact = 0.5 * 1e-4 * 2.0**15 / 1e4
    assert grads[1].abs().tolist() == [pytest.approx([exact, exact], rel=1e-2)]


def test_no_target_is_a_loss_of_zero_that_still_has_a_gradient() -> None:
    """Ranks without targets take part in the backward pass of all."""
    x = torch.randn(3, 4, requires_grad=True)
    nothing_T = torch.zeros(0, dtype=torch.int64)
    nll = ChunkedNll.apply(x[nothing_T], nothing_T, lambda h: h @ torch.ones(4, 5), 2, 1.0)
    nll.backward()
    assert nll == 0 and x.grad is not None and not x.grad.any()


@needs_places
def test_models_that_cannot_be_cut_into_chunks_are_left_as_they_are() -> None:
    model = tiny_model("llama")
    assert ChunkedLoss.of(model, 4) is not None
    assert ChunkedLoss.of(model, 0) is None, "switched off"
    forward = model.forward

    def over_tokens(*args: Any, **kwargs: Any) -> Any:
        """Logits that depend on one another."""
        output = forward(*args, **kwargs)
        return SimpleNamespace(logits=output.logits - output.logits.mean(1, keepdim=True))

    model.forward = over_tokens
    assert ChunkedLoss.of(model, 4) is None
    del model.forward
    inject(model, AdapterConfig(num_experts=1, top_k=1, r=2, target_modules=["lm_head"]))
    assert ChunkedLoss.of(model, 4) is None, "an adapter on the head has a gradient of its own"


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_places_are_given_to_models_that_understand_them(name: str) -> None:
    """With the model's own weights: the logits of each row's own places, or else the answer is no."""
    model = tiny_model(name)
    ids_BS, places_BP, _ = rows(model.config.get_text_config().vocab_size)
    wanted_BPV = torch.take_along_dim(model(ids_BS).logits, places_BP.unsqueeze(-1), dim=1)
    answer = can_keep_logits(model)
    assert answer is KEEPS_LOGITS
    if answer:
        torch.testing.assert_close(model(ids_BS, logits_to_keep=places_BP).logits, wanted_BPV)


def test_a_model_that_gives_every_row_the_places_of_all_rows_is_not_given_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers did before it knew places of each row; one that fails is not either."""
    model = tiny_model("llama")

    def forward(input_ids: Tensor, logits_to_keep: Any = 0) -> Any:
        hidden_BSD = model.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=model.lm_head(hidden_BSD[:, logits_to_keep, :]))

    monkeypatch.setattr(model, "forward", forward)
    assert not can_keep_logits(model)
    monkeypatch.setattr(model, "forward", lambda input_ids, logits_to_keep=0: input_ids[:, -int(logits_to_keep) :])
    assert not can_keep_logits(model)

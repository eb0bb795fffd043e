"""Dropout whose mask belongs to a token, wherever and however often the token is computed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from dsmoelora import AdapterConfig
from dsmoelora.adapters.context import AdapterContext, BatchTokens
from dsmoelora.adapters.keyed import draws
from dsmoelora.adapters.keyed.draws import keyed_dropout, keyed_normal, settle_dropout
from dsmoelora.adapters.keyed.keys import token_keys
from dsmoelora.adapters.layer import RoutedLinear
from dsmoelora.adapters.regions import Region
from dsmoelora.adapters.shared_input import Siblings
from dsmoelora.errors import ConfigError

NUM_FEATURES = 256
CPU = torch.device("cpu")


def keep_mask(
    first_sequence: int = 0,
    seed: int = 0,
    layer_key: int = 7,
    probability: float = 0.5,
    num_sequences: int = 32,
    length: int = 64,
) -> Tensor:
    """(B, S, D) bool: what dropout keeps of a batch of full sequences."""
    mask_BS = torch.ones(num_sequences, length, dtype=torch.int64)
    ids_B = torch.arange(first_sequence, first_sequence + num_sequences)
    keys_T = token_keys(seed, ids_B, mask_BS).flatten()
    ones_TD = torch.ones(num_sequences * length, NUM_FEATURES)
    return keyed_dropout(ones_TD, keys_T, layer_key, probability).bool().view(num_sequences, length, NUM_FEATURES)


def assert_independent(one: Tensor, other: Tensor, probability: float) -> None:
    """Two masks agree on being kept as often as two coins do, within five standard deviations."""
    both = (one & other).double().mean().item()
    expected = (1 - probability) ** 2
    sigma = (expected * (1 - expected) / one.numel()) ** 0.5
    assert abs(both - expected) < 5 * sigma, f"kept by both: {both:.5f}, expected {expected:.5f} +- {sigma:.5f}"


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_keeps_the_right_share_in_every_direction(probability: float) -> None:
    kept_BSD = keep_mask(probability=probability)
    for dims in [(), (0, 1), (0, 2), (1, 2)]:  # overall, per feature, per position, per sequence
        share = kept_BSD.double().mean(dims) if dims else kept_BSD.double().mean()
        count = kept_BSD.numel() / share.numel()
        sigma = (probability * (1 - probability) / count) ** 0.5
        worst = (share - (1 - probability)).abs().max().item()
        assert worst < 5.5 * sigma, f"dims {dims}: off by {worst / sigma:.1f} standard deviations"


def test_kept_numbers_are_scaled_so_that_the_mean_stays() -> None:
    keys_T = token_keys(0, torch.tensor([3]), torch.ones(1, 8, dtype=torch.int64)).flatten()
    x_TD = torch.randn(8, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    dropped_TD = keyed_dropout(x_TD, keys_T, 7, 0.2)
    kept_TD = dropped_TD != 0
    torch.testing.assert_close(dropped_TD[kept_TD], x_TD[kept_TD] / 0.8)
    assert keyed_dropout(x_TD.bfloat16(), keys_T, 7, 0.2).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"layer_key": 8}, id="layer"),
        pytest.param({"layer_key": 7 + 2**20}, id="far-layer"),
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"seed": 2**40}, id="seed-above-32-bits"),
        pytest.param({"first_sequence": 32}, id="next-step"),
        pytest.param({"first_sequence": 2**33}, id="sequence-above-32-bits"),
    ],
)
def test_masks_of_other_layers_seeds_and_steps_have_nothing_in_common(other: dict[str, int]) -> None:
    assert_independent(keep_mask(), keep_mask(**other), 0.5)


def test_masks_of_neighbours_in_a_batch_have_nothing_in_common() -> None:
    kept_BSD = keep_mask()
    assert_independent(kept_BSD[1:], kept_BSD[:-1], 0.5)
    assert_independent(kept_BSD[:, 1:], kept_BSD[:, :-1], 0.5)
    assert_independent(kept_BSD[..., 1:], kept_BSD[..., :-1], 0.5)
    assert_independent(kept_BSD[:-1, 1:], kept_BSD[1:, :-1], 0.5)


def test_a_token_keeps_its_key_in_any_split_and_with_padding_on_either_side() -> None:
    lengths = [5, 3, 4, 1]
    ids_B = torch.tensor([100, 7, 8, 2**35])
    right_BS = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    left_BS = right_BS.flip(-1)
    alone = [token_keys(3, ids_B[i : i + 1], torch.ones(1, n, dtype=torch.int64))[0] for i, n in enumerate(lengths)]
    for mask_BS in (right_BS, left_BS):
        together_BS = token_keys(3, ids_B, mask_BS)
        assert together_BS.dtype is torch.int32
        for keys_S, mask_S, expected in zip(together_BS, mask_BS, alone, strict=True):
            assert torch.equal(keys_S[mask_S.bool()], expected)
    assert len(torch.cat(alone).unique()) == sum(lengths)


def test_a_token_of_a_packed_row_keeps_the_key_of_its_sample_and_place() -> None:
    apart = token_keys(5, torch.tensor([70, 71]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    sequences, positions = torch.tensor([[70, 70, 70, 71, 71]]), torch.tensor([[0, 1, 2, 0, 1]])
    packed = token_keys(5, sequences, torch.ones(1, 5, dtype=torch.int64), positions)
    assert packed.tolist() == [[*apart[0].tolist(), *apart[1, :2].tolist()]]
    assert packed.dtype is torch.int32 and len(set(packed.flatten().tolist())) == 5


def adapted_linear(probability: float) -> RoutedLinear:
    config = AdapterConfig(r=2, num_experts=3, top_k=2, lora_dropout=probability)
    layer = RoutedLinear(
        nn.Linear(NUM_FEATURES, 8).requires_grad_(False),
        config,
        "layer",
        AdapterContext(),
        range(config.num_experts),
        Siblings(),
    )
    with torch.no_grad():
        layer.experts.b.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def test_a_recomputed_layer_drops_the_same_numbers() -> None:
    layer = adapted_linear(0.5)
    layer.context.tokens = BatchTokens(token_keys(0, torch.tensor([1, 2]), torch.ones(2, 4, dtype=torch.int64)))
    x = torch.randn(2, 4, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    once = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.manual_seed(99)  # torch's own random state has no say in it
    again = torch.autograd.grad(
        checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False).square().sum(), parameters
    )
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


def test_a_layer_drops_the_input_of_the_experts_and_of_nothing_else() -> None:
    layer = adapted_linear(0.25)
    keys_BS = token_keys(0, torch.tensor([1]), torch.ones(1, 6, dtype=torch.int64))
    layer.context.tokens = BatchTokens(keys_BS)
    x = torch.randn(1, 6, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    gate_TE = layer.router(x[0])
    dropped_TD = keyed_dropout(x[0], keys_BS[0], layer.dropout_key, 0.25)
    expected = layer.base(x[0])
    for gate_T, a_DR, b_OR in zip(gate_TE.T, layer.experts.a, layer.experts.b, strict=True):
        expected = expected + 8.0 * gate_T[:, None] * (dropped_TD @ a_DR @ b_OR.T)  # s = alpha / R = 16 / 2
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
    layer.eval()
    assert not torch.allclose(layer(x)[0], expected, atol=1e-2), "evaluation drops nothing"


def noise(first_sequence: int = 0, layer_key: int = 7, num_sequences: int = 128, length: int = 64) -> Tensor:
    """(T, 20) noise of a batch of full sequences."""
    mask_BS = torch.ones(num_sequences, length, dtype=torch.int64)
    keys_T = token_keys(0, torch.arange(first_sequence, first_sequence + num_sequences), mask_BS).flatten()
    return keyed_normal(keys_T, layer_key, 20)


def test_noise_is_standard_normal() -> None:
    noise_TE = noise().double()
    sigma = noise_TE.numel() ** -0.5
    for moment, (expected, spread) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], start=1):
        assert abs(noise_TE.pow(moment).mean() - expected) < 5 * spread * sigma, f"moment {moment}"
    assert noise_TE.isfinite().all()
    assert noise_TE.mean(0).abs().max() < 5 * len(noise_TE) ** -0.5, "every expert's"
    correlation_EE = torch.corrcoef(noise_TE.T) - torch.eye(20)
    assert correlation_EE.abs().max() < 5 * len(noise_TE) ** -0.5, "experts are independent"


def test_noise_belongs_to_sequence_position_and_layer() -> None:
    whole = noise(num_sequences=8)
    assert torch.equal(noise(first_sequence=5, num_sequences=3), whole[5 * 64 :]), "however the batch is split"
    for other in (noise(first_sequence=8, num_sequences=8), noise(layer_key=8, num_sequences=8)):
        assert abs(torch.corrcoef(torch.stack((whole.flatten(), other.flatten())))[0, 1]) < 5 * whole.numel() ** -0.5


def dropped_and_gradient(num_tokens: int, num_features: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD, grad_TD = (torch.randn(num_tokens, num_features, generator=generator).to(dtype) for _ in range(2))
    keys_T = torch.randint(-(2**31), 2**31 - 1, (num_tokens,), dtype=torch.int32, generator=generator)
    dropped_TD = keyed_dropout(x_TD.requires_grad_(), keys_T, 123, 0.3)
    dropped_TD.backward(grad_TD)
    assert x_TD.grad is not None
    return [dropped_TD.detach(), x_TD.grad]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which torch.compile calls")
def test_compiled_dropout_gives_the_same_bits_from_one_graph_a_width() -> None:
    shapes = [(64, 96), (33, 96), (2, 96)]
    expected = [dropped_and_gradient(*shape, torch.float32) for shape in shapes]
    settle_dropout("on", 0.3, CPU, torch.float32)
    before = counters["stats"]["unique_graphs"]
    try:
        for shape, tensors in zip(shapes, expected, strict=True):
            for found, wanted in zip(dropped_and_gradient(*shape, torch.float32), tensors, strict=True):
                assert torch.equal(found, wanted), shape
        assert before > 0 and counters["stats"]["unique_graphs"] == before + 1, "one for each width"
    finally:
        settle_dropout("off", 0.3, CPU, torch.float32)


def test_without_a_compiler_dropout_stays_as_it_is_or_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("found no Triton\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    vars(draws._dropped).pop("_compiled", None)
    accelerator = torch.device("meta")
    with pytest.raises(
        ConfigError, match=r"train.compile is 'on', but it must be .* found no Triton\).* set it to auto"
    ):
        settle_dropout("on", 0.3, accelerator, torch.float32)
    settle_dropout("auto", 0.3, accelerator, torch.float32)
    assert "torch.compile does not work here: RuntimeError: found no Triton" in caplog.text
    assert all(bool(tensor.any()) for tensor in dropped_and_gradient(8, 16, torch.float32))


@pytest.mark.parametrize(
    ("choice", "probability", "device"), [("off", 0.3, "meta"), ("auto", 0.3, "cpu"), ("on", 0.0, "cpu")]
)
def test_nothing_is_compiled_where_nothing_is_won(
    choice: Any, probability: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(Region, "use_compiled", lambda region, example: tried.append(region))
    settle_dropout(choice, probability, torch.device(device), torch.float32)
    assert not tried
    settle_dropout("on", 0.3, torch.device("cpu"), torch.float32)
    assert tried == [draws._dropped], "this is how it would be compiled"

"""The rule of Flat-LoRA's noise on pieces of a weight: how large, how random, how alike on every cut."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsmoelora import AdapterConfig, inject
from dsmoelora.errors import ConfigError
from dsmoelora.optim import OptimConfig, build_optimizer
from dsmoelora.optim.flat_noise import NoisyWeight, ramp

NUM_OUT, NUM_IN = 48, 4096
LINEAR, CONV = NoisyWeight("layer", (NUM_OUT, NUM_IN), True), NoisyWeight("layer", (NUM_IN, NUM_OUT), False)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def noise(weight: NoisyWeight, std_O: Tensor, *, seed: int = 0, step: int = 1) -> Tensor:
    """(O, D): alone, for the weight is 0."""
    piece = torch.zeros(NUM_OUT * NUM_IN)
    weight.add_noise(piece, torch.zeros(NUM_OUT * NUM_IN), 0, std_O, seed, step)
    return piece.view(NUM_OUT, NUM_IN) if weight.has_output_rows else piece.view(NUM_IN, NUM_OUT).t()


@pytest.mark.parametrize("weight", [LINEAR, CONV])
def test_each_row_has_its_variance_and_numbers_of_a_normal_distribution(weight: NoisyWeight) -> None:
    std_O = torch.linspace(0.1, 3.0, NUM_OUT)
    drawn_OD = noise(weight, std_O) / std_O[:, None]
    # the standard error of a variance of D normal numbers is sqrt(2 / D), that of their mean sqrt(1 / D)
    assert (drawn_OD.var(1) - 1).abs().max() < 4.5 * math.sqrt(2 / NUM_IN)
    assert drawn_OD.mean(1).abs().max() < 4.5 / math.sqrt(NUM_IN)
    all_N = drawn_OD.flatten()
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (all_N.abs() < deviations).float().mean() == pytest.approx(share, abs=3 / math.sqrt(all_N.numel()))


@pytest.mark.parametrize(
    "other",
    [
        lambda std_O: noise(LINEAR, std_O, step=2),
        lambda std_O: noise(LINEAR, std_O, seed=1),
        lambda std_O: noise(NoisyWeight("another", (NUM_OUT, NUM_IN), True), std_O),
        lambda std_O: noise(LINEAR, std_O).roll(1, 0),
        lambda std_O: noise(LINEAR, std_O).roll(1, 1),
    ],
    ids=["step", "seed", "layer", "row", "column"],
)
def test_noise_of_another_place_is_not_correlated(other: object) -> None:
    std_O = torch.ones(NUM_OUT)
    products = noise(LINEAR, std_O) * other(std_O)  # type: ignore[operator]
    assert products.mean().abs() < 4.5 / math.sqrt(NUM_OUT * NUM_IN)


@pytest.mark.parametrize("weight", [LINEAR, CONV])
@pytest.mark.parametrize("cuts", [[], [77_777], [1, 4095, 4097, 150_000, 196_000]])
@pytest.mark.parametrize("padding", [0, 11])
def test_pieces_of_any_cut_are_the_whole(weight: NoisyWeight, cuts: list[int], padding: int) -> None:
    """Squares by the dense formula, noise to the last bit, padding as it was."""
    clean, a_DK, b_OK, std_O = (
        draw(NUM_OUT * NUM_IN),
        draw(NUM_IN, 2),
        draw(NUM_OUT, 2),
        torch.linspace(0.1, 1.0, NUM_OUT),
    )
    stored = clean.view(weight.shape) if weight.has_output_rows else clean.view(weight.shape).t()
    expected_O = (stored + b_OK @ a_DK.t()).double().square().sum(1)
    whole = clean.clone()
    weight.add_noise(whole, clean, 0, std_O, 0, 1)

    squares_O, found = torch.zeros(NUM_OUT), []
    edges = [0, *cuts, NUM_OUT * NUM_IN]
    for start, stop in pairwise(edges):
        piece = torch.cat([clean[start:stop], torch.full((padding if stop == NUM_OUT * NUM_IN else 0,), 7.0)])
        squares_O += weight.squares(piece, start, b_OK, a_DK)
        noisy = piece.clone()
        weight.add_noise(noisy, piece, start, std_O, 0, 1)
        assert (noisy[stop - start :] == 7.0).all()
        found.append(noisy[: stop - start])
    torch.testing.assert_close(squares_O.double(), expected_O, rtol=1e-5, atol=0)
    assert torch.equal(torch.cat(found), whole)


def test_the_ramp_is_half_a_cosine() -> None:
    assert [ramp(step, 8) for step in (0, 4, 8)] == pytest.approx([0, 0.5, 1])
    assert ramp(2, 8) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_a_training_loop_of_ones_own_is_told_that_it_has_no_noise() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject(model, AdapterConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"optim\.flat_noise.*0\.05.*launch/train\.py"):
        build_optimizer(model, OptimConfig(flat_noise=0.05))

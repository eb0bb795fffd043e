"""Cosines between experts: those of the updates themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsmoelora.adapters.experts.similarity import cosine_matrix, largest_and_mean


def factors(num_experts: int = 5, d: int = 7, o: int = 9, r: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_experts, d, r), (num_experts, o, r), (num_experts, r, r))
    a, b, m = (torch.randn(shape, generator=generator) for shape in shapes)
    return a, b, m


@pytest.mark.parametrize("with_mixer", [False, True])
def test_cosines_are_those_of_the_updates(with_mixer: bool) -> None:
    a, b, m = factors()
    mixer = m if with_mixer else torch.eye(3).expand(5, 3, 3)
    updates = (a.double() @ mixer.double() @ b.double().mT).flatten(1)
    expected = torch.nn.functional.cosine_similarity(updates.unsqueeze(0), updates.unsqueeze(1), dim=-1)
    found = cosine_matrix(a, b, m if with_mixer else None)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    others = expected - 3 * torch.eye(5)
    *largest, mean = largest_and_mean(found).tolist()
    assert largest == pytest.approx(others.amax(-1).tolist(), rel=1e-5)
    assert mean == pytest.approx(float((expected.sum() - 5) / 20), rel=1e-4)


def test_an_update_of_zero_has_no_cosine() -> None:
    a, b, _ = factors()
    b[1:4] = 0
    *largest, mean = largest_and_mean(cosine_matrix(a, b)).tolist()
    assert [math.isnan(one) for one in largest] == [False, True, True, True, False]
    assert mean == pytest.approx(largest[0]) == pytest.approx(largest[4])
    assert largest_and_mean(cosine_matrix(a, torch.zeros_like(b))).isnan().all()

"""Weights, activations and gradients at the worst moment of a pass: by hand."""

from __future__ import annotations

import pytest

from dsmoelora.planner.gathering import Gathered
from dsmoelora.planner.worst_moment import Moment, worst_moment


@pytest.mark.parametrize(
    ("forward", "backward", "kept", "gradients", "expected"),
    [
        # nothing is gathered: activations go as gradients come, so one of the two is whole
        ([], [], 10, 4, Moment(0, 10, 0)),
        ([], [], 4, 10, Moment(0, 0, 10)),
        # 2 bytes a number; at the second of four modules 18 bytes of weights beside half of what is kept, 4
        ([5, 9, 1, 1], [2, 2], 8, 0, Moment(18, 4, 0)),
        # the same with more kept: 2 + 40 at the end of the forward pass, 4 + 40 where the backward pass begins
        ([5, 9, 1, 1], [2, 2], 40, 0, Moment(4, 40, 0)),
        # at the second of two modules of the backward pass half of both is there
        ([1, 1], [1, 50], 8, 6, Moment(100, 4, 3)),
    ],
)
def test_worst_moment(forward: list[int], backward: list[int], kept: float, gradients: float, expected: Moment) -> None:
    gathered = Gathered(there={False: forward, True: backward})
    assert worst_moment(gathered, 2, kept, gradients) == expected

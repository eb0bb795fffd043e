"""Buckets by hand."""

from __future__ import annotations

import pytest

from dsmoelora.parallel.buckets import in_buckets


@pytest.mark.parametrize(
    ("numels", "room", "buckets"),
    [
        ([], 4, []),
        ([1, 2, 1, 3, 1], 4, [[1, 2, 1], [3, 1]]),
        ([2, 3, 2], 4, [[2], [3], [2]]),
        ([9, 1, 1, 9, 4], 4, [[9], [1, 1], [9], [4]]),  # what has no room anywhere is alone
        ([1, 1], 0, [[1], [1]]),
    ],
)
def test_neighbours_share_a_bucket_as_far_as_there_is_room(
    numels: list[int], room: int, buckets: list[list[int]]
) -> None:
    assert in_buckets(numels, lambda numel: numel, room) == buckets

"""What is refused: states that make no checkpoint, and checkpoints of another run."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoelora.adapters import Factor
from dsmoelora.checkpoint import training_state
from dsmoelora.checkpoint.training_state import ShardState, load_checkpoint, save_checkpoint
from dsmoelora.errors import CheckpointError, UserError
from dsmoelora.optim.rows import Segment, Trainable
from tests.checkpoints import ADAM, FILLING, PARAMETERS, assert_untouched, load, save, saved_run
from tests.shardings import per_parameter, random_numbers

# ---- what is refused before anything is written


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused_and_named(tmp_path: Path, bad: float) -> None:
    numbers = saved_run(tmp_path)
    name = PARAMETERS[1].name
    broken = random_numbers(PARAMETERS, ADAM, seed=3)
    broken["exp_avg_sq"][name][-1] = bad
    outcomes = save(tmp_path, 150, per_parameter(PARAMETERS, 2), broken, keep=1)
    assert sum(type(outcome) is CheckpointError for outcome in outcomes) == 1
    for outcome in outcomes:
        assert isinstance(outcome, UserError)
        assert f"`exp_avg_sq` of parameter {name}" in str(outcome)
    assert_untouched(tmp_path, numbers)


def whole_shard(tensors: dict[str, torch.Tensor], **changes: Any) -> ShardState:
    """A shard of the (2, 3, 2) factor `proj.experts.a`, with changes to its only segment."""
    segment = Segment(Trainable("proj.experts.a", "proj", Factor.A, (2, 3, 2)), 0, 12, 0)
    return ShardState([replace(segment, **changes)], tensors)


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ([], "nothing to save"),
        ([ShardState([], {"value": torch.zeros(4)})], "nothing to save"),
        ([whole_shard({})], "proj.experts.a comes without tensors"),
        ([whole_shard({"value": torch.zeros(0)})], r"`value` of parameter proj.experts.a has shape \(0,\)"),
        ([whole_shard({"value": torch.zeros(11)})], r"`value` of parameter proj.experts.a has shape \(11,\)"),
        ([whole_shard({"value": torch.zeros(24)[::2]})], "needs a contiguous one"),
        ([whole_shard({"value": torch.zeros(12, dtype=torch.complex64)})], "`value` has dtype torch.complex64"),
        ([whole_shard({"value": torch.zeros(12)}, stop=10)], "no rank holds elements 10 to 12 of proj.experts.a"),
        ([whole_shard({"value": torch.zeros(12)}, start=1)], "no rank holds elements 0 to 1 of proj.experts.a"),
        (
            [whole_shard({"value": torch.zeros(12)}), whole_shard({"exp_avg": torch.zeros(12)})],
            "Parts of proj.experts.a have different tensors",
        ),
        (
            [
                whole_shard({"value": torch.zeros(12)}),
                whole_shard({"value": torch.zeros(12)}, of=Trainable("proj.experts.a", "proj", Factor.A, (2, 2, 3))),
            ],
            "proj.experts.a is described in two ways",
        ),
        (
            [whole_shard({"value": torch.zeros(12)}, of=Trainable("proj.experts.a", "proj", Factor.A, (2, 0, 2)))],
            "proj.experts.a is empty",
        ),
    ],
)
def test_shards_that_make_no_checkpoint_are_refused(tmp_path: Path, shards: list[ShardState], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path / "run", 1, shards, {}, keep=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": {"b": [0, torch.zeros(1)]}}, r"state\.a\.b\[1\] is a Tensor"),
        ({"a": {1: 2}}, r"state\.a has the key 1"),
        ({"a": {2}}, r"state\.a is a set"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        save_checkpoint(tmp_path, 1, [whole_shard({"value": torch.zeros(12)})], state, keep=1)


# ---- a checkpoint of another run


def reshaped(num_experts: int = 4, rank_factor: int = 1, features_factor: int = 1) -> list[Trainable]:
    found = []
    for each in PARAMETERS:
        shape = (num_experts, each.shape[1] * features_factor, *(n * rank_factor for n in each.shape[2:]))
        found.append(replace(each, shape=shape))
    return found


assert PARAMETERS[-1].factor is Factor.ROUTER
WITH_MIXER = [*PARAMETERS, Trainable(f"{PARAMETERS[0].layer}.m", PARAMETERS[0].layer, Factor.M, (4, 2, 2))]
OF_ANOTHER_LAYER = [*PARAMETERS, replace(PARAMETERS[0], name="new.a", layer="new")]


@pytest.mark.parametrize(
    ("parameters", "names", "reason"),
    [
        (reshaped(num_experts=8), ADAM, r"Set adapter.num_experts = 4 \(now 8\) as in the run that saved it"),
        (reshaped(rank_factor=2), ADAM, r"Set adapter.r = (\d) \(now \d\)"),
        (reshaped(features_factor=2), ADAM, r"Set model.path \(in-features\) = \d+ \(now \d+\)"),
        (PARAMETERS[:-1], ADAM, rf"holds {PARAMETERS[-1].name}, which this recipe does not train.*Set adapter.router,"),
        (WITH_MIXER, ADAM, r"has no values for .*\.m; .*Set adapter.expert as in"),
        (OF_ANOTHER_LAYER, ADAM, "has no values for new.a.*Set model.path, adapter.target_modules, "),
        (PARAMETERS, ["value"], "holds exp_avg, exp_avg_sq, value .* keeps value. Set optim.name"),
        (PARAMETERS, ["value", "momentum_buffer"], "keeps momentum_buffer, value. Set optim.name"),
        (PARAMETERS, [*ADAM, "max_exp_avg_sq"], "keeps exp_avg, exp_avg_sq, max_exp_avg_sq, value. Set optim.name"),
    ],
)
def test_checkpoint_of_another_run_is_refused_on_every_rank_and_nothing_is_filled(
    tmp_path: Path, parameters: list[Trainable], names: list[str], reason: str
) -> None:
    saved_run(tmp_path, (50,))
    outcomes, shards = load(tmp_path / "checkpoint-50", per_parameter(parameters, 3), names)
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointError)
        assert re.search(reason, str(outcome))
    for shard in (shard for each in shards for shard in each):
        assert all(bool((tensor == FILLING).all()) for tensor in shard.tensors.values())


def test_other_dtype_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, [whole_shard({"value": torch.ones(12)})], {}, keep=1)
    with pytest.raises(CheckpointError, match=r"holds `value` of proj\.experts\.a as F32, but here it is BF16"):
        load_checkpoint(folder, [whole_shard({"value": torch.ones(12).bfloat16()})])


def test_checkpoint_with_a_gap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "check_savable", lambda ranks: None)
    folder = save_checkpoint(tmp_path, 1, [whole_shard({"value": torch.ones(12)}, stop=8)], {}, keep=1)
    with pytest.raises(CheckpointError, match=r"does not hold elements 8 to 12 of proj\.experts\.a"):
        load_checkpoint(folder, [whole_shard({"value": torch.ones(12)})])

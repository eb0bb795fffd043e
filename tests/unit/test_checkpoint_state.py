"""Checkpoints of the training state: any layout in, any layout out, and a load reads what it needs."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsmoelora.adapters import Factor
from dsmoelora.checkpoint.index import faults_of_content, read_index
from dsmoelora.checkpoint.rank_file import read_shards
from dsmoelora.checkpoint.table import Ranges
from dsmoelora.checkpoint.training_state import ShardState, checkpoint_bytes, load_checkpoint, save_checkpoint
from dsmoelora.optim.rows import Segment, Trainable
from tests.checkpoints import ADAM, FILLING, PARAMETERS, assert_equal_to_the_bit, load, names_below, on_ranks, save
from tests.shardings import (
    any_layout,
    blank_shards,
    over_experts,
    per_parameter,
    random_numbers,
    replicated,
    some_parameters,
)

# ---- what is saved comes back, whatever the layouts


@pytest.mark.parametrize("seed", range(60))
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    parameters = some_parameters(rng, num_experts=rng.choice([1, 4, 6]), num_layers=rng.randint(1, 3))
    names = rng.choice([["value"], ["value", "momentum_buffer"], ADAM])
    numbers = random_numbers(parameters, names, seed)
    before = any_layout(parameters, rng.randint(1, 6), rng)
    after = any_layout(parameters, rng.randint(1, 6), rng)
    state = {"seed": seed, "lr": rng.random()}

    folder = save(tmp_path, 10, before, numbers, state=state)[0]
    outcomes, shards = load(folder, after, names)

    assert outcomes == [state] * len(after)
    assert_equal_to_the_bit(shards, after, numbers)
    elements = sum(math.prod(each.shape) for each in parameters)
    assert stored_elements(folder) == elements * len(names), "padding or replicas were written"


def stored_elements(folder: Path) -> int:
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def test_expert_placements_load_each_other(tmp_path: Path) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, seed=1)
    layouts = [over_experts(PARAMETERS, 4, ep_size=ep_size) for ep_size in (1, 2, 4)]
    for step, before in enumerate(layouts):
        folder = save(tmp_path, step, before, numbers)[0]
        for after in layouts:
            assert_equal_to_the_bit(load(folder, after, ADAM)[1], after, numbers)


def test_replicas_are_written_by_the_lowest_rank_alone(tmp_path: Path) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, seed=1)
    folder = save(tmp_path, 1, replicated(PARAMETERS, 3), numbers)[0]
    assert names_below(folder) == ["index.json", "rank-00000.safetensors"]


def test_files_are_plain_safetensors_with_the_named_tensors_and_the_checksums_of_the_index(tmp_path: Path) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, seed=1)
    layout = replicated(PARAMETERS, 1)
    folder = save(tmp_path, 1, layout, numbers)[0]
    tensors = load_file(folder / "rank-00000.safetensors")
    for k, parameter in enumerate(PARAMETERS):
        for name in ADAM:
            assert torch.equal(tensors[f"shard{k}.{name}"], numbers[name][parameter.name])
    (entry,) = json.loads((folder / "index.json").read_text())["files"]
    content = (folder / entry["name"]).read_bytes()
    assert entry["blocks"] == [hashlib.sha256(content).hexdigest()]
    assert entry["bytes"] == len(content)


def test_every_rank_checks_an_equal_part_of_a_large_file(tmp_path: Path) -> None:
    """So that nobody reads much more than its share, however few ranks wrote the files."""
    large = Trainable("proj.experts.a", "proj", Factor.A, (2, 1 << 20, 3))
    folder = save(tmp_path, 1, replicated([large], 1), random_numbers([large], ["value"], seed=1))[0]
    index = read_index(folder)
    (file,) = index.files
    content = bytearray((folder / file.name).read_bytes())
    blocks = [content[start : start + (8 << 20)] for start in range(0, len(content), 8 << 20)]
    assert file.blocks == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert len(blocks) == 4
    content[(8 << 20) + 5] ^= 1
    (folder / file.name).write_bytes(content)
    found = [faults_of_content(folder, index.files, part, 3) for part in range(3)]
    assert [len(faults) for faults in found] == [0, 1, 0], "block 1 belongs to the middle third alone"
    assert "bytes 8388608 to 16777216" in found[1][0]


def test_other_dtypes_whole_parameters_and_chunks_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoelora.checkpoint.rank_file._CHUNK_ELEMENTS", 7)
    parameter = Trainable("proj.experts.a", "proj", Factor.A, (2, 5, 3))
    tensors = {
        "value": torch.randn(2, 5, 3, requires_grad=True),
        "half": torch.randn(2, 5, 3).bfloat16(),
        "count": torch.arange(30),
    }
    segments = [Segment(parameter, 0, 30, 0)]
    folder = save_checkpoint(tmp_path, 1, [ShardState(segments, tensors)], {}, keep=1)
    loaded = {name: torch.zeros_like(tensor, requires_grad=tensor.requires_grad) for name, tensor in tensors.items()}
    load_checkpoint(folder, [ShardState(segments, loaded)])
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    rng = random.Random(5)
    floats = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.inf, *(rng.uniform(-1, 1) for _ in range(200))]
    state = {
        "floats": floats,
        "big": 2**80,
        "text": "é\n\u2028",
        "none": None,
        "nested": {"on": True, "list": [[], {}]},
    }
    folder = save(tmp_path, 1, per_parameter(PARAMETERS, 2), random_numbers(PARAMETERS, ["value"], 0), state=state)[0]
    back = load(folder, per_parameter(PARAMETERS, 1), ["value"])[0][0]
    assert back == state
    assert [value.hex() for value in back["floats"]] == [value.hex() for value in floats]  # -0.0 too
    assert type(back["nested"]["on"]) is bool


def checkpoint_bytes_of(shards: list[list[ShardState]]) -> Callable[[int], int]:
    return lambda rank: checkpoint_bytes(shards[rank])


def test_checkpoint_bytes_counts_every_element_once() -> None:
    elements = sum(math.prod(each.shape) for each in PARAMETERS)
    for layout in (per_parameter(PARAMETERS, 3), replicated(PARAMETERS, 2)):
        shards = [blank_shards(segments, ADAM, 0.0) for segments in layout]
        outcomes = on_ranks(len(layout), checkpoint_bytes_of(shards))
        assert outcomes == [elements * 3 * 4] * len(layout)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_agree_with_a_set_of_numbers(seed: int) -> None:
    rng = random.Random(seed)
    ranges, members = Ranges(), set()
    for _ in range(30):
        start = rng.randrange(40)
        stop = start + rng.randint(1, 8)
        gaps = ranges.gaps(start, stop)
        assert [n for low, high in gaps for n in range(low, high)] == [
            n for n in range(start, stop) if n not in members
        ]
        assert all(low < high for low, high in gaps)
        if rng.random() < 0.5:
            ranges.add(start, stop)
            members |= set(range(start, stop))


# ---- a load reads what it needs


class CountingOpen:
    """Stands in for safetensors' `safe_open` and counts the elements that are taken out of each file."""

    def __init__(self, taken: dict[str, int]) -> None:
        self.taken = taken

    def __call__(self, path: Path, framework: str) -> CountingOpen:
        self._name, self._opened = path.name, safe_open(path, framework=framework)
        return self

    def __enter__(self) -> CountingOpen:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def get_slice(self, name: str) -> CountingOpen:
        self._slice = self._opened.get_slice(name)
        return self

    def __getitem__(self, place: slice) -> torch.Tensor:
        found = self._slice[place]
        self.taken[self._name] = self.taken.get(self._name, 0) + found.numel()
        return found


def test_every_rank_takes_its_own_elements_out_of_the_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, seed=1)
    folder = save(tmp_path, 1, per_parameter(PARAMETERS, 4), numbers)[0]
    index = read_index(folder)
    taken: dict[str, int] = {}
    monkeypatch.setattr("dsmoelora.checkpoint.rank_file.safe_open", CountingOpen(taken))
    for segments in over_experts(PARAMETERS, 6, ep_size=2):
        taken.clear()
        read_shards(folder, index.files, index.table, blank_shards(segments, ADAM, FILLING))
        assert sum(taken.values()) == 3 * sum(segment.stop - segment.start for each in segments for segment in each)


def test_files_without_wanted_elements_are_not_opened(tmp_path: Path) -> None:
    numbers = random_numbers(PARAMETERS, ADAM, seed=1)
    layout = per_parameter(PARAMETERS, 3)
    folder = save(tmp_path, 1, layout, numbers)[0]
    index = read_index(folder)
    for name in ("rank-00000.safetensors", "rank-00002.safetensors"):
        (folder / name).unlink()
    shards = blank_shards(layout[1], ADAM, FILLING)
    read_shards(folder, index.files, index.table, shards)
    assert_equal_to_the_bit([shards], layout[1:2], numbers)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's memory maps")
def test_pages_beside_the_wanted_elements_are_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = Trainable("proj.experts.a", "proj", Factor.A, (8, 1 << 18, 4))  # 32 MiB
    whole = Segment(parameter, 0, 1 << 23, 0)
    folder = save_checkpoint(tmp_path, 1, [ShardState([whole], {"value": torch.ones(1 << 23)})], {}, keep=1)
    mapped: list[int] = []

    class Measuring(CountingOpen):
        def __exit__(self, *error: Any) -> None:
            mapped.append(resident_bytes(folder / "rank-00000.safetensors"))
            super().__exit__(*error)

    monkeypatch.setattr("dsmoelora.checkpoint.rank_file.safe_open", Measuring({}))
    index = read_index(folder)
    part = Segment(parameter, 5_000_000, 5_010_000, 0)
    for segment, low, high in ((part, 40_000, 6 << 20), (whole, 30 << 20, 33 << 20)):
        shard = ShardState([segment], {"value": torch.zeros(segment.stop - segment.start)})
        read_shards(folder, index.files, index.table, [shard])
        assert bool((shard.tensors["value"] == 1).all())
        assert low <= mapped.pop() <= high


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that this process has touched (the kernel maps neighbours along, 2 MiB at most)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0]:
            inside = fields[-1] == str(path)
        elif inside and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total

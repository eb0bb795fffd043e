"""A plan of launch/plan.py."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.bad_input.bench import Bench, Case


def no_gpus(bench: Bench) -> list[str]:
    return bench.plan("--gpus", 0)


def unknown_gpu(bench: Bench) -> list[str]:
    return bench.plan("--gpu", "h1000")


def a_file_that_is_no_gpu(bench: Bench) -> list[str]:
    return bench.plan("--gpu", bench.folder / "recipe.yaml")


def negative_price(bench: Bench) -> list[str]:
    return bench.plan("--price", -1)


def several_numbers_of_gpus(bench: Bench) -> list[str]:
    return bench.plan("--gpus", 1, 2)


def search_and_fit(bench: Bench) -> list[str]:
    return bench.plan("--search", "--fit")


def picture_of_a_search(bench: Bench) -> list[str]:
    return bench.plan("--search", "--out", "plan.png")


def picture_in_no_format(bench: Bench) -> list[str]:
    return bench.plan("--out", "plan.gif")


def dwarf(bench: Bench) -> Path:
    """A device without room for anything."""
    known = Path(__file__).parents[2] / "dsmoelora" / "planner" / "devices.yaml"
    device = yaml.safe_load(known.read_text())["l40s"]
    path = bench.folder / "dwarf.yaml"
    path.write_text(yaml.safe_dump({"dwarf": device | {"memory_gib": 1.0001}}))
    return path


def search_on_dwarfs(bench: Bench) -> list[str]:
    return bench.plan("--gpu", dwarf(bench), "--search")


def fit_on_a_dwarf(bench: Bench) -> list[str]:
    return bench.plan("--gpu", dwarf(bench), "--fit")


def unknown_device_of_a_run(bench: Bench) -> list[str]:
    return bench.train("--train.device", "h1000")


def too_many_gpus(bench: Bench) -> list[str]:
    return bench.plan("--gpus", 3, "--train.batch_size", 4, "--train.micro_batch_size", 1)


def search_for_no_model(bench: Bench) -> list[str]:
    return bench.plan("--model.path", "./nowhere", "--search")


EARLY: dict[str, Case] = {
    "a plan for no GPU": no_gpus,
    "a plan for a GPU that nobody has described": unknown_gpu,
    "a plan for a GPU of a file that describes none": a_file_that_is_no_gpu,
    "a price below nothing": negative_price,
    "numbers of GPUs to plan for, but no search": several_numbers_of_gpus,
    "a search that also shall fit one choice": search_and_fit,
    "a picture of a search": picture_of_a_search,
    "a picture of a plan in no known format": picture_in_no_format,
    "a search on devices that are too small": search_on_dwarfs,
    "a device on which not even one row fits": fit_on_a_dwarf,
    "a run on a device that nobody has described": unknown_device_of_a_run,
    "a search for a model that is not there": search_for_no_model,
    "a plan for GPUs that do not divide the batch": too_many_gpus,
}

"""A plan of launch/plan.py."""

from __future__ import annotations

from tests.bad_input.bench import Bench, Case


def no_gpus(bench: Bench) -> list[str]:
    return bench.plan("--gpus", 0)


def unknown_gpu(bench: Bench) -> list[str]:
    return bench.plan("--gpu", "h1000")


def a_file_that_is_no_gpu(bench: Bench) -> list[str]:
    return bench.plan("--gpu", bench.folder / "recipe.yaml")


def negative_price(bench: Bench) -> list[str]:
    return bench.plan("--price", -1)


def unknown_device_of_a_run(bench: Bench) -> list[str]:
    return bench.train("--train.device", "h1000")


def too_many_gpus(bench: Bench) -> list[str]:
    return bench.plan("--gpus", 3, "--train.batch_size", 4, "--train.micro_batch_size", 1)


EARLY: dict[str, Case] = {
    "a plan for no GPU": no_gpus,
    "a plan for a GPU that nobody has described": unknown_gpu,
    "a plan for a GPU of a file that describes none": a_file_that_is_no_gpu,
    "a price below nothing": negative_price,
    "a run on a device that nobody has described": unknown_device_of_a_run,
    "a plan for GPUs that do not divide the batch": too_many_gpus,
}

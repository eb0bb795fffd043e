"""One rank of a row: what it holds, what it sends, and how long its steps take.

What is held is counted by torch: the tensors that are there between two steps, found by Python's collector, and what
its allocator gives out and takes back in a step. That is what `torch.cuda.max_memory_allocated` counts on a GPU, and
what the planner's formulas speak of. Beside it stands what the process takes more than before the model was made, which
the system counts: libraries that are loaded late, buffers of gloo and of kernels, and what malloc keeps are in it too.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.planner.rows import ROWS, Row
from dsmoelora.callbacks.memory import PeakMemory, resident_bytes
from dsmoelora.data import MicroBatch
from dsmoelora.doctor.calibrate import calibrate
from dsmoelora.engine import Engine
from dsmoelora.model import load_model, random_model
from dsmoelora.model.loading import load_model_config
from dsmoelora.parallel import comm
from dsmoelora.parallel.zero_config import merge_config
from dsmoelora.planner.traffic import sent_bytes
from tests.memory_of_rank import allocated_peak, bytes_of_tensors
from tests.traffic_of_rank import Recorder, recorded_step

NUM_WARM_UP = 2  # in which ZeRO-3 learns the order of the modules
NUM_TIMED = 5


def worker(name: str, folder: str, kind: str, file: str) -> None:
    """Measure a row; rank 0 writes what it has found, as JSON.

    Args:
        name: of `ROWS`
        folder: of the model
        kind: `held`, memory and bytes, or `time`
        file: that is written
    """
    row = ROWS[name]
    found = {"held": held, "time": timed}[kind](row, Path(folder))
    if comm.rank() == 0:
        Path(file).write_text(json.dumps(found))


def held(row: Row, folder: Path) -> dict[str, Any]:
    """Bytes of this rank between two steps, and at most; of its process; and what it sends in a step."""
    before, memory = resident_bytes(), PeakMemory()
    engine, batches = _engine(row, folder), _batches(row, folder)
    memory.start()  # the planner has the phases of a run apart, and this is not the loading
    for _ in range(NUM_WARM_UP):
        engine.train_step(batches)
    memory.stop()
    resident = round(memory.gib() * 2**30) - before
    at_rest = bytes_of_tensors()
    steps: list[Recorder] = []
    peak = at_rest + allocated_peak(lambda: steps.append(recorded_step(engine, batches)))
    sent = steps[-1]
    num_bytes = sum(sent_bytes(cast(Any, op), whole, size) for (_, op, size), whole in sent.num_bytes.items())
    return {
        "at_rest": at_rest,
        "peak": peak,
        "resident": resident,
        "messages": sum(sent.messages.values()),
        "sent": num_bytes,
    }


def timed(row: Row, folder: Path) -> dict[str, Any]:
    """What the machine reaches with these ranks, and seconds of a step: of the clock, and of this rank's core."""
    device = calibrate()
    engine, batches = _engine(row, folder), _batches(row, folder)
    wall, core = [], []
    for _ in range(NUM_WARM_UP + NUM_TIMED):
        begin = (time.perf_counter(), time.process_time())
        engine.train_step(batches)
        wall.append(time.perf_counter() - begin[0])
        core.append(time.process_time() - begin[1])
    seconds = max(comm.all_gather_objects(statistics.median(wall[NUM_WARM_UP:])))
    return {"device": device, "seconds": seconds, "core_seconds": statistics.median(core[NUM_WARM_UP:])}


def _engine(row: Row, folder: Path) -> Engine:
    recipe = row.recipe(folder)
    config = merge_config(recipe, row.deepspeed(), comm.world_size())
    if recipe.model.quantize == "none":
        model = random_model(load_model_config(recipe.model), recipe.model, config)
    else:
        model = load_model(recipe.model, config, recipe.adapter)
    return Engine(recipe, row.deepspeed(), model, cast(Any, None))  # no text, so no tokenizer


def _batches(row: Row, folder: Path) -> list[MicroBatch]:
    """Full rows of random tokens, all targets; one is padded, or each is packed of two samples: there is a mask."""
    recipe = row.recipe(folder)
    num_rows, length = recipe.train.micro_batch_size, recipe.data.max_length
    vocabulary = load_model_config(recipe.model).vocab_size
    random = torch.Generator().manual_seed(comm.rank())
    total = recipe.train.batch_size * length
    found = []
    for _ in range(row.micro_batches):
        ids_BS = torch.randint(vocabulary, (num_rows, length), generator=random)
        mask_BS, sequences, places_BS = torch.ones_like(ids_BS), torch.arange(num_rows), None
        if recipe.data.packing:
            places_BS = (torch.arange(length) % (length // 2)).expand(num_rows, -1)
            sequences = 2 * sequences.unsqueeze(-1) + (torch.arange(length) >= length // 2)
        else:
            mask_BS[0, -1] = 0
        found.append(MicroBatch(ids_BS, mask_BS, ids_BS, sequences, total, total, places_BS))
    return found

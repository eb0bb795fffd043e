"""Trains cells, many in one process: base, rows and hidden states are loaded once."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.study.cells import Cell, Results, Task
from benchmarks.study.stages import Stage, stages
from benchmarks.study.state import State, alone, forget_states, has_state
from benchmarks.study.upper import HiddenStates, cached, hidden_below, keep_upper, layers_of
from dsmoelora.adapters import adapter_context, eject, inject
from dsmoelora.adapters.context import BatchTokens
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import router_buffers, write_adapter
from dsmoelora.adapters.routing import RoutingLog
from dsmoelora.adapters.starts.gradient import gradient_start
from dsmoelora.config import DTYPES, AdapterConfig, DataSource, ModelConfig
from dsmoelora.data import InstructionDataset, MicroBatch, load_instructions
from dsmoelora.data.loader import Row, collate
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import load_tokenizer
from dsmoelora.optim import ShardOptimizer, build_optimizer, build_schedule, trainables
from dsmoelora.optim.rows import adapter_tensors
from dsmoelora.seeds import derive_seed

_PARTS = {"sixth": 6, "third": 3, "half": 2}
_EVAL_BATCH = 16


class Bench:
    """A task, ready to train on; one for each process.

    Args:
        task: which

    Attributes:
        eval_rows: numbers of the held-out rows that are looked at
        tokens_N: targets of each of these
    """

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)
        self.task = task
        tokenizer = load_tokenizer(ModelConfig(path=str(task.model)))
        if task.template:
            tokenizer.chat_template = task.template.read_text(encoding="utf-8")
        self._pad = int(tokenizer.pad_token_id)
        self._train, self._held_out = (
            load_instructions([DataSource(path=str(path))], key, tokenizer, task.max_length)
            for key, path in (("--train", task.train), ("--eval", task.held_out))
        )
        count = min(task.eval_rows, len(self._held_out))
        self.eval_rows = np.sort(np.random.default_rng(0).permutation(len(self._held_out))[:count]).tolist()
        self.tokens_N = np.array([self._held_out.num_supervised[row] for row in self.eval_rows])
        # torch's fused attention is slower than plain products on a CPU at these lengths
        kind = {"dtype": DTYPES[task.dtype], "attn_implementation": "eager"}
        self.model: Any = AutoModelForCausalLM.from_pretrained(task.model, **kind)
        self.model.requires_grad_(False)
        self._hidden: dict[int, HiddenStates] = {}
        if task.depth in _PARTS:
            self._cut_in_two()

    def _cut_in_two(self) -> None:
        """Have the lower layers' output at hand, and take these layers off."""
        num_layers = len(layers_of(self.model))
        num_below = num_layers - max(1, num_layers // _PARTS[self.task.depth])
        # an optimizer step may take no row twice, an epoch none: so many rows are wanted at most
        wanted = {row for seed in self.task.seeds for row in self.order(seed, self.task.num_steps)}
        folder, digest = self.task.folder / "hidden", self.task.settings()["model"]
        for which, (samples, rows) in enumerate(((self._train, sorted(wanted)), (self._held_out, self.eval_rows))):
            file = folder / f"{self.task.depth}-{self.task.dtype}-{('train', 'eval')[which]}.bin"
            self._hidden[id(samples)] = cached(self.model, digest, num_below, samples, rows, file)
        batch = self._batch(self._held_out, self.eval_rows[:2])
        expected_BSD = hidden_below(self.model, num_below, batch.input_ids, batch.attention_mask)
        whole = self._logits(batch, input_ids=batch.input_ids)
        keep_upper(self.model, num_below)
        upper = self._logits(batch, inputs_embeds=expected_BSD)
        if (upper - whole).abs().max() > 1e-2 * whole.abs().max():
            raise ModelError(f"{type(self.model).__name__} does not go on from hidden states alone. Use --depth full.")

    @torch.no_grad()
    def _logits(self, batch: MicroBatch, **inputs: Tensor) -> Tensor:
        return self.model(attention_mask=batch.attention_mask, use_cache=False, **inputs).logits[
            batch.attention_mask > 0
        ]

    def order(self, seed: int, num_steps: int) -> list[int]:
        """The rows of the first steps: those of a run with this seed."""
        count, rows, epoch = num_steps * self.task.batch_size, np.empty(0, dtype=np.int64), 0
        while len(rows) < count:
            rows, epoch = np.concatenate((rows, self._train.mixture.epoch(seed, epoch))), epoch + 1
        return rows[:count].tolist()

    def _batch(self, samples: InstructionDataset, rows: Sequence[int]) -> MicroBatch:
        picked = [Row(np.array([row]), place, int(samples.num_tokens[row])) for place, row in enumerate(rows)]
        totals = int(samples.num_supervised[rows].sum()), int(samples.num_tokens[rows].sum())
        return collate(samples, picked, self._pad, totals, packed=False)

    def nll(self, samples: InstructionDataset, rows: Sequence[int], more_experts: int = 0) -> Tensor:
        """(B,) fp32: the sum of negative log likelihoods of each of these rows."""
        batch = self._batch(samples, rows)
        real_BS = batch.attention_mask.bool()
        adapter_context(self.model).tokens = BatchTokens(real_BS=real_BS, more_experts=more_experts)
        hidden = self._hidden.get(id(samples))
        inputs = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden.of(rows)}
        places_BP, targets_BP = batch.targets()
        options = {"attention_mask": batch.attention_mask, "logits_to_keep": places_BP, "use_cache": False}
        logits_BPV = self.model(**inputs, **options).logits.float()
        nll_BP = nn.functional.cross_entropy(
            logits_BPV.transpose(1, 2), targets_BP, ignore_index=-100, reduction="none"
        )
        return nll_BP.sum(-1)

    @torch.no_grad()
    def held_out_nll(self) -> list[float]:
        """Of the held-out rows, in their order, with the model as it is."""
        self.model.eval()
        found: dict[int, float] = {}
        by_length = sorted(self.eval_rows, key=lambda row: int(self._held_out.num_tokens[row]))
        for begin in range(0, len(by_length), _EVAL_BATCH):
            rows = by_length[begin : begin + _EVAL_BATCH]
            found |= dict(zip(rows, self.nll(self._held_out, rows).tolist(), strict=True))
        self.model.train()
        return [found[row] for row in self.eval_rows]

    def run(self, cell: Cell, until: int) -> None:
        """Train a cell up to a step, from where its folder stands; anew where its state has been forgotten."""
        folder, results = cell.folder(self.task), Results.read(cell, self.task)
        if results.is_done(until):
            return
        if results.step and not has_state(folder, results.step):
            results.evaluations.clear()
        folder.mkdir(parents=True, exist_ok=True)
        for stage in stages(cell, self.task):
            if results.step < min(stage.end, until) and results.diverged_at is None:
                with self.adapted(stage.adapter) as write_folder:
                    self._train_cell(cell, stage, results, write_folder, until)

    @contextmanager
    def adapted(self, adapter: AdapterConfig) -> Iterator[Callable[[Path], None]]:
        """Inside the block the model has experts; after it, it is the base as it was.

        Yields:
            what writes a folder of the adapter as it is then
        """
        shifts = adapter.init == "svd"
        before = {name: value.clone() for name, value in self.model.named_parameters()} if shifts else {}
        base = fingerprint(self.model.named_parameters())
        layers = inject(self.model, adapter)

        def write(folder: Path) -> None:
            tensors = {of.name: parameter.detach() for of, parameter in adapter_tensors(self.model)}
            tensors |= router_buffers(self.model)
            write_adapter(folder, adapter, layers, tensors, str(self.task.model), base)

        try:
            yield write
        finally:
            eject(self.model)
            with torch.no_grad():
                for name, value in before.items():
                    self.model.get_parameter(name).copy_(value)

    def _train_cell(
        self, cell: Cell, stage: Stage, results: Results, write_folder: Callable[[Path], None], until: int
    ) -> None:
        config, folder = cell.of.optim_config(cell.lr, self.task.num_steps), cell.folder(self.task)
        optimizer = build_optimizer(self.model, config)
        log = adapter_context(self.model).log = RoutingLog(self.model, cell.of.losses_config, torch.device("cpu"))
        state = State(self.model, optimizer, log, folder)
        results.num_trained = sum(math.prod(of.shape) for of, _ in trainables(self.model))
        order = self.order(cell.seed, self.task.num_steps)
        begin = time.process_time()
        spent = results.evaluations[-1]["seconds"] if results.evaluations else 0.0
        if results.step > stage.begin:
            state.load(results.step, stage.begin)
        elif stage.adapter.init == "gradient":
            self._start(stage.adapter, order)
        schedule = build_schedule(optimizer, config, self.task.num_steps)
        if results.step:  # the optimizer must have had a schedule before it can go on with one
            schedule = build_schedule(optimizer, config, self.task.num_steps, results.step)
        self.model.train()
        for step in range(results.step, min(until, stage.end)):
            rows = order[step * self.task.batch_size : (step + 1) * self.task.batch_size]
            torch.manual_seed(derive_seed("study", cell.seed, step))
            if not self.step(rows, stage.adapter.more_experts(step), optimizer, log, config.max_grad_norm):
                results.diverged_at = step + 1
                break
            schedule.step()
            if step + 1 in self.task.evaluated_at:
                spent += time.process_time() - begin
                nll_N = self.held_out_nll()
                if not np.isfinite(nll_N).all():
                    results.diverged_at = step + 1
                    break
                if step + 1 == stage.end < self.task.num_steps:
                    write_folder(alone(folder))
                else:
                    state.save(step + 1)
                results.evaluations.append({"step": step + 1, "seconds": spent, "nll": np.round(nll_N, 4).tolist()})
                results.write(folder)
                forget_states(folder, all_but=step + 1)
                begin = time.process_time()
        results.write(folder)
        if results.is_done(self.task.num_steps):
            forget_states(folder)

    def _start(self, adapter: AdapterConfig, order: Sequence[int]) -> None:
        for begin in range(0, adapter.init_samples, self.task.batch_size):
            rows = order[begin : min(begin + self.task.batch_size, adapter.init_samples)]
            with adapter_context(self.model).unheard():
                self.nll(self._train, rows, adapter.more_experts(0)).sum().backward()
        gradient_start(self.model, adapter)

    def step(
        self, rows: Sequence[int], more_experts: int, optimizer: ShardOptimizer, log: RoutingLog, max_norm: float
    ) -> bool:
        """One optimizer step; False where the loss is not finite."""
        log.begin_step(int(self._train.num_tokens[rows].sum()), 1.0)
        with log.listening():
            loss = self.nll(self._train, rows, more_experts).sum() / int(self._train.num_supervised[rows].sum())
        if not torch.isfinite(loss):
            return False
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in trainables(self.model)], max_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.finish_step(log.sums)
        log.take_window()
        return True


@functools.cache
def bench_of(task: Task) -> Bench:
    """The one of this process."""
    return Bench(task)


def prepare(task: Task) -> None:
    """For a worker process, before all others: compute what all share, and write down how many targets rows have.

    Raises:
        ConfigError: the folder has cells that looked at other held-out rows
    """
    counts = bench_of(task).tokens_N.tolist()
    if task.tokens_file.exists() and json.loads(task.tokens_file.read_text()) != counts:
        raise ConfigError(
            f"{task.folder} has cells that looked at other held-out rows. Give their --eval-rows, --max-length, "
            "--template and --model, or take another --name, or this folder away."
        )
    task.tokens_file.write_text(json.dumps(counts))


def run_cell(task: Task, cell: Cell, until: int) -> None:
    """For a worker process: train, and say what came of it."""
    bench = bench_of(task)
    bench.run(cell, until)
    loss = Results.read(cell, task).loss_at(until, bench.tokens_N, range(len(bench.tokens_N)))
    where = f"{task.folder.name:12s} {cell.arm:20s} lr {cell.lr:<10g} seed {cell.seed}"
    print(f"{where}  step {until:5d}  held-out loss {loss:.4f}", flush=True)

"""Answers to held-out prompts before and after training, beside the reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.config import Recipe
from dsmoelora.data import InstructionDataset
from dsmoelora.data.chat import Prompt, prompt_ids
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.questions import split_prompt
from dsmoelora.data.turns import Message
from dsmoelora.errors import DataError
from dsmoelora.model import limits_at
from dsmoelora.parallel import comm


class Samples(Callback):
    """Lets the model answer the first `train.num_samples` held-out prompts at both ends of a run (all ranks).

    A prompt is a conversation up to its last assistant turn, which is the reference answer.

    Args:
        console: where the table goes, on rank 0
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._before: list[str] = []

    def state(self) -> dict[str, Any]:
        """The answers of before, which a resumed run could not give any more."""
        return {"before": self._before}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the answers of before."""
        self._before = list(state["before"])

    def on_train_begin(self, run: TrainingRun) -> None:
        if run.start_step == 0:
            self._before = _answers(run)

    def on_train_end(self, run: TrainingRun) -> None:
        after = _answers(run)
        if comm.rank() == 0 and after:
            self._console.print(self._table(run, after))

    def _table(self, run: TrainingRun, after: list[str]) -> Table:
        table = Table(title="Held-out prompts, answered before and after", box=box.SIMPLE_HEAD, show_lines=True)
        for header in ("prompt", "before", "after", "reference"):
            table.add_column(header, ratio=1, overflow="fold")
        # A checkpoint may come from a run with fewer samples.
        before = self._before + ["(not asked)"] * (len(after) - len(self._before))
        for (prompt, reference), old, new in zip(_questions(run), before, after, strict=False):
            # Text of data and models may hold what rich takes for markup.
            table.add_row(*(Text(text) for text in (prompt.messages[-1]["content"], old, new, reference)))
        return table


def check_samples(recipe: Recipe, data: InstructionDataset | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the model can answer the prompts that are asked, before anything is trained.

    Raises:
        DataError: it has no embedding for a token of one, or for the position of one or of its answer
    """
    if data is None or not recipe.train.num_samples:
        return
    limits = limits_at(recipe.model.path, recipe.model.trust_remote_code)
    for index, messages in _talks(data, recipe.train.num_samples):
        prompt, _ = split_prompt(messages, data.tools(index))
        try:
            ids = prompt_ids(tokenizer, prompt.messages, prompt.tools)
            limits.check(tokenizer, ids, recipe.train.sample_max_new_tokens, "train.sample_max_new_tokens")
        except RowProblem as problem:
            raise DataError(
                f"train.num_samples is {recipe.train.num_samples}, but of {data.origin(index)} the prompt cannot be "
                f"answered: {problem}"
            ) from None


def _answers(run: TrainingRun) -> list[str]:
    prompts = [prompt for prompt, _ in _questions(run)]
    if not prompts:
        return []
    return run.engine.generate(prompts, run.recipe.train.sample_max_new_tokens)


def _questions(run: TrainingRun) -> list[tuple[Prompt, str]]:
    data = run.eval_data
    if data is None:
        return []
    return [split_prompt(messages, data.tools(i)) for i, messages in _talks(data, run.recipe.train.num_samples)]


def _talks(data: InstructionDataset, count: int) -> Iterator[tuple[int, list[Message]]]:
    """The first samples with a question to ask, which rows of plain text have not."""
    return islice(((i, messages) for i in range(len(data)) if (messages := data.messages(i))), count)

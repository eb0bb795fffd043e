"""Scores of held-out rows at every evaluation, beside the loss: those of `launch/evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dsmoelora.callbacks.base import Callback, TrainingRun
from dsmoelora.config import Recipe
from dsmoelora.data.chat import Prompt
from dsmoelora.engine import Engine
from dsmoelora.evaluate import LOADERS, SCORES, Reading
from dsmoelora.evaluate.items import Item
from dsmoelora.evaluate.reader import Tokens, batches_of, in_batches
from dsmoelora.evaluate.scores import ScoreName
from dsmoelora.model import limits_at
from dsmoelora.parallel import comm


class HeldOutScore(Callback):
    """Adds `eval/exact`, `eval/number` or `eval/choice` to the metrics (all ranks).

    Batches are dealt out to the ranks. Under ZeRO-3 every forward pass is collective, so all ranks do equally many: who
    has no batch left does another one's again, which counts once.

    Args:
        score: name of the score
        items: what is scored, the same on all ranks
        batch_size: rows of a batch
    """

    def __init__(self, score: ScoreName, items: Sequence[Item], batch_size: int) -> None:
        self._name, self._score = score, SCORES[score]
        self._shares = self._score.shares_of(items)
        longest_first = sorted(items, key=lambda item: -item.num_tokens)
        self._batches, self._batch_size = in_batches(longest_first, batch_size), batch_size

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> HeldOutScore:
        """That of a recipe which asks for one.

        Raises:
            DataError: held-out rows cannot be scored so
        """
        data, train = recipe.data, recipe.train
        assert train.eval_score != "none", "somebody asks for a score"
        limits = limits_at(recipe.model.path, recipe.model.trust_remote_code)
        how = Reading(
            tokenizer,
            data.max_length,
            data.on_bad_row,
            train.eval_score_samples,
            limits=limits,
            max_new_tokens=train.sample_max_new_tokens,
            new_key="train.sample_max_new_tokens",
        )
        return cls(train.eval_score, LOADERS[train.eval_score](data.eval, how).items, train.micro_batch_size)

    def on_evaluate(self, run: TrainingRun, loss: float) -> None:
        """Score all rows."""
        reader = _EngineReader(run.engine, self._batch_size, run.recipe.train.sample_max_new_tokens)
        num_right = dict.fromkeys(self._shares, 0)
        for round_ in in_batches(self._batches, comm.world_size()):
            counts = comm.rank() < len(round_)
            outcomes = self._score.outcomes(reader, round_[comm.rank() if counts else 0])
            for key in num_right:
                num_right[key] += sum(outcome[key] for outcome in outcomes) if counts else 0
        sums = comm.all_reduce_sum([float(number) for number in num_right.values()])
        count = sum(len(batch) for batch in self._batches)
        for key, total in zip(num_right, sums, strict=True):
            run.metrics[f"eval/{self._name}{key.removeprefix('score')}"] = total / count


class _EngineReader:
    """The model under ZeRO as scores ask it."""

    def __init__(self, engine: Engine, batch_size: int, max_new_tokens: int) -> None:
        self._engine, self._batch_size, self._max_new_tokens = engine, batch_size, max_new_tokens

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        return self._engine.generate(list(prompts), self._max_new_tokens)

    def nlls(self, texts: Sequence[Tokens]) -> list[list[float]]:
        batches = list(batches_of(texts, self._batch_size, self._engine.tokenizer))
        (longest,) = (max(numbers) for numbers in zip(*comm.all_gather_objects([len(batches)]), strict=True))
        fillers = batches[-1:] * (longest - len(batches))
        return self._engine.nlls(batches + fillers)[: len(texts)]

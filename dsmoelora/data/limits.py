"""What a model has rows of an embedding for: beyond it there is an index out of range, which no library explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dsmoelora.data.problems import RowProblem
from dsmoelora.data.vocabulary import check_ids
from dsmoelora.errors import bad_value


class LimitProblem(RowProblem):
    """A text that the model has no embedding for."""


@dataclass(frozen=True)
class Limits:
    """What a model can be given.

    Args:
        num_embeddings: tokens that it has an embedding for; None if it is not known
        num_positions: positions that it has an embedding for; None where they are computed, as rotary ones are
    """

    num_embeddings: int | None = None
    num_positions: int | None = None

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
        num_new: int = 0,
        new_key: str = "--max-new-tokens",
    ) -> None:
        """The model can be given these tokens, and answer them.

        Args:
            tokenizer: of the tokens, for the message
            ids: of the tokens
            num_new: tokens of the answer at most
            new_key: where that is set

        Raises:
            LimitProblem: one of the tokens, or of their positions, has no embedding
        """
        try:
            check_ids(tokenizer, ids, self.num_embeddings)
        except RowProblem as problem:
            raise LimitProblem(str(problem)) from None
        if self.num_positions is None or len(ids) + num_new <= self.num_positions:
            return
        more, remedy = (f" and may get {num_new:,} more", f", or lower {new_key}") if num_new else ("", "")
        raise LimitProblem(
            f"it has {len(ids):,} tokens{more}, but the model has an embedding for {self.num_positions:,} positions. "
            f"Shorten it{remedy}."
        )

    def check_length(self, key: str, max_length: int) -> None:
        """Texts of that many tokens have positions.

        Args:
            key: where the number is set
            max_length: tokens of a text at most

        Raises:
            ConfigError: some would have none
        """
        if self.num_positions is not None and max_length > self.num_positions:
            allowed = f"at most {self.num_positions}, the positions that the model has an embedding for"
            raise bad_value(key, max_length, allowed, "Lower it, or take a model with more positions.")

    def length(self, key: str, given: int | None, default: int) -> tuple[int, list[str]]:
        """Tokens of a text at most, where the user has said how many or has not, and what to say of it.

        Raises:
            ConfigError: as `check_length`
        """
        if given is not None:
            self.check_length(key, given)
            return given, []
        if self.num_positions is None or self.num_positions >= default:
            return default, []
        return self.num_positions, [f"{key} is {self.num_positions}: the model has no more positions."]


UNLIMITED = Limits()

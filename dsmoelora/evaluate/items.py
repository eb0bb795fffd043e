"""Rows as what a score looks at: a prompt to answer, or texts whose likelihood is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dsmoelora.config import DataSource
from dsmoelora.data import load_instructions
from dsmoelora.data.chat import Prompt, TokenisedChat, prompt_ids, tokenise_chats
from dsmoelora.data.dataset import labels_of
from dsmoelora.data.formats import Conversation
from dsmoelora.data.limits import UNLIMITED, Limits
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.questions import Question, SkippedRow, read_questions, without_letters
from dsmoelora.data.report import all_losses
from dsmoelora.errors import DataError
from dsmoelora.evaluate.marks import wanted_number
from dsmoelora.evaluate.reader import Tokens

ChoicesAre = Literal["letters", "texts"]


@dataclass(frozen=True)
class Item:
    """One row.

    Args:
        path: the source it came from
        row: its number there
        prompt: what is asked; None of plain text
        wanted: the right answer
        texts: whose likelihood is asked for, one for each answer that may be chosen; none where one is generated
        answers: those that may be chosen
        right: which of them is
        num_tokens: of the longest text, or of the prompt
    """

    path: str
    row: int
    prompt: Prompt | None
    wanted: str
    texts: tuple[Tokens, ...] = ()
    answers: tuple[str, ...] = ()
    right: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class Items:
    """What is left of some sources.

    Args:
        items: in the order of the sources and their rows
        remarks: sentences on what was left out or cut
    """

    items: list[Item]
    remarks: list[str]


@dataclass(frozen=True)
class Reading:
    """How rows become items.

    Args:
        tokenizer: with the chat template
        max_length: tokens of a text at most
        on_bad_row: `error` stops at the first row that cannot be scored, `skip` leaves such rows out
        num_samples: rows taken of each source; 0 for all
        choices: how answers are offered: behind letters in the prompt, or each text as an answer of its own
        limits: of the model that reads them
        max_new_tokens: of a generated answer at most
        new_key: where that is set, for messages
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 2048
    on_bad_row: Literal["error", "skip"] = "error"
    num_samples: int = 0
    choices: ChoicesAre = "letters"
    limits: Limits = UNLIMITED
    max_new_tokens: int = 0
    new_key: str = "--max-new-tokens"


def learned_texts(sources: Sequence[DataSource], how: Reading) -> Items:
    """Every sample as training would see it, cut where training would cut it; its labels are what is learned.

    Raises:
        DataError: a source or a row is wrong
    """
    items: list[Item] = []
    remarks: list[str] = []
    for source in sources:
        more: dict[str, Any] = {"on_bad_row": how.on_bad_row, "num_embeddings": how.limits.num_embeddings}
        data = load_instructions([source], "--data", how.tokenizer, how.max_length, **more)
        remarks += all_losses(data.reports)
        for index in range(min(len(data), how.num_samples or len(data))):
            messages, (ids, labels) = data.messages(index), data.sample(index)
            prompt = Prompt(messages[:-1], data.tools(index)) if messages else None
            wanted = str(messages[-1]["content"]) if messages else ""
            items.append(Item(*data.place(index), prompt, wanted, ((ids, labels),), num_tokens=len(ids)))
    return Items(items, remarks)


def prompts(sources: Sequence[DataSource], how: Reading, numbers: bool = False) -> Items:
    """Every row as a prompt that is answered.

    Args:
        sources: of conversations
        how: rows become items
        numbers: whether reference answers must come to a number

    Raises:
        DataError: a source or a row is wrong
    """

    def item(question: Question) -> Item:
        if numbers and wanted_number(question.wanted) is None:
            raise RowProblem("its answer comes to no number, after #### or as its last one.")
        ids = prompt_ids(how.tokenizer, question.prompt.messages, question.prompt.tools)
        how.limits.check(how.tokenizer, ids, how.max_new_tokens, how.new_key)
        size = len(ids)
        _check_length(size, how)
        return Item(question.path, question.row, question.prompt, question.wanted, num_tokens=size)

    return _used(sources, how, item)


def choices(sources: Sequence[DataSource], how: Reading) -> Items:
    """Every row as texts that differ in the last answer, one for each that may be chosen.

    Args:
        sources: of rows with choices; one whose format is `auto` is taken for `multiple_choice`
        how: rows become items

    Raises:
        DataError: a source or a row is wrong
    """
    sources = [replace(source, format="multiple_choice") if source.format == "auto" else source for source in sources]

    def item(question: Question) -> Item:
        choice = question.choice
        if choice is None:
            raise RowProblem("it has no choices. Name its format, multiple_choice, or take another --score.")
        asked, answers = question, tuple(choice.letters)
        if how.choices == "texts":
            asked, answers = without_letters(question), choice.texts
        texts = tuple(_answered(asked, answer, how.tokenizer) for answer in answers)
        for ids, _ in texts:
            how.limits.check(how.tokenizer, ids)
        longest = max(len(ids) for ids, _ in texts)
        _check_length(longest, how)
        return Item(asked.path, asked.row, asked.prompt, asked.wanted, texts, answers, choice.right, longest)

    return _used(sources, how, item)


def given_answer(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> Tokens:
    """A prompt with an answer that a model has given; labels are the answer's."""
    before = prompt_ids(tokenizer, prompt.messages, prompt.tools)
    ids = [*before, *tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]]
    return ids, labels_of(ids, [place >= len(before) for place in range(len(ids))])


def _used(sources: Sequence[DataSource], how: Reading, use: Callable[[Question], Item]) -> Items:
    """The first rows of each source of which an item can be made."""
    items: list[Item] = []
    remarks: list[str] = []
    for source in sources:
        found: list[Item] = []
        skipped: list[SkippedRow] = []
        for made in read_questions(source, use, how.on_bad_row):
            if isinstance(made, SkippedRow):
                skipped.append(made)
            else:
                found.append(made)
            if how.num_samples and len(found) == how.num_samples:
                break
        first = f"row {skipped[0].row}: {skipped[0].problem}" if skipped else ""
        if not found:
            raise DataError(f"every row of {source.path} is wrong: {first} Correct the rows.")
        if skipped:
            remarks.append(f"{source.path}: {len(skipped):,} rows skipped ({first}{' ...' * (len(skipped) > 1)})")
        items += found
    return Items(items, remarks)


def _answered(question: Question, answer: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """A question with an answer, as training would write it; labels are the answer's, without its end of turn."""
    before = question.prompt.messages
    messages = [*before, {"role": "assistant", "content": answer}]
    learned = (len(before),)
    conversation = Conversation(messages, question.path, question.row, learned=learned, tools=question.prompt.tools)
    (chats,) = tokenise_chats(tokenizer, [conversation])
    chat: TokenisedChat = chats[-1]
    end = chat.ends[-1]
    return chat.input_ids[:end], labels_of(chat.input_ids[:end], chat.supervised[:end])


def _check_length(num_tokens: int, how: Reading) -> None:
    if num_tokens > how.max_length:
        raise RowProblem(f"it has {num_tokens} tokens, but data.max_length is {how.max_length}. Raise it.")


LOADERS: dict[str, Callable[[Sequence[DataSource], Reading], Items]] = {
    "loss": learned_texts,
    "exact": prompts,
    "number": partial(prompts, numbers=True),
    "choice": choices,
}

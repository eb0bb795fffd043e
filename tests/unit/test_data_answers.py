"""What is learned is what generation is asked for, whatever the template and the words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoelora.data.chat import MERGED, REWRITTEN, prompt_ids, tokenise_chats
from dsmoelora.data.formats import Conversation
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.turns import Message
from tests.chat_styles import STYLES, tokenizer_of, tokenizer_with_blocks


def talk(*turns: str) -> list[Message]:
    return [{"role": "assistant" if i % 2 else "user", "content": words} for i, words in enumerate(turns)]


WORDS = st.lists(
    st.sampled_from(
        ["a", "b", " ", "\n", "\n\n", "<|im_end|>", "<|im_start|>assistant\n", "<bos>", "</think>", "😀", "\u200b"]
    ),
    min_size=1,
    max_size=5,
).map("".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5).map(lambda pairs: talk(*sum(pairs, ())))


@pytest.mark.parametrize("name", STYLES)
@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(messages=PAIRS, system=st.none() | WORDS)
def test_the_ids_are_those_of_generation(name: str, messages: list[Message], system: str | None) -> None:
    tokenizer = tokenizer_of(name)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        (chats,) = tokenise_chats(tokenizer, [Conversation(messages, "a", 1)])
    except RowProblem:
        return
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = [(chat, end) for chat in chats for end in chat.ends]
    assert len(found) == len(answers)
    for i, (chat, end) in zip(answers, found, strict=True):
        prompt = prompt_ids(tokenizer, messages[:i])
        assert chat.input_ids[: len(prompt)] == prompt
        assert not chat.supervised[len(prompt) - 1] and all(chat.supervised[len(prompt) : end + 1])
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        until_end = str(tokenizer.decode(chat.input_ids[: end + 1]))
        assert text.startswith(until_end) and not text[len(until_end) :].strip()
        assert chat.input_ids[end] == tokenizer.eos_token_id
    assert sum(sum(chat.supervised) for chat in chats) == sum(
        end + 1 - len(prompt_ids(tokenizer, messages[:i])) for i, (_, end) in zip(answers, found, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "messages", "why"),
    [
        ("thinking", talk("a", "b", "c", "d"), REWRITTEN),
        ("system in the last turn", [{"role": "system", "content": "s"}, *talk("a", "b", "c", "d")], REWRITTEN),
        ("chatml", talk("a", "\nb", "c", "d"), MERGED),
        ("chatml", talk("a", "b", "c", "d"), ""),
    ],
)
def test_a_row_for_each_answer(name: str, messages: list[Message], why: str) -> None:
    (chats,) = tokenise_chats(tokenizer_of(name), [Conversation(messages, "a", 1)])
    assert [chat.split for chat in chats] == ([why, why] if why else [""])


def test_only_named_answers_are_learned() -> None:
    tokenizer = tokenizer_of("chatml")
    ((chat,),) = tokenise_chats(tokenizer, [Conversation(talk("a", "no", "c", "yes"), "a", 1, learned=(3,))])
    kept = [token for token, flag in zip(chat.input_ids, chat.supervised, strict=True) if flag]
    assert tokenizer.decode(kept) == "yes<|im_end|>"


def test_long_conversations_are_rendered_a_fixed_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml")
    counts: Counter[int] = Counter()
    render = tokenizer.apply_chat_template

    def counted(messages: list[Message], **options: Any) -> Any:
        counts[num_answers] += 1
        return render(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    for num_answers in (5, 50):
        ((chat,),) = tokenise_chats(tokenizer, [Conversation(talk(*["ab", "cd"] * num_answers), "a", 1)])
        assert len(chat.ends) == num_answers
    assert counts[5] == counts[50]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("words", ["xy", "say <|im_end|> now", "é 😀", "\nb"])
def test_masks_of_transformers_agree(name: str, words: str) -> None:
    tokenizer, with_blocks = tokenizer_of(name), tokenizer_with_blocks(name)
    conversation = Conversation(talk("a", words, "c", "d"), "a", 1)
    (chats,), (same,) = (tokenise_chats(each, [conversation]) for each in (tokenizer, with_blocks))
    assert chats == same
    for chat in chats:
        messages = conversation.messages[: chat.num_messages]
        theirs: Any = with_blocks.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if theirs["input_ids"][: len(chat.input_ids)] != chat.input_ids:
            assert chat.split == MERGED  # tokens that generation never shows: no mask can be compared
            continue
        mask = [bool(flag) for flag in theirs["assistant_masks"][: len(chat.input_ids)]]
        if chat.split:  # the answers before have rows of their own
            first = len(prompt_ids(tokenizer, messages[:-1]))
            mask[:first] = [False] * first
        assert chat.supervised == mask

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.chat import stop_ids, tokenise_chats
from dsmoelora.data.formats import Conversation
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.turns import Message
from dsmoelora.errors import ModelError
from tests.helpers import CHATML_TEMPLATE, tiny_tokenizer

USER, ASSISTANT = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}
TWO_TURNS = [USER, ASSISTANT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "é!"}]


def learned(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[str]]:
    """The text of all tokens of all rows, and the texts of the runs that are learned."""
    (chats,) = tokenise_chats(tokenizer, [Conversation(messages, "a.jsonl", 7)])
    runs: list[list[int]] = []
    for chat in chats:
        assert len(chat.input_ids) == len(chat.supervised)
        for i, (token, flag) in enumerate(zip(chat.input_ids, chat.supervised, strict=True)):
            if flag and not chat.supervised[i - 1]:
                runs.append([])
            if flag:
                runs[-1].append(token)
    return "".join(str(tokenizer.decode(chat.input_ids)) for chat in chats), [str(tokenizer.decode(r)) for r in runs]


def test_mask_of_one_turn_counted_by_hand(tmp_path: Path) -> None:
    # One token a byte and one for each special: <|im_start|> user \n a b <|im_end|> \n is 1+4+1+2+1+1 = 10 tokens,
    # <|im_start|> assistant \n is 1+9+1 = 11; then x y z <|im_end|> are learned, and the last \n is not.
    ((chat,),) = tokenise_chats(tiny_tokenizer(tmp_path), [Conversation([USER, ASSISTANT], "a.jsonl", 1)])
    assert chat.supervised == [False] * 21 + [True] * 4 + [False]


def test_every_answer_is_learned_with_its_end(tmp_path: Path) -> None:
    text, runs = learned(tiny_tokenizer(tmp_path), TWO_TURNS)
    assert text == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nxyz<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\né!<|im_end|>\n"
    )
    assert runs == ["xyz<|im_end|>", "é!<|im_end|>"]


def test_a_batch_gives_what_single_conversations_give(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    conversations = [Conversation(m, "a.jsonl", 1) for m in ([USER, ASSISTANT], TWO_TURNS)]
    assert tokenise_chats(tokenizer, conversations) == [tokenise_chats(tokenizer, [c])[0] for c in conversations]


def test_beginning_of_sequence_comes_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, "{{ bos_token }}" + CHATML_TEMPLATE)
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the tokenizer would add one of its own
    text, runs = learned(tokenizer, TWO_TURNS)
    assert text.count("<bos>") == 1
    assert text.startswith("<bos><|im_start|>user")
    assert runs == ["xyz<|im_end|>", "é!<|im_end|>"]


def test_special_token_inside_an_answer_does_not_end_it(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "say <bos> now"}
    _, runs = learned(tiny_tokenizer(tmp_path), [USER, answer])
    assert runs == ["say <bos> now<|im_end|>"]


TEMPLATES = {
    # as Llama 2 and Mistral: no markers of roles, end of sequence right after the answer, spaces around
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [/Q]"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        [" xyz<|im_end|>", " é!<|im_end|>"],
    ),
    # as Phi 3: one more token at the very end, which only the whole conversation has
    "closing": (
        CHATML_TEMPLATE + "{% if not add_generation_prompt %}<bos>{% endif %}",
        ["xyz<|im_end|>", "é!<|im_end|>"],
    ),
    # as Qwen 3: the last answer is written in another way than the earlier ones, so that each gets a row
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<think></think>xyz<|im_end|>", "<think></think>é!<|im_end|>"],
    ),
    # thoughts of the template's own before the answer, in which a short answer comes too
    "channel": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "<think>say xyz! or é!</think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<think>say xyz! or é!</think>xyz<|im_end|>", "<think>say xyz! or é!</think>é!<|im_end|>"],
    ),
    "channel with a special token": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "xyz é!<bos>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["xyz é!<bos>xyz<|im_end|>", "xyz é!<bos>é!<|im_end|>"],
    ),
    "generation block": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}\n{% endfor %}",
        ["xyz<|im_end|>", "é!<|im_end|>"],
    ),
    "generation block without the end": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% else %}{{ m['content'] }}"
        "{% endif %}<|im_end|>\n{% endfor %}",
        ["xyz<|im_end|>", "é!<|im_end|>"],
    ),
}


HEAD_IN_BLOCK = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)
TEMPLATES["generation block around the whole turn"] = (
    HEAD_IN_BLOCK,
    ["<|im_start|>assistant\nxyz<|im_end|>", "<|im_start|>assistant\né!<|im_end|>"],
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates(tmp_path: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    _, runs = learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)
    assert runs == expected


@pytest.mark.parametrize("name", ["generation block", "generation block without the end"])
def test_an_end_of_turn_that_is_not_the_end_of_sequence_is_learned(tmp_path: Path, name: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path, TEMPLATES[name][0])
    tokenizer.eos_token = "<pad>"  # as base models whose texts end with another token than the turns of a chat
    assert learned(tokenizer, TWO_TURNS)[1] == ["xyz<|im_end|>", "é!<|im_end|>"]


@pytest.mark.parametrize("answer", ["e", "im", "start", "_end"])
def test_an_answer_that_is_part_of_a_special_token(tmp_path: Path, answer: str) -> None:
    closing = CHATML_TEMPLATE + "{% if not add_generation_prompt %}<bos>{% endif %}"
    _, runs = learned(tiny_tokenizer(tmp_path, closing), [USER, {"role": "assistant", "content": answer}])
    assert runs == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize("name", [None, "closing", "generation block", "generation block without the end"])
def test_generation_stops_where_answers_end(tmp_path: Path, name: str | None) -> None:
    tokenizer = tiny_tokenizer(tmp_path, TEMPLATES[name][0] if name else CHATML_TEMPLATE)
    tokenizer.eos_token = "<pad>"
    pad, end = tokenizer.convert_tokens_to_ids(["<pad>", "<|im_end|>"])
    assert stop_ids(tokenizer, None) == [pad, end]
    assert stop_ids(tokenizer, 77) == [pad, end, 77]
    assert stop_ids(tokenizer, [end, 78]) == [pad, end, 78]


def test_generation_stops_at_the_first_token_after_the_words(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, HEAD_IN_BLOCK)
    assert stop_ids(tokenizer, None) == [tokenizer.eos_token_id]  # not where the block begins or ends


def test_generation_stops_at_the_models_own_token_where_the_template_writes_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert stop_ids(tokenizer, 77) == [tokenizer.eos_token_id, 77]


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no chat template.*chat_template\.jinja"):
        learned(tiny_tokenizer(tmp_path, None), TWO_TURNS)


def test_template_that_refuses_a_conversation(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}" + CHATML_TEMPLATE
    with pytest.raises(RowProblem, match="the model's chat template refuses it: roles must alternate"):
        learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)


def test_template_that_rewrites_what_came_before(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + CHATML_TEMPLATE
    with pytest.raises(ModelError, match=r"a\.jsonl, row 7:.*messages\[1\] in another way than after its gen"):
        learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)


NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_template_without_end_of_turn(tmp_path: Path) -> None:
    # The next question's marker must not pass for the end of the answer.
    template = NO_END + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    with pytest.raises(ModelError, match="no special token after the assistant's answer"):
        learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)


def test_template_that_ends_conversations_alone_has_a_row_for_each_answer(tmp_path: Path) -> None:
    template = NO_END + "{% if add_generation_prompt %}<|im_start|>assistant: {% else %}{{ eos_token }}{% endif %}"
    _, runs = learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)
    assert runs == ["xyz\n<|im_end|>", "é!\n<|im_end|>"]


def test_generation_block_without_any_end_of_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}\n"
        "{% endfor %}"
    )
    with pytest.raises(ModelError, match="no special token after the assistant's answer"):
        learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)


def test_generation_block_that_marks_nothing(tmp_path: Path) -> None:
    template = CHATML_TEMPLATE + "{% generation %}{% endgeneration %}"
    with pytest.raises(ModelError, match="marks no token"):
        learned(tiny_tokenizer(tmp_path, template), TWO_TURNS)

"""Chat templates in the styles of families of models. `⟦` and `⟧` stand around what an assistant has to write."""

from __future__ import annotations

from functools import cache
from tempfile import mkdtemp

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dsmoelora.data.fallback_template import ensure_chat_template
from tests.helpers import tiny_tokenizer


def _style(turn: str, prompt: str, head: str = "") -> str:
    """A template of one expression a turn."""
    ask = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    return head + "{% for m in messages %}" + turn + "{% endfor %}" + ask


_LINE = "{{ '\n' }}"  # a bare one after a block is taken away


def _turns(header: str, words: str, end: str = "<|im_end|>", tail: str = _LINE, opened: str = "") -> str:
    """Turns that are written the same way whoever speaks; the last answer may open otherwise."""
    opened = "{% if loop.last %}" + opened + "{% endif %}" if opened else ""
    answer = f"{header}⟦{opened}{words}{end}⟧{tail}"
    return "{% if m.role == 'assistant' %}" + answer + "{% else %}" + header + words + end + tail + "{% endif %}"


_CHATML = "<|im_start|>{{ m.role }}\n"
_IF_USER = "{% if m.role == 'user' %}"
_STYLES: dict[str, str] = {
    "chatml": _style(_turns(_CHATML, "{{ m.content }}"), "<|im_start|>assistant\n"),
    "header and date": _style(
        _turns("<|im_start|>{{ m.role }}\n\n", "{{ m.content | trim }}", tail=""),
        "<|im_start|>assistant\n\n",
        "{{ bos_token }}On {{ strftime_now('%d %b %Y') }}.\n\n",
    ),
    "system in the last turn": _style(
        _IF_USER + "[Q]{% if loop.index0 >= messages | length - 2 and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/Q]"
        "{% elif m.role == 'assistant' %}⟦ {{ m.content | trim }}{{ eos_token }}⟧{% endif %}",
        "",
        "{{ bos_token }}",
    ),
    "other roles": _style(
        _turns("<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n", "{{ m.content | trim }}"),
        "<|im_start|>model\n",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    ),
    "thinking": _style(_turns(_CHATML, "{{ m.content }}", opened="<think>\n\n</think>\n\n"), "<|im_start|>assistant\n"),
    "special thinking": _style(_turns(_CHATML, "{{ m.content }}", opened="<bos>"), "<|im_start|>assistant\n"),
    "names": _style(
        _IF_USER
        + "USER: {{ m.content }}\n{% elif m.role == 'assistant' %}ASSISTANT:⟦ {{ m.content }}{{ eos_token }}⟧"
        + _LINE
        + "{% else %}{{ m.content }}\n\n{% endif %}",
        "ASSISTANT:",
    ),
    # the tokenizer brings none, and is given this one
    "none": _style(
        "### {{ m.role | title }}:\n{% if m.role == 'assistant' %}⟦{{ m.content }}{{ eos_token }}⟧"
        + _LINE * 2
        + "{% else %}{{ m.content }}\n\n{% endif %}",
        "### Assistant:\n",
    ),
}
STYLES = tuple(_STYLES)
WITHOUT_SYSTEM = ("other roles",)


def template_of(name: str, marks: tuple[str, str] = ("", "")) -> str:
    """A style's template.

    Args:
        name: of the style
        marks: what stands before and after what an assistant has to write
    """
    return _STYLES[name].replace("⟦", marks[0]).replace("⟧", marks[1])


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Bytes, and tokens of two characters that melt with what is beside them."""
    tokenizer = tiny_tokenizer(mkdtemp(), None if name == "none" else template_of(name))
    ensure_chat_template(tokenizer)
    return _with_pairs(tokenizer)


@cache
def tokenizer_with_blocks(name: str) -> PreTrainedTokenizerBase:
    """The same with `{% generation %}` blocks."""
    return _with_pairs(tiny_tokenizer(mkdtemp(), template_of(name, ("{% generation %}", "{% endgeneration %}"))))


def _with_pairs(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken(" b", normalized=False)])
    return tokenizer

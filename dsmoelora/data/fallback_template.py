"""A chat template for tokenizers that bring none, as those of most base models do."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dsmoelora.errors import ModelError

_MARK = "{#- written by dsmoelora, for the tokenizer brought no template -#}"
_TURNS = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].title() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template one that needs no token beyond its end-of-sequence token.

    A turn is `### User:`, a line break, the words and an empty line; an answer ends with the end-of-sequence token.
    The beginning-of-sequence token is written where the tokenizer itself would write it.

    Raises:
        ModelError: it has no end-of-sequence token either, so that no answer could be ended
    """
    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path or 'the model'} has neither a chat template nor an end-of-"
            "sequence token. Set eos_token in its tokenizer_config.json, or add a chat_template.jinja."
        )
    begins = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = _MARK + ("{{ bos_token }}" if begins else "") + _TURNS


def is_fallback(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is the one that `ensure_chat_template` gives."""
    return isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.startswith(_MARK)

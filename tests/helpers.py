"""Small models and tokenizers that the tests make for themselves; nothing is fetched from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(folder: Path | str, chat_template: str | None = CHATML_TEMPLATE) -> PreTrainedTokenizerFast:
    """Save a fast tokenizer to `folder` and return it.

    One token a byte, so that masks can be counted by hand: ids 0 to 3 are `SPECIAL_TOKENS`, every byte has an id of
    its own after them, 260 in all. End of sequence is `<|im_end|>`. `chat_template=None` leaves the template out.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(folder: Path | str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Llama (safetensors) and its tiny tokenizer to `folder`, and return the folder.

    Args:
        folder: where to save; a path that load functions and recipes take as `model.path`
        dtype: dtype of the saved weights
        seed: of the random weights; the caller's random state is left as it was
        overrides: fields of `LlamaConfig`, e.g. `num_hidden_layers=3`
    """
    tokenizer = tiny_tokenizer(folder)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))
    torch.nn.Module.to(model, dtype).save_pretrained(folder)
    return Path(folder)


def bring_own_code(folder: Path) -> None:
    """Let a Llama's folder define its class itself, as models do that transformers does not know."""
    (folder / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))

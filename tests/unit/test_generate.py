from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from launch.generate import answer
from tests.helpers import tiny_llama, tiny_tokenizer


def test_an_answer_ends_with_the_token_of_the_template_where_the_model_has_another(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", eos_token_id=0))  # <pad>, as texts end
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.eos_token = "<pad>"
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():  # it has learned to end every answer at once, as ChatML does
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1.0
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    model.register_forward_pre_hook(count)
    assert answer(model, tokenizer, "Hi", None, max_new_tokens=9) == ""
    assert num_calls == 1

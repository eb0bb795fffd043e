from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache, TextStreamer

from dsmoelora.data.chat import Prompt, prompt_ids
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import own_device
from launch import generate
from launch.generate import answer
from tests.helpers import CHATML_TEMPLATE, bring_own_code, tiny_llama, tiny_tokenizer
from tests.unit.test_export import make_adapter


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


def test_answers_are_greedy_whatever_the_base_asks_for(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", initializer_range=0.5)).eval()
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "abc"}])
    said: list[int] = []
    with torch.no_grad():
        while len(said) < 12 and said[-1:] != [tokenizer.eos_token_id]:
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    own = GenerationConfig(
        **{"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3, "min_new_tokens": 12},
        **{"suppress_tokens": said[:1], "forced_eos_token_id": 9, "return_dict_in_generate": True},
        **{"do_sample": True, "temperature": 0.5, "top_k": 3, "cache_implementation": "static"},
    )
    model.generation_config = own
    caches = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: caches.append(type(inputs["past_key_values"])), with_kwargs=True
    )
    assert answer(model, tokenizer, "abc", None, 12) == tokenizer.decode(said, skip_special_tokens=True).strip()
    assert set(caches) == {StaticCache}, "what does not bear on the answer is as the base wants it"
    assert model.generation_config is own
    streamed = io.StringIO()
    with contextlib.redirect_stdout(streamed):
        generate._answered(
            model,
            tokenizer,
            Prompt([{"role": "user", "content": "abc"}]),
            12,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    assert streamed.getvalue().strip() == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_code_of_the_base_runs_with_the_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base_path = tiny_llama(tmp_path / "base")
    adapter = make_adapter(base_path, tmp_path / "adapter")
    bring_own_code(base_path)
    argv = ["generate.py", "--adapter", str(adapter), "--prompt", "Hi", "--max-new-tokens", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ModelError, match="custom code"):
        generate.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--trust-remote-code"])
    generate.main()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(("there", "taken"), [("xpu", "xpu"), ("cuda", "cuda"), (None, "cpu")])
def test_any_make_of_accelerator_is_taken(monkeypatch: pytest.MonkeyPatch, there: str | None, taken: str) -> None:
    found = None if there is None else torch.device(there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert own_device() == torch.device(taken)


def test_tools_are_what_the_template_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"))
    monkeypatch.setattr(model, "generate", Mock(side_effect=lambda input_ids, **_: input_ids))
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", "{{ tools | tojson }}" + CHATML_TEMPLATE)
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "look", "parameters": {}}]')
    options = generate.parse_options(["--adapter", "a", "--prompt", "b", "--tools", str(file)])
    assert answer(model, tokenizer, "Hi", None, 1, options.tools) == ""
    asked = tokenizer.decode(model.generate.call_args.kwargs["input_ids"][0])
    assert asked.startswith('[{"type": "function", "function": {"name": "look", "parameters": {}}}]<|im_start|>user')


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("{", "must be JSON"),
        ("[]", "It names none"),
        ('[{"a": 1}]', "name"),
    ],
)
def test_files_without_tools_are_refused(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        generate.parse_options(["--adapter", "a", "--prompt", "b", "--tools", str(file)])


def test_a_system_message_for_a_template_that_knows_none(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model"))
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", refusal + CHATML_TEMPLATE)
    with pytest.raises(ModelError, match=r"--system cannot be used: .*System role not supported.*Leave --system out"):
        answer(model, tokenizer, "Hi", "Be kind.", max_new_tokens=1)


def test_a_chat_is_asked_with_all_that_was_said_and_can_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model")).eval()
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    asked: list[str] = []
    own = model.generate

    def note(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append(tokenizer.decode(input_ids[0]))
        return own(input_ids, **options)

    monkeypatch.setattr(model, "generate", note)
    said = iter(["Hi", "And?", "/new", "Hm", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    generate.chat(model, tokenizer, "Be kind.", max_new_tokens=3)
    opening = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    first = answer(model, tokenizer, "Hi", "Be kind.", max_new_tokens=3)
    ending = "<|im_end|>\n<|im_start|>assistant\n"
    turns = f"{opening}Hi{ending}{first}<|im_end|>\n<|im_start|>user\nAnd?{ending}"
    assert asked[:3] == [f"{opening}Hi{ending}", turns, f"{opening}Hm{ending}"]
    assert first in capsys.readouterr().out


def test_a_chat_ends_with_the_input_and_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    generate.chat(Mock(), tiny_tokenizer(tmp_path), None, max_new_tokens=1)
    assert capsys.readouterr().out.endswith("ends it.\n> \n")


def test_either_prompts_or_a_chat() -> None:
    for words in ([], ["--chat", "--prompt", "x"]):
        with pytest.raises(ConfigError, match=r"not allowed with|is required"):
            generate.parse_options(["--adapter", "a", *words])
    assert generate.parse_options(["--adapter", "a", "--chat"]).chat

"""launch/serve.py, asked by OpenAI's own client."""

from __future__ import annotations

import inspect
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from dsmoelora import serving
from dsmoelora.data.chat import Prompt, prompt_ids
from dsmoelora.data.turns import conversation_of
from dsmoelora.errors import ConfigError, ModelError
from dsmoelora.model import load_trained, trained_tokenizer
from dsmoelora.model.inputs import prompt_inputs
from launch import serve
from launch.generate import answer
from tests.conftest import thorough
from tests.forked import Program
from tests.helpers import tiny_llama
from tests.helpers_distributed import free_port
from tests.launched import ROOT
from tests.unit.test_export import CONFIG, make_adapter

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="the extra [serve] is not installed")

PATIENCE_S = 120.0
PROMPTS = ["abc", "A rather longer question?", "7", "What is é?"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return make_adapter(tiny_llama(folder / "base"), folder / "adapter")


@pytest.fixture(scope="module", params=[(), thorough(("--continuous-batching",))], ids=["one by one", "together"])
def client(adapter: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    port = free_port()
    argv = ["--adapter", str(adapter), "--port", str(port), "--name", "tuned", *request.param]
    server = Program([str(ROOT / "launch" / "serve.py"), *argv], env=os.environ)
    try:
        talks = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                talks.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, server.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield talks
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def wanted(adapter: Path) -> list[str]:
    """What launch/generate.py answers."""
    model, tokenizer = load_trained(adapter, None)
    return [answer(model, tokenizer, prompt, "Be kind.", 12) for prompt in PROMPTS]


def asked(prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
    return {"model": "tuned", "messages": messages, "max_tokens": 12, "temperature": 0, **more}


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tuned"]


def test_streams_at_once_are_what_generate_answers(client: Any, wanted: list[str]) -> None:
    def stream(prompt: str) -> str:
        parts = [
            chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked(prompt, stream=True))
        ]
        assert len([part for part in parts if part]) > 1, "it came piece by piece"
        return "".join(part or "" for part in parts).strip()

    assert len(set(wanted)) == len(PROMPTS)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stream, PROMPTS)) == wanted


def test_the_lines_of_the_page(client: Any, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE | re.DOTALL
    )
    there = block.replace("http://127.0.0.1:8000/v1", str(client.base_url))
    assert there != block
    exec(there, {})
    model, tokenizer = load_trained(adapter, None)
    question = "Spell this word backward (example: sun -> nus): lamp"
    whole = answer(model, tokenizer, question, None, 16)
    half = "\ufffd"  # of a character whose bytes have not all come; a stream waits for the rest
    assert capsys.readouterr().out.strip().rstrip(half) == whole.rstrip(half) != ""


def test_a_whole_answer_and_a_client_that_goes_away(client: Any, wanted: list[str]) -> None:
    stream = client.chat.completions.create(**asked(PROMPTS[1], stream=True, max_tokens=200))
    next(iter(stream))
    stream.close()
    done = client.chat.completions.create(**asked(PROMPTS[0]))
    assert done.choices[0].message.content.strip() == wanted[0]
    assert done.model == "tuned"


def test_plain_completions(client: Any, adapter: Path) -> None:
    tokenizer = trained_tokenizer(adapter)
    chat = asked(PROMPTS[0])
    text = tokenizer.decode(prompt_ids(tokenizer, chat["messages"]))
    done = client.completions.create(model="tuned", prompt=text, max_tokens=4, temperature=0)
    whole = client.chat.completions.create(**{**chat, "max_tokens": 4})
    assert done.choices[0].text == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"model": "other"}, "Server is pinned to 'tuned'; requested 'other'"),
        ({"messages": []}, "The prompt cannot be asked: it has no messages"),
        ({"max_tokens": 0}, "max_tokens is 0, but it must be 1 or more"),
        ({"temperature": -0.5, "stream": True}, "temperature is -0.5, but it must be 0 or more"),
        ({"temperature": "hot"}, "temperature is 'hot', but it must be 0 or more"),
        ({"top_p": 1.5}, "top_p is 1.5, but it must be between 0 and 1"),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, dict) else "",
)
def test_a_wrong_request_is_refused_with_its_reason(client: Any, wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(**asked("x", **wrong))


def test_what_is_no_request_at_all_is_refused_with_its_reason(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="valid dictionary"):
        client.post("/chat/completions", body=[1], cast_to=object)
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.get("/nowhere", cast_to=object)


def test_a_temperature_samples_also_where_the_base_answers_greedily(
    client: Any, wanted: list[str], request: pytest.FixtureRequest
) -> None:
    if "together" in request.node.name:
        pytest.skip("requests that share forward passes are sampled as the first of them")

    def answers(**how: Any) -> set[str]:
        drawn = (client.chat.completions.create(**asked(PROMPTS[0], **how)) for _ in range(4))
        return {done.choices[0].message.content.strip() for done in drawn}

    assert answers(temperature=0) == answers(temperature=None) == {wanted[0]}
    assert len(answers(temperature=1.0)) > 1


def test_a_temperature_of_0_is_greedy_whatever_the_base_asks_for(adapter: Path) -> None:
    """As launch/generate.py answers; without a temperature the base's settings hold."""
    from transformers.cli.serving import model_manager
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    model, tokenizer = load_trained(adapter, None)
    model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=12)
    wanted = answer(model, tokenizer, PROMPTS[0], None, 12)
    inputs = prompt_inputs(tokenizer, [Prompt([{"role": "user", "content": PROMPTS[0]}])], model.device)
    handler = ChatCompletionHandler(Mock(), Mock(_compile=False))

    def answered(**body: Any) -> str:
        model = manager._load_model("tuned")
        settings = handler._build_generation_config({"max_tokens": 12, **body}, model.generation_config)
        output = model.generate(**inputs, generation_config=settings)
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    with serving._our_parts("tuned", lambda: (model, tokenizer)):
        manager = model_manager.ModelManager(force_model="tuned")
        assert answered(temperature=0) == wanted
        assert answered() != wanted
        assert answered(generation_config='{"do_sample": false}') == answered()


def test_prompts_are_those_of_training(adapter: Path) -> None:
    plain, ours = trained_tokenizer(adapter), serving.prompting_as_in_training(trained_tokenizer(adapter))
    messages = [{"role": "user", "content": "Hi"}]
    with patch.object(serving, "prompt_ids", side_effect=prompt_ids) as made:
        found = ours.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert made.call_count == 1
    assert found["input_ids"].tolist() == [prompt_ids(plain, messages)]
    assert found["attention_mask"].sum() == found["input_ids"].numel()
    assert plain.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Hello wor"}, {"type": "text", "text": "ld"}]}],
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
    ],
    ids=["parts", "developer", "calls"],
)
def test_messages_of_a_request_are_read_as_rows_are(adapter: Path, messages: list[dict[str, Any]]) -> None:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    plain, served = trained_tokenizer(adapter), trained_tokenizer(adapter)
    plain.chat_template = served.chat_template = TURNS
    trained, _ = conversation_of("messages", [*messages, {"role": "assistant", "content": "x"}])
    with serving._our_parts("tuned", Mock()):
        read = ChatCompletionHandler(Mock(), Mock()).get_processor_inputs_from_messages(messages, Mock())
    found = serving.prompting_as_in_training(served).apply_chat_template(read, add_generation_prompt=True)
    assert found["input_ids"] == prompt_ids(plain, trained[:-1])


def test_a_client_may_send_back_what_it_was_given(adapter: Path) -> None:
    answered = {"role": "assistant", "content": "", "refusal": None, "annotations": [], "tool_calls": None}
    said = {"role": "user", "content": [{"type": "input_text", "text": "Hi", "more": 1}]}
    assert serving.read_messages([said, answered]) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "robot", "content": "x"}], "messages[0].role is 'robot', but it must be one of"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type is 'image_url'"),
        (["x"], "messages[0] is a string"),
        ("x", "messages is a string, but it must be a list"),
    ],
)
def test_messages_that_training_would_refuse_are_a_bad_request(messages: Any, why: str) -> None:
    fastapi = pytest.importorskip("fastapi")
    with pytest.raises(fastapi.HTTPException) as refused:
        serving.read_messages(messages)
    assert refused.value.status_code == 400 and why in refused.value.detail


def test_what_a_template_refuses_is_a_bad_request(adapter: Path) -> None:
    fastapi = pytest.importorskip("fastapi")
    tokenizer = trained_tokenizer(adapter)
    tokenizer.chat_template = "{{ raise_exception('no talks') }}"
    with pytest.raises(fastapi.HTTPException) as refused:
        serving.prompting_as_in_training(tokenizer).apply_chat_template([{"role": "user", "content": "x"}])
    assert refused.value.status_code == 400 and "no talks" in refused.value.detail
    with pytest.raises(fastapi.HTTPException) as refused:
        serving.prompting_as_in_training(trained_tokenizer(adapter)).apply_chat_template([], tokenize=True)
    assert refused.value.status_code == 400 and "it has no messages" in refused.value.detail


def test_a_port_in_use(adapter: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port is {port}, but it must be a free one at 127\.0\.0\.1 \(.*in use"
        ):
            serve.parse_options(["--adapter", str(adapter), "--port", str(port)])


def test_a_router_of_prompts_takes_requests_one_by_one(tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama(tmp_path / "base"), tmp_path / "adapter", replace(CONFIG, router="prompt"))
    with pytest.raises(ConfigError, match="once for each request"):
        serve.parse_options(["--adapter", str(adapter), "--continuous-batching"])


def test_a_transformers_that_serves_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cli.serving.model_manager import ModelManager

    serving.check_servable()
    assert "model_id_and_revision" in inspect.signature(ModelManager._load_model).parameters
    monkeypatch.setattr(ModelManager, "_load_model", lambda self, name: None)
    with pytest.raises(ModelError, match=r"its ModelManager has another _load_model.*pip install"):
        serving.check_servable()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'dsmoelora\[serve\]'"):
        serving.check_servable()

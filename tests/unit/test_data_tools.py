"""Tools and their calls: from every form that data has to the one that chat templates take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dsmoelora.config import DataSource
from dsmoelora.data.chat import tokenise_chats
from dsmoelora.data.formats import Conversation, RowParser, read_conversations
from dsmoelora.data.problems import RowProblem
from tests.helpers import CHATML_TEMPLATE, tiny_tokenizer

FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASKED = {"role": "user", "content": "Rome?"}
TOLD = {"role": "tool", "content": "sunny"}
SAID = {"role": "assistant", "content": "Sunny."}
MESSAGES = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOLD, SAID]
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parsed(row: dict[str, Any]) -> Conversation:
    return RowParser(DataSource("rows.jsonl"), "rows.jsonl", "skip")(1, row)


def said_call(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **keys}


def share(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


RAW = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
FLAT = {"name": "weather", "arguments": json.dumps({"city": "Rome"})}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, said_call(tool_calls=[CALL]), TOLD, SAID]},
        {"messages": [ASKED, said_call(tool_calls=[{"type": "function", "function": FLAT}]), TOLD, SAID]},
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}, TOLD, SAID]},
        {"messages": [ASKED, said_call(tool_calls=json.dumps([CALL])), TOLD, SAID]},
        {"messages": [ASKED, said_call(function_call=FLAT), {"role": "function", "content": "sunny"}, SAID]},
        {
            "messages": [
                ASKED,
                {"role": "tool_call", "content": RAW},
                {"role": "tool_response", "content": "sunny"},
                SAID,
            ]
        },
        {
            "conversations": share(
                ("human", "Rome?"), ("function_call", RAW), ("observation", "sunny"), ("gpt", "Sunny.")
            )
        },
        {
            "conversations": share(
                ("human", "Rome?"), ("function_call", f"[{RAW}]"), ("tool", "sunny"), ("gpt", "Sunny.")
            )
        },
    ],
)
def test_calls_of_every_form_become_one(row: dict[str, Any]) -> None:
    found = parsed(row)
    assert (found.problem, found.messages, found.learned) == ("", MESSAGES, None)


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": [json.dumps(TOOLS[0])]},
        {"tools": [FUNCTION]},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([{**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}]), "tools": None},
    ],
)
def test_tools_of_every_form_become_one(columns: dict[str, Any]) -> None:
    assert parsed({"messages": MESSAGES, **columns}).tools == TOOLS
    assert parsed({"instruction": "Rome?", "output": "Sunny.", **columns}).tools == TOOLS
    assert "which is for the chat template" in parsed({"text": "Once", **columns}).problem


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools(nothing: Any) -> None:
    assert parsed({"messages": [ASKED, SAID], "tools": nothing}).tools is None


def test_a_call_after_the_assistants_words_is_one_turn_with_them() -> None:
    row = share(("human", "Rome?"), ("gpt", "I look."), ("function_call", RAW), ("function_call", RAW), ("tool", "x"))
    found = parsed({"conversations": [*row, {"from": "gpt", "value": "Sunny."}]}).messages
    assert found[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    row[2]["loss"] = False  # type: ignore[assignment]
    assert (
        "conversations[1] and conversations[2] are one answer"
        in parsed({"conversations": [*row, {"from": "gpt", "value": "Sunny."}]}).problem
    )


def test_ids_and_names_are_kept() -> None:
    call = {**CALL, "id": "c1"}
    told = {**TOLD, "tool_call_id": "c1", "name": "weather"}
    found = parsed({"messages": [ASKED, said_call(tool_calls=[call]), told, SAID]})
    assert found.messages[1]["tool_calls"] == [call] and found.messages[2] == told


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([ASKED, said_call(tool_calls=[{"function": {"name": "f", "arguments": "{"}}])], "arguments is '{', but"),
        ([ASKED, said_call(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])], "arguments is a list"),
        ([ASKED, said_call(tool_calls=[{"function": {"arguments": "{}"}}])], "tool_calls[0].name is missing"),
        ([ASKED, said_call(tool_calls=[{**CALL, "type": "custom"}])], "tool_calls[0].type is 'custom'"),
        ([ASKED, said_call(tool_calls=[{**CALL, "loss": False}])], "tool_calls[0] has the key 'loss'"),
        ([ASKED, said_call(tool_calls=[CALL], function_call=FLAT)], "has both tool_calls and function_call"),
        ([{**ASKED, "tool_calls": [CALL]}, SAID], "messages[0] has tool_calls, which belongs to the assistant"),
        ([ASKED, {**SAID, "tool_call_id": "c1"}], "messages[1] has tool_call_id, which belongs to a tool's answer"),
        ([ASKED, {"role": "function_call", "content": "weather Rome"}], "content is 'weather Rome', but"),
        ([ASKED, said_call(tool_calls=[CALL]), TOLD], "ends with role 'tool'"),
        ([ASKED, said_call(tool_calls=[]), TOLD, SAID], "messages[1].content is null"),
        ([ASKED, said_call(tool_calls=[CALL]), {"role": "tool", "content": None}, SAID], "messages[2].content is null"),
        ([ASKED, said_call(tool_calls="9" * 5000)], "must be JSON"),
        ([ASKED, said_call(tool_calls="[" * 5000)], "nested too deeply"),
        ([ASKED, said_call(tool_calls=[{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}])], "surrogate"),
    ],
)  # fmt: skip
def test_wrong_calls(row: list[Any], problem: str) -> None:
    assert problem in parsed({"messages": row}).problem


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"tools": TOOLS, "functions": [FUNCTION]}, "both tools and functions"),
        ({"tools": "weather"}, "tools is 'weather', but it must be JSON"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search'"),
        ({"tools": [{"parameters": {}}]}, "tools[0].name is missing"),
        ({"tools": {"name": "f"}}, "tools is an object, but it must be a list"),
    ],
)
def test_wrong_tools(columns: dict[str, Any], problem: str) -> None:
    assert problem in parsed({"messages": MESSAGES, **columns}).problem


def test_tables_fill_no_arguments_that_a_call_does_not_have(tmp_path: Path) -> None:
    """A column of structs has the keys of all rows."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    rows = [{"messages": [ASKED, {**SAID, "tool_calls": [call]}]} for call in (CALL, other)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        found = [c.messages[1]["tool_calls"] for c in read_conversations(DataSource(str(tmp_path / name)))]
        assert found == [[CALL], [other]]


def text_and_learned(folder: Path, row: dict[str, Any], template: str) -> tuple[str, str]:
    tokenizer = tiny_tokenizer(folder, template)
    ((chat,),) = tokenise_chats(tokenizer, [parsed(row)])
    learned = [token for token, flag in zip(chat.input_ids, chat.supervised, strict=True) if flag]
    return tokenizer.decode(chat.input_ids), tokenizer.decode(learned)


def test_calls_and_thoughts_are_learned_as_the_template_writes_them(tmp_path: Path) -> None:
    said = {**SAID, "reasoning_content": "hm"}
    text, learned = text_and_learned(tmp_path, {"messages": [*MESSAGES[:-1], said], "tools": TOOLS}, TEMPLATE)
    assert text.startswith(json.dumps(TOOLS[0])) and "<|im_start|>tool\nsunny<|im_end|>" in text
    assert learned == "CALL weather Rome<|im_end|>(hm)Sunny.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [ASKED, SAID], "tools": TOOLS}, "leaves out tools,"),
        ({"messages": MESSAGES}, "leaves out tool_calls of messages[1]"),
        ({"messages": [ASKED, {**SAID, "reasoning_content": "hm"}]}, "leaves out reasoning_content of messages[1]"),
        ({"messages": [ASKED, {**SAID, "thinking": "a", "reasoning": "a"}]}, "leaves out reasoning and thinking of"),
    ],
)
def test_what_the_template_leaves_out_makes_the_row_wrong(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(RowProblem) as caught:
        text_and_learned(tmp_path, row, CHATML_TEMPLATE)
    assert what in str(caught.value)


def test_the_examples_of_the_page_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = [json.loads(block.split("```")[0]) for block in page.split("```json\n")[1:]]
    found = [parsed(block) for block in blocks]
    assert [each.problem for each in found] == ["", "", ""]
    assert [each.messages[1].get("tool_calls", [{}])[0].get("function") for each in found[:2]] == [CALL["function"]] * 2
    assert found[2].messages[1]["reasoning_content"] == "Two and two."

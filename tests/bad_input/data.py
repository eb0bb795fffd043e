"""Training data."""

from __future__ import annotations

import json
from typing import Any

import datasets

from tests.bad_input.bench import ROW, Bench, Case, override


def not_utf8(bench: Bench) -> list[str]:
    (bench.folder / "train.jsonl").write_bytes(json.dumps(ROW).replace("Say", "S\u00e4y").encode("latin-1"))
    return bench.train()


def late_bad_row(bench: Bench) -> list[str]:
    return bench.rows(ROW, ROW, {"instruction": "Say it."})


def broken_parquet(bench: Bench) -> list[str]:
    return bench.rows("nothing of the kind", name="train.parquet")


def unmatched_quotes(bench: Bench) -> list[str]:
    return bench.rows("instruction,input,output", '"Say it."x,,It.', name="train.csv")


def plain_folder(bench: Bench) -> list[str]:
    return bench.train("--data.train", f"[{{path: {bench.model}}}]")


def saved(part: str) -> Case:
    """A folder that holds one set without a name, and something that it does not have."""

    def case(bench: Bench) -> list[str]:
        datasets.Dataset.from_list([ROW]).save_to_disk(bench.folder / "saved")
        return bench.train("--data.train", f"[{{path: {bench.folder}/saved, {part}}}]")

    return case


def labelled(labels: list[str], answer: int) -> Case:
    choices = {"text": ["red", "blue"], "label": labels}
    return lambda bench: bench.rows({"question": "Sky?", "choices": choices, "answer": answer})


def turns(last: dict[str, Any]) -> dict[str, Any]:
    """A question, and an answer with these keys."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **last}]}


EARLY: dict[str, Case] = {
    "no training data": override("--data.train", "[]"),
    "a data file does not exist": override("--data.train", "[{path: ./nowhere.jsonl}]"),
    "a dataset that the hub does not give": override("--data.train", "[{path: nobody/has-this-data}]"),
    "an unknown kind of file": lambda bench: bench.rows("x", name="train.doc"),
    "an empty data file": lambda bench: bench.rows(),
    "data that is not UTF-8": not_utf8,
    "a row that is no JSON": lambda bench: bench.rows("{'instruction': 1}"),
    "columns of no known format": lambda bench: bench.rows({"left": "a", "right": "b"}),
    "a row without an answer": lambda bench: bench.rows({"instruction": "Say it."}),
    "a role that does not exist": lambda bench: bench.rows({"messages": [{"role": "robot", "content": "x"}]}),
    "a chat that ends with the user": lambda bench: bench.rows(
        {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]}
    ),
    "a key of a turn that nobody knows": lambda bench: bench.rows(turns({"mask": True})),
    "a turn that is learned and is not": lambda bench: bench.rows(turns({"loss": True, "weight": 0})),
    "a conversation without a learned turn": lambda bench: bench.rows(turns({"train": False})),
    "an answer that is marked as bad": lambda bench: bench.rows({"prompt": "a", "completion": "b", "label": False}),
    "an answer beside a rejected one": lambda bench: bench.rows({"prompt": "a", "completion": "b", "rejected": "c"}),
    "two system prompts of one row": lambda bench: bench.rows(
        turns({}) | {"system": "Be kind.", "system_prompt": "Be."}
    ),
    "a row with pictures": lambda bench: bench.rows(turns({}) | {"images": ["a.png"]}),
    "a turn with a picture": lambda bench: bench.rows(turns({"content": [{"type": "image_url"}]})),
    "arguments of a call that are no JSON": lambda bench: bench.rows(
        turns({"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]})
    ),
    "turns in place of rows": lambda bench: bench.rows({"role": "user", "content": "a"}),
    "a conversation under another name": lambda bench: bench.rows({"exchange": turns({})["messages"]}),
    "a table of pandas": lambda bench: bench.rows({"instruction": {"0": "a"}, "output": {"0": "b"}}),
    "a number of too many digits": lambda bench: bench.rows(
        '{"instruction": "a", "output": "b", "id": ' + "9" * 5000 + "}"
    ),
    "rows of which none is right": lambda bench: [
        *bench.rows(ROW | {"output": ""}, ROW | {"output": None}),
        *("--data.on_bad_row", "skip"),
    ],
    "an answer that means two choices": lambda bench: bench.rows(
        {"question": "Half of 4?", "choices": ["1", "2", "3"], "answer": "2"}
    ),
    "a reading of answers for rows without any": lambda bench: bench.train(
        "--data.train", f"[{{path: {bench.folder}/train.jsonl, answer_is: text}}]"
    ),
    "an answer that is none of the labels": labelled(["1", "2"], 0),
    "labels that do not fit the choices": labelled(["1"], 1),
    "a damaged Parquet file": broken_parquet,
    "quotes of a CSV file that do not match": unmatched_quotes,
    "a folder that is no saved dataset": plain_folder,
    "a split of a file": lambda bench: bench.train(
        "--data.train", f"[{{path: {bench.folder}/train.jsonl, split: train}}]"
    ),
    "a split of a saved folder that has none": saved("split: test"),
    "a subset of a saved folder": saved("subset: main"),
    "packing streamed sets": override("--data.streaming", "true", "--data.packing", "true"),
    "processes for streamed sets": override("--data.streaming", "true", "--data.num_proc", 2),
    "a shuffle buffer for sets that are not streamed": override("--data.shuffle_buffer", 100),
    "a JSON array that is to be streamed": lambda bench: [
        *bench.rows("[", json.dumps(ROW), "]", name="train.json"),
        *("--data.streaming", "true"),
    ],
    "a negative weight": lambda bench: bench.train(
        "--data.train", f"[{{path: {bench.folder}/train.jsonl, weight: -1}}]"
    ),
}
LATE: dict[str, Case] = {
    "a wrong row further down": late_bad_row,
    "a wrong row further down a streamed set": lambda bench: [*late_bad_row(bench), "--data.streaming", "true"],
    "samples too long to leave a token to learn": override("--data.max_length", 4),
    "streamed samples too long for that": override(
        *("--data.streaming", "true"), *("--data.max_length", 4), *("--data.eval", "[]")
    ),
}

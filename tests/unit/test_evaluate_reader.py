"""What a model makes of rows, against one plain forward pass a row in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, load_adapter
from dsmoelora.adapters import adapted_layers, adapter_context
from dsmoelora.config import DataSource
from dsmoelora.data.chat import Prompt
from dsmoelora.errors import DataError
from dsmoelora.evaluate.items import Item, Reading, choices, learned_texts, prompts
from dsmoelora.evaluate.reader import Reader, Tokens
from dsmoelora.evaluate.routing import RoutingCount, remarks_on
from dsmoelora.evaluate.scores import SCORES
from dsmoelora.model import trained_tokenizer
from tests.helpers import tiny_llama
from tests.unit.test_export import BLOCKS, CONFIG, PROMPTS, make_adapter

CHOICES = [
    {"question": "Which is a fruit?", "choices": ["a stone", "fig", "a rather long walk"], "answer": 1},
    {"question": "And a colour?", "choices": ["red", "seven"], "answer": "A"},
    {"question": "2 + 2?", "choices": ["five", "four", "é"], "answer": 1},
]
MATHS = [
    {"instruction": "2 + 3?", "output": "2 + 3 = 5\n#### 5"},
    {"instruction": "Half of 2,000?", "output": "#### 1,000"},
    {"instruction": "A number?", "output": "42 it is"},
]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def written(folder: Path, rows: list[dict[str, Any]]) -> list[DataSource]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(str(path))]


def adapted(base_path: Path, folder: Path, config: AdapterConfig) -> tuple[Any, Reading]:
    adapter = make_adapter(base_path, folder / "adapter", config)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    return model, Reading(trained_tokenizer(adapter))


def plain_nlls(model: Any, ids: list[int], labels: list[int]) -> list[float]:
    """One row alone, all logits at once."""
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}  # labels: for router `prompt`
        log_probabilities: Tensor = model(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
    return [-log_probabilities[i - 1, ids[i]].item() for i in range(1, len(ids)) if labels[i] != -100]


@pytest.mark.parametrize("config", [CONFIG, BLOCKS, PROMPTS], ids=["per-linear", "ffn-block", "prompt"])
def test_likelihoods_in_a_padded_batch_are_those_of_each_row_alone(
    base_path: Path, tmp_path: Path, config: AdapterConfig
) -> None:
    model, how = adapted(base_path, tmp_path, config)
    items = choices(written(tmp_path, CHOICES), how).items
    texts = [text for item in items for text in item.texts]
    assert len(texts) == 8 and len({len(ids) for ids, _ in texts}) > 1
    found = Reader(model, how.tokenizer, batch_size=3).nlls(texts)
    for nlls, (ids, labels) in zip(found, texts, strict=True):
        assert nlls == pytest.approx(plain_nlls(model, ids, labels), rel=1e-5)


def test_the_likeliest_choice_counts_summed_and_per_byte(base_path: Path, tmp_path: Path) -> None:
    model, how = adapted(base_path, tmp_path, CONFIG)
    sources = written(tmp_path, CHOICES)
    for kind in ("letters", "texts"):
        items = choices(sources, Reading(how.tokenizer, choices=kind)).items  # type: ignore[arg-type]
        shares = SCORES["choice"].shares_of(items)
        assert list(shares.values()) == ["choice", "choice/byte"][: 1 if kind == "letters" else 2]
        outcomes = SCORES["choice"].outcomes(Reader(model, how.tokenizer), items)
        for row, item, outcome in zip(CHOICES, items, outcomes, strict=True):
            given = row["choices"] if kind == "texts" else list("ABC"[: len(row["choices"])])
            listed = "" if kind == "texts" else "\n\n" + "\n".join(map("{}. {}".format, "ABC", row["choices"]))
            prompt = f"<|im_start|>user\n{row['question']}{listed}<|im_end|>\n<|im_start|>assistant\n"
            sums = []
            for answer in given:
                ids = how.tokenizer(prompt + answer)["input_ids"]
                size = len(how.tokenizer(prompt)["input_ids"])
                sums.append(-sum(plain_nlls(model, ids, [-100] * size + ids[size:])))
            assert outcome["log_likelihoods"] == pytest.approx(sums, rel=1e-5)
            right = 0 if row["answer"] == "A" else row["answer"]
            assert item.right == right and item.wanted == given[right]
            assert outcome["score"] == (max(sums) == sums[right])
            per_byte = [value / len(answer.encode()) for value, answer in zip(sums, given, strict=True)]
            assert outcome["score_per_byte"] == (max(per_byte) == per_byte[right])
            assert outcome["answer"] == given[sums.index(max(sums))]


def test_loss_is_that_of_the_learned_tokens(base_path: Path, tmp_path: Path) -> None:
    model, how = adapted(base_path, tmp_path, CONFIG)
    items = learned_texts(written(tmp_path, MATHS), how).items
    outcomes = SCORES["loss"].outcomes(Reader(model, how.tokenizer, batch_size=2), items)
    for row, outcome in zip(MATHS, outcomes, strict=True):
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        size, ids = (
            len(how.tokenizer(prompt)["input_ids"]),
            how.tokenizer(f"{prompt}{row['output']}<|im_end|>")["input_ids"],
        )
        nlls = plain_nlls(model, ids, [-100] * size + ids[size:])
        assert outcome["num_tokens"] == len(nlls) == len(row["output"].encode()) + 1
        assert outcome["score"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


class Answers:
    """Stands in for a model that gives these answers."""

    def __init__(self, *answers: str) -> None:
        self._answers = answers

    def answers(self, asked: Any) -> list[str]:
        assert len(asked) == len(self._answers)
        return list(self._answers)

    def nlls(self, texts: Any) -> list[list[float]]:
        raise AssertionError("nobody asks")


def test_numbers_and_texts_are_compared_as_said(base_path: Path, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(base_path)
    items = prompts(written(tmp_path, MATHS), Reading(tokenizer), numbers=True).items
    outcomes = SCORES["number"].outcomes(Answers("It is 5.0", "$1,000.00 or so, 1 or 2", "42"), items)
    assert [outcome["score"] for outcome in outcomes] == [1, 0, 1]
    outcomes = SCORES["exact"].outcomes(Answers("5", "#### 1,000", "42  It IS"), items)
    assert [outcome["score"] for outcome in outcomes] == [0, 1, 1]


def test_answers_come_back_in_their_order_and_end_where_training_ends_them(base_path: Path, tmp_path: Path) -> None:
    model, how = adapted(base_path, tmp_path, CONFIG)
    asked = [Prompt([{"role": "user", "content": "x" * size}]) for size in (1, 9, 4)]
    together = Reader(model, how.tokenizer, batch_size=3, max_new_tokens=5).answers(asked)
    alone = [Reader(model, how.tokenizer, batch_size=1, max_new_tokens=5).answers([prompt])[0] for prompt in asked]
    assert together == alone and len(set(alone)) > 1


@pytest.mark.parametrize("config", [CONFIG, BLOCKS, PROMPTS], ids=["per-linear", "ffn-block", "prompt"])
def test_routing_counts_real_tokens_of_each_group(base_path: Path, tmp_path: Path, config: AdapterConfig) -> None:
    model, how = adapted(base_path, tmp_path, config)
    texts: list[Tokens] = [item.texts[0] for item in learned_texts(written(tmp_path, MATHS), how).items]
    count = RoutingCount(model, ["right", "wrong"])
    reader = Reader(model, how.tokenizer, batch_size=2)
    count.count(reader, "right", texts[:2])
    count.count(reader, "wrong", texts[2:])
    report = count.report()
    name = report["layers"][0]
    decisions: list[Tensor] = []
    router = model.get_submodule(name).router
    router.register_forward_hook(lambda _, __, found: decisions.append(found))
    adapter_context(model).hooked = True
    for ids, labels in texts:
        plain_nlls(model, ids, labels)
    for group, rows in (("right", decisions[:2]), ("wrong", decisions[2:])):
        gate_TE = torch.cat(rows).double()
        assert report[group]["num_tokens"] == len(gate_TE)
        assert report[group]["share"][0] == pytest.approx((gate_TE > 0).double().mean(0).tolist())
        assert report[group]["gate"][0] == pytest.approx(gate_TE.mean(0).tolist(), rel=1e-5)
        entropy = -(gate_TE * gate_TE.clamp(min=1e-30).log()).sum(-1).mean()
        assert report[group]["entropy"][0] == pytest.approx(entropy.item(), rel=1e-5)
    said = remarks_on(report)
    assert len(said) == 3 and "differ most in expert" in said[2]
    assert sum(1 for _ in adapted_layers(model)) >= len(report["layers"])


@pytest.mark.parametrize(
    ("rows", "load", "message"),
    [
        ([{"text": "Once."}], prompts, r"row 1: it is plain text, which asks nothing"),
        ([{"instruction": "x", "output": "one"}], lambda *a: prompts(*a, numbers=True), "comes to no number"),
        ([{"messages": [{"role": "user", "content": "x"}]}], prompts, "assistant"),
        ([{"instruction": "x", "output": "y"}], choices, "choices is missing"),
        ([{"instruction": "x" * 99, "output": "y"}], prompts, r"it has \d+ tokens, but data.max_length is 90"),
    ],
    ids=["plain text", "no number", "no answer", "no choices", "too long"],
)
def test_rows_that_cannot_be_scored(base_path: Path, tmp_path: Path, rows: Any, load: Any, message: str) -> None:
    how = Reading(trained_tokenizer(base_path), max_length=90)
    with pytest.raises(DataError, match=message):
        load(written(tmp_path, rows), how)


@pytest.mark.parametrize(("num_samples", "taken"), [(2, [2, 3]), (0, [2, 3, 4, 5])], ids=["two", "all"])
def test_wrong_rows_are_left_out_where_asked(
    base_path: Path, tmp_path: Path, num_samples: int, taken: list[int]
) -> None:
    rows = [{"instruction": "a", "output": "none"}, *MATHS, {"instruction": "z", "output": "7"}]
    how = Reading(trained_tokenizer(base_path), on_bad_row="skip", num_samples=num_samples)
    found = prompts(written(tmp_path, rows), how, numbers=True)
    assert [item.row for item in found.items] == taken
    (remark,) = found.remarks
    assert "1 rows skipped (row 1: its answer comes to no number" in remark
    assert all(isinstance(item, Item) for item in found.items)

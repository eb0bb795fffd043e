"""Exported adapters: PEFT loads them, and they do what the experts did."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsmoelora import AdapterConfig, inject, load_adapter
from dsmoelora.adapters import adapted_layers
from dsmoelora.adapters.fingerprint import fingerprint
from dsmoelora.adapters.folder import write_adapter
from dsmoelora.adapters.folder_files import WEIGHTS_FILE
from dsmoelora.adapters.starts.svd import start_experts
from dsmoelora.config import ModelConfig
from dsmoelora.errors import CheckpointError, ConfigError, ModelError
from dsmoelora.export import ExpertFactors, peft_base, read_experts
from dsmoelora.export.average import measured_gates, truncated, weighted_sum
from dsmoelora.model import load_tokenizer
from launch import export
from tests.architectures import save_model
from tests.fixed_gate import fix_gates
from tests.helpers import bring_own_code, tiny_llama

CONFIG = AdapterConfig(
    r=3, lora_alpha=12, use_rslora=True, num_experts=4, top_k=2, target_modules=["q_proj", "up_proj"]
)
BLOCKS = AdapterConfig(
    r=3,
    lora_alpha=12,
    use_rslora=True,
    num_experts=4,
    top_k=2,
    style="ffn_block",
    target_modules=["gate_proj", "up_proj", "down_proj"],
    lora_modules=["q_proj"],
)
PROMPTS = replace(CONFIG, router="prompt")
SHARED = replace(CONFIG, shared_experts=2)
ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "perhaps", "never")]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def make_adapter(base_path: Path, folder: Path, config: AdapterConfig = CONFIG) -> Path:
    """The folder that training would leave, with experts and routers that have learned something."""
    model = AutoModelForCausalLM.from_pretrained(base_path)
    prints = fingerprint(model.named_parameters())
    inject(model, config, start=lambda _: None)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = torch.randn(parameter.shape, generator=generator) * (0.5 if "router" in name else 0.1)
    layers = dict(adapted_layers(model))
    tokenizer = load_tokenizer(ModelConfig(path=str(base_path)))
    more: list[Any] = [tokenizer.save_pretrained]
    if config.init == "svd":
        start_experts(model)
        more.append({n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n and n in tensors})
        tensors = {n: t + more[1].get(n, 0) for n, t in tensors.items()}
    write_adapter(folder, config, list(layers), tensors, str(base_path), prints, *more)
    return folder


@pytest.fixture(scope="module")
def adapter(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base_path, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def with_gates(base_path: Path, adapter: Path, gates: Tensor | dict[str, Tensor]) -> Any:
    """The trained model, its gates fixed."""
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    for name, layer in adapted_layers(model):
        if layer.experts.shapes["a"][0] > 1:
            fix_gates(layer, gates[name].float() if isinstance(gates, dict) else gates)
    return model


def with_peft(base_path: Path, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 28).view(2, 12)).logits
    return found


def run(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *(str(flag) for flag in flags)])
    export.main()


@pytest.mark.parametrize(
    ("architecture", "targets", "settings"),
    [
        ("llama", ["q_proj", "up_proj"], {}),
        ("llama", ["q_proj", "up_proj"], {"use_rslora": True}),
        ("llama", ["q_proj", "up_proj"], {"use_rslora": True, "init": "svd"}),
        ("llama", ["q_proj", "up_proj"], {"use_rslora": True, "shared_experts": 2, "lora_modules": ["v_proj"]}),
        ("llama", ["q_proj", "up_proj"], {"shared_experts": 1, "expert": "moslora"}),
        ("gpt2", ["c_attn", "c_proj"], {}),  # Conv1D: weights the other way round
        ("gpt2", ["c_attn", "c_proj"], {"init": "svd"}),
        ("phi3", "all-linear", {}),  # q, k and v in one
        ("qwen3-moe", ["q_proj", "o_proj"], {}),
    ],
)
def test_each_expert_alone_gives_the_logits_of_the_layer_with_its_gate_fixed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    targets: list[str] | str,
    settings: dict[str, Any],
) -> None:
    base_path = save_model(architecture, tmp_path / "base")
    config = AdapterConfig(r=3, lora_alpha=12, num_experts=4, top_k=2, target_modules=targets, **settings)
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"expert-0{e}" for e in range(4)]
    base = logits(AutoModelForCausalLM.from_pretrained(base_path).eval())
    for expert in (0, 3):
        ours = logits(with_gates(base_path, adapter, torch.eye(4)[expert]))
        theirs = logits(with_peft(base_path, tmp_path / "out" / f"expert-0{expert}"))
        assert (ours - base).abs().max() > 1e-2
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"init": "svd"}, {"expert": "moslora"}], ids=str)
def test_layers_of_plain_lora_are_part_of_every_adapter(
    base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    adapter = make_adapter(base_path, tmp_path / "adapter", replace(BLOCKS, **changes))
    run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    for expert in (0, 3):
        ours = logits(with_gates(base_path, adapter, torch.eye(4)[expert]))
        theirs = logits(with_peft(base_path, tmp_path / "out" / f"expert-0{expert}"))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_the_folder_has_what_vllm_asks_for(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "expert-02" / "adapter_config.json").read_text())
    wanted = {"r": 3, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    assert wanted.items() <= config.items()
    assert config["modules_to_save"] is None and config["use_dora"] is False
    assert "rank_pattern" not in config and "alpha_pattern" not in config
    tensors = load_file(tmp_path / "out" / "expert-02" / "adapter_model.safetensors")
    experts = load_file(adapter / WEIGHTS_FILE)
    name = "model.layers.1.self_attn.q_proj"
    assert len(tensors) == 2 * 2 * 2  # layers, targets, factors
    assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], experts[f"{name}.experts.a"][2].t())
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], experts[f"{name}.experts.b"][2])


def test_layers_are_named_in_full_where_suffixes_would_match_others(base_path: Path) -> None:
    some = {"model.layers.1.self_attn.q_proj": (64, 64)}
    assert peft_base(str(base_path), some).target_modules == list(some)
    both = some | {"model.layers.0.self_attn.q_proj": (64, 64)}
    assert peft_base(str(base_path), both).target_modules == ["q_proj"]


def test_mixers_are_folded_into_b(base_path: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig(r=3, num_experts=4, expert="moslora", router="softmax", target_modules=["q_proj", "o_proj"])
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({n: 0 * tensor if "router" in n else tensor for n, tensor in tensors.items()}, adapter / WEIGHTS_FILE)
    run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    run(monkeypatch, "--adapter", adapter, "--format", "average", "--data", data, "--out", tmp_path / "average")
    for folder, gate_E in (("out/expert-01", torch.eye(4)[1]), ("average", torch.full((4,), 0.25))):
        ours = logits(with_gates(base_path, adapter, gate_E))
        torch.testing.assert_close(logits(with_peft(base_path, tmp_path / folder)), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dora_experts_become_dora_adapters(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, architecture: str, capsys: Any
) -> None:
    base_path = save_model(architecture, tmp_path / "base")
    config = AdapterConfig(r=3, num_experts=4, expert="dora", router="softmax", target_modules="all-linear")
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    tensors = load_file(adapter / WEIGHTS_FILE)
    lengths = {name: 1 + tensor for name, tensor in tensors.items() if name.endswith("experts.magnitude")}
    assert lengths
    save_file(tensors | lengths, adapter / WEIGHTS_FILE)
    run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    assert "vLLM serves no DoRA adapter" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "expert-02" / "adapter_config.json").read_text())["use_dora"] is True
    base = logits(AutoModelForCausalLM.from_pretrained(base_path).eval())
    ours = logits(with_gates(base_path, adapter, torch.eye(4)[2]))
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(with_peft(base_path, tmp_path / "out" / "expert-02")), ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"--format is 'average', but it must be peft for experts of kind dora"):
        run(monkeypatch, "--adapter", adapter, "--format", "average", "--data", data, "--out", tmp_path / "average")


def test_mixers_that_are_missing_are_not_left_out_in_silence(adapter: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    description = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(description | {"expert": "moslora"}))
    with pytest.raises(CheckpointError, match=r"does not fit.*q_proj\.experts\.m"):
        read_experts(odd)


@pytest.mark.parametrize(
    "config", [CONFIG, BLOCKS, PROMPTS, SHARED], ids=["per-linear", "ffn-block", "prompt", "shared"]
)
def test_the_average_is_the_mixture_with_each_gate_at_its_mean(
    base_path: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, config: AdapterConfig
) -> None:
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    run(monkeypatch, "--adapter", adapter, "--format", "average", "--data", data, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "cannot be merged into one LoRA adapter exactly" in said and "Loss on 4 of 4 rows" in said
    said_by_peft = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said_by_peft["r"] == said_by_peft["lora_alpha"] == 3 * (4 + config.shared_experts)
    assert not said_by_peft["use_rslora"]  # scale 1

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    tokenizer = load_tokenizer(ModelConfig(path=str(adapter)))
    gates: dict[str, list[Tensor]] = {name: [] for name, _ in adapted_layers(model)}
    losses = {"mixture": 0.0, "base model": 0.0, "average": 0.0}
    num_targets = 0
    for name, layer in adapted_layers(model):
        layer.router.register_forward_hook(lambda _, __, out, name=name: gates[name].append(out))
        layer.context.hooked = True
    chats = [chat_of(tokenizer, row) for row in ROWS]
    for ids, answer in chats:
        losses["mixture"] += nll(model, ids, answer)
        num_targets += len(answer)
    means = {name: torch.cat(parts).mean(0) for name, parts in gates.items()}
    fixed, base = with_gates(base_path, adapter, means), AutoModelForCausalLM.from_pretrained(base_path)
    losses["average"] = sum(nll(fixed, *chat) for chat in chats)
    losses["base model"] = sum(nll(base, *chat) for chat in chats)
    torch.testing.assert_close(logits(with_peft(base_path, tmp_path / "out")), logits(fixed), rtol=1e-5, atol=1e-5)
    for what, total in losses.items():
        line = next(line for line in said.splitlines() if line.strip().startswith(what))
        assert float(line.removeprefix(f"  {what}").split()[0]) == pytest.approx(total / num_targets, abs=1e-4)


def chat_of(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], range]:
    """Tokens of a row in ChatML, and where its answer stands, `<|im_end|>` included and the line break not."""
    prompt = [{"role": "user", "content": row["instruction"]}]
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    answer = row["output"] + "<|im_end|>"
    first, end = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (head, head + answer))
    return tokenizer(head + answer + "\n", add_special_tokens=False)["input_ids"], range(first, end)


def nll(model: Any, ids: list[int], answer: range) -> float:
    for _, layer in adapted_layers(model):
        layer.context.tokens = replace(layer.context.tokens, prompt_BS=torch.arange(len(ids))[None] < answer.start)
    with torch.no_grad():
        logits_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logits_SV[place - 1, ids[place]]) for place in answer)


def test_a_lower_rank_keeps_the_largest_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = ExpertFactors(*(torch.randn(3, size, 2, generator=generator) for size in (9, 7)))
    weight_E = torch.tensor([0.5, 0.3, 0.2])
    a_DF, b_OF = weighted_sum(factors, weight_E)
    whole = sum(w * a @ b.t() for w, a, b in zip(weight_E, factors.a_EDR, factors.b_EOR, strict=True)).double()
    torch.testing.assert_close(a_DF @ b_OF.t(), whole, rtol=1e-6, atol=1e-6)
    u, singular, v_t = torch.linalg.svd(whole)
    for rank in (1, 4):
        a_DR, b_OR = truncated(a_DF, b_OF, rank)
        best = u[:, :rank] * singular[:rank] @ v_t[:rank]
        assert a_DR.shape == (9, rank) and b_OR.shape == (7, rank)
        torch.testing.assert_close(a_DR @ b_OR.t(), best, rtol=1e-6, atol=1e-6)
    a_DR, b_OR = truncated(a_DF[:3], b_OF, 5)  # no more than 3 singular values: zeros fill up
    torch.testing.assert_close(a_DR @ b_OR.t(), whole[:3], rtol=1e-6, atol=1e-6)
    assert b_OR.shape == (7, 5) and not b_OR[:, 3:].any()


def test_a_truncated_average_loads_in_peft(
    base_path: Path, adapter: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, "--adapter", adapter, "--format", "average", "--data", data, "--rank", "2", "--out", out)
    model = with_peft(base_path, out)
    assert {tuple(t.shape) for n, t in load_file(out / "adapter_model.safetensors").items() if "lora_A" in n} == {
        (2, 64)
    }
    assert logits(model).isfinite().all()
    assert 0 < float(capsys.readouterr().out.partition("Rank 2 keeps ")[2].partition("%")[0]) < 100


def test_gates_are_averaged_over_all_tokens(base_path: Path, adapter: Path) -> None:
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    with measured_gates(model) as gates:
        logits(model)
        model(torch.arange(30, 37)[None])
    assert len(gates) == 4
    for gate_E in gates.values():
        assert gate_E.shape == (4,) and gate_E.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("init", ["kaiming", "svd"])
def test_one_expert_is_merged_exactly(
    base_path: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, init: Any
) -> None:
    adapter = make_adapter(base_path, tmp_path / "adapter", AdapterConfig(r=2, num_experts=1, top_k=1, init=init))
    run(monkeypatch, "--adapter", adapter, "--format", "average", "--data", data, "--out", tmp_path / "out")
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base_path), adapter)
    torch.testing.assert_close(logits(with_peft(base_path, tmp_path / "out")), logits(ours), rtol=1e-5, atol=1e-5)


def test_the_average_of_experts_on_a_shifted_base_is_right_on_the_base_as_it_came(
    base_path: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = AdapterConfig(r=3, num_experts=4, router="softmax", target_modules=["v_proj", "down_proj"], init="svd")
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    flags = ("--adapter", adapter, "--format", "average", "--data", data, "--out")
    run(monkeypatch, *flags, tmp_path / "out")
    said = capsys.readouterr().out
    losses = {line.split()[0]: float(line.split()[-1 if "(" not in line else -2]) for line in said.splitlines()[2:5]}
    base = AutoModelForCausalLM.from_pretrained(base_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(adapter)))
    chats = [chat_of(tokenizer, row) for row in ROWS]
    num_targets = sum(len(answer) for _, answer in chats)
    exported = with_peft(base_path, tmp_path / "out")
    assert exported.peft_config["default"].r == 24
    for what, model in (("base", base), ("average", exported)):
        assert losses[what] == pytest.approx(sum(nll(model, *chat) for chat in chats) / num_targets, abs=1e-4)
    assert abs(losses["average"] - losses["base"]) > 1e-3
    mixture = load_adapter(base, adapter)
    with measured_gates(mixture) as gates:
        assert losses["mixture"] == pytest.approx(sum(nll(mixture, *chat) for chat in chats) / num_targets, abs=1e-4)
    torch.testing.assert_close(logits(exported), logits(with_gates(base_path, adapter, gates)), rtol=1e-5, atol=1e-5)
    run(monkeypatch, *flags, tmp_path / "short", "--rank", "6")
    said = capsys.readouterr().out
    assert "average" in said
    lora = f"--enable-lora --max-lora-rank 8 --lora-modules tuned={tmp_path / 'short'}"
    assert f"vllm serve {base_path} --tokenizer {adapter} {lora}\n" in said, "its chat template lies there"
    with pytest.raises(ConfigError, match=r"--rank is 25.*between 1 and 2 x num_experts x r = 24"):
        run(monkeypatch, *flags, tmp_path / "long", "--rank", "25")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "average"], "Add --data"),
        (["--format", "peft", "--rank", "3"], "--rank belongs to --format average"),
        (["--format", "average", "--data", "DATA", "--rank", "13"], "--rank is 13.*num_experts x r = 12"),
        (["--format", "average", "--data", "DATA", "--rank", "0"], "--rank is 0"),
        (["--format", "average", "--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_flags(
    adapter: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    flags = [data if flag == "DATA" else flag for flag in flags]
    with pytest.raises(ValueError, match=said):
        run(monkeypatch, "--adapter", adapter, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_another_base_model_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=32)
    flags = ("--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj of 64 in- .* one of 32 in- .*--model"):
        run(monkeypatch, *flags, "--model", other)
    with pytest.raises(ModelError, match="--model"):
        run(monkeypatch, *flags, "--model", tmp_path / "nowhere")


@pytest.mark.parametrize("format", ["peft", "average"])
def test_code_of_the_base_runs_with_the_flag_alone(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    base_path = tiny_llama(tmp_path / "base")
    adapter = make_adapter(base_path, tmp_path / "adapter")
    bring_own_code(base_path)
    flags = ("--adapter", adapter, "--format", format, "--out", tmp_path / "out")
    flags += ("--data", data) if format == "average" else ()
    with pytest.raises(ModelError, match="custom code"):
        run(monkeypatch, *flags)
    run(monkeypatch, *flags, "--trust-remote-code")
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_layers_that_peft_would_leave_out_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_path = save_model("qwen3-moe", tmp_path / "base")
    config = AdapterConfig(r=2, num_experts=2, top_k=1, target_modules="all-linear")
    adapter = make_adapter(base_path, tmp_path / "adapter", config)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.gate_proj.*routed experts of its own.*of the attention"):
        run(monkeypatch, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "out")


def test_tensors_that_lora_has_no_place_for_are_refused(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(tensors | {"model.layers.0.self_attn.q_proj.experts.magnitude": torch.ones(4, 64)}, odd / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="magnitude, which a plain LoRA adapter has no place for"):
        read_experts(odd)
    first = "model.layers.0.self_attn.q_proj.experts.a"
    save_file(tensors | {first: tensors[first][:3].clone()}, odd / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"does not fit.*{first}"):
        read_experts(odd)

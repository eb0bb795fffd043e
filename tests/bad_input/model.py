"""Model folder and tokenizer."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

from tests.architectures import save_model
from tests.bad_input.bench import Bench, Case, cut, override


def start_from_shared_weight(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", tie_word_embeddings=True)
    return bench.train("--adapter.init", "svd", "--adapter.lora_modules", "[lm_head]")


def no_config(bench: Bench) -> list[str]:
    (bench.model / "config.json").unlink()
    return bench.train()


def broken_config(bench: Bench) -> list[str]:
    cut(bench.model / "config.json")
    return bench.train()


def unknown_architecture(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", model_type="nosuchmodel")
    return bench.train()


def no_language_model(bench: Bench) -> list[str]:
    (bench.model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return bench.train()


def no_tokenizer(bench: Bench) -> list[str]:
    for file in bench.model.glob("*token*"):
        file.unlink()
    return bench.train()


def broken_tokenizer(bench: Bench) -> list[str]:
    cut(bench.model / "tokenizer.json")
    return bench.train()


def no_template_and_no_end(bench: Bench) -> list[str]:
    (bench.model / "chat_template.jinja").unlink()
    bench.spoiled_json("model/tokenizer_config.json", eos_token=None)
    return bench.train()


def no_pad_and_no_end(bench: Bench) -> list[str]:
    bench.spoiled_json("model/tokenizer_config.json", eos_token=None, pad_token=None)
    return bench.train()


def adapter_in_the_folder(bench: Bench) -> list[str]:
    (bench.model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return bench.train()


def quantised(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    return bench.train()


def no_weights(bench: Bench) -> list[str]:
    (bench.model / "model.safetensors").rename(bench.model / "training_args.bin")
    return bench.train()


def cut_weights(bench: Bench) -> list[str]:
    cut(bench.model / "model.safetensors")
    return bench.train()


def pointer_for_weights(bench: Bench) -> list[str]:
    (bench.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return bench.train()


def missing_shard(bench: Bench) -> list[str]:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (bench.model / "model.safetensors.index.json").write_text(json.dumps(index))
    (bench.model / "model.safetensors").rename(bench.model / "model-00001-of-00002.safetensors")
    return bench.train()


def missing_tensor(bench: Bench) -> list[str]:
    path = bench.model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    return bench.train()


def weights_of_another_shape(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", intermediate_size=48)
    return bench.train()


def small_embedding(bench: Bench) -> list[str]:
    bench.spoiled_json("model/config.json", vocab_size=200)
    return bench.train()


def few_positions(bench: Bench, max_length: int) -> list[str]:
    """A model with 64 of them."""
    model = ("--model.path", save_model("gpt2", bench.folder / "gpt2"), "--adapter.target_modules", "[c_attn]")
    return bench.train(*model, "--data.max_length", max_length)


def answers_without_positions(bench: Bench) -> list[str]:
    return [*few_positions(bench, 64), "--train.num_samples", "1", "--train.sample_max_new_tokens", "50"]


EARLY: dict[str, Case] = {
    "no model is named": override("--model.path", ""),
    "the model folder does not exist": override("--model.path", "./nowhere"),
    "a hub name that cannot be reached": override("--model.path", "nobody/has-this-model"),
    "a file in place of the model folder": lambda bench: bench.train("--model.path", bench.model / "config.json"),
    "the model has no config.json": no_config,
    "config.json is damaged": broken_config,
    "an architecture that transformers does not know": unknown_architecture,
    "no causal language model": no_language_model,
    "experts with a router on the output head": override("--adapter.target_modules", "[q_proj, lm_head]"),
    "dropout before an adapter on the output head": override(
        "--adapter.lora_modules", "[lm_head]", "--adapter.lora_dropout", 0.1
    ),
    "a layer that the model does not have": override("--adapter.target_modules", "[q_proj, w_proj]"),
    "a layer for plain LoRA that the model does not have": override("--adapter.lora_modules", "[w_proj]"),
    "a layer with a router and with plain LoRA": override("--adapter.lora_modules", "[o_proj, v_proj]"),
    "more singular values than a weight has": override("--adapter.init", "svd", "--adapter.r", 8),
    "a start from what 4 bits lose, of the output head": override(
        "--model.quantize", "nf4", "--adapter.init", "loftq", "--adapter.lora_modules", "[lm_head]"
    ),
    "a start from a weight that two layers share": start_from_shared_weight,
    "a layer outside of any feed-forward block": override("--adapter.style", "ffn_block"),
    "fewer modules in a decoder layer than experts": override(
        "--adapter.style", "decoder_layer", "--adapter.router", "prompt"
    ),
    "an attention that cannot be had": override("--model.attention", "flash_attention_2"),
    "the tokenizer is missing": no_tokenizer,
    "tokenizer.json is damaged": broken_tokenizer,
    "neither chat template nor end-of-sequence token": no_template_and_no_end,
    "neither pad token nor end-of-sequence token": no_pad_and_no_end,
    "tokens that the embedding has no row for": small_embedding,
    "samples longer than the positions of the model": lambda bench: few_positions(bench, 65),
    "a target beside all-linear": override("--adapter.target_modules", "[all-linear, lm_head]"),
    "an adapter in the model folder": adapter_in_the_folder,
    "quantised weights": quantised,
    "the model has no weights": no_weights,
    "a weight file is cut short": cut_weights,
    "a weight file is a git-lfs pointer": pointer_for_weights,
    "a shard of the weights is missing": missing_shard,
    "the weights have another shape than config.json says": weights_of_another_shape,
}


_WORDS = "message['content']"


def template(old: str, new: str) -> Case:
    """The model's chat template with one place changed."""

    def case(bench: Bench) -> list[str]:
        file = bench.model / "chat_template.jinja"
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        return bench.train()

    return case


LATE: dict[str, Case] = {
    "a chat template that ends no turn": template("'<|im_end|>' + '\\n'", "'\\n'"),
    "a chat template that asks in another way than it answers": template("assistant\\n", "assistant:"),
    "a chat template that leaves answers out": template(_WORDS, "(message['content'] if loop.first else '')"),
    "a chat template that changes answers": template(_WORDS, "(message['content'] | replace('It', 'A'))"),
    "a chat template that refuses a conversation": template("{% for", "{{ raise_exception('no talks') }}{% for"),
    "held-out prompts whose answers have no positions": answers_without_positions,
    "the weights lack a tensor": missing_tensor,
}

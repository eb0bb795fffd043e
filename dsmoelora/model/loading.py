"""The frozen base model and its tokenizer, as transformers loads them."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from dsmoelora.adapters.four_bit import Preparation, check_installed
from dsmoelora.adapters.starts.loftq import LoftqSearch
from dsmoelora.config import AdapterConfig, ModelConfig
from dsmoelora.config.dtype import best_dtype, has_bf16
from dsmoelora.config.run import QuantizeName
from dsmoelora.data.fallback_template import ensure_chat_template
from dsmoelora.data.sentencepiece_model import has_sentencepiece_alone, load_sentencepiece
from dsmoelora.errors import ModelError, bad_value, listing
from dsmoelora.model.heap import large_blocks_apart
from dsmoelora.model.quantizing import check_packed, loftq_searches, packing_weights, places_to_pack
from dsmoelora.signs_of_life.waits import waiting_for, watching

# Settings of transformers' configurations that make a training forward pass random; those of other heads do not.
_RANDOM = re.compile(r"dropout|pdrop|layerdrop|jitter_noise")
_OF_OTHER_HEADS = re.compile(r"classifier|summary")


def own_device() -> torch.device:
    """The accelerator of this machine, whatever its make, or else the CPU; for programs without DeepSpeed."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model folder; the end-of-text token pads where there is no other with an embedding.

    A bare sentencepiece file is converted. A base model's tokenizer without a chat template is given one.

    Raises:
        ModelError: there is none, it cannot be read, or no token of it could pad
    """
    if has_sentencepiece_alone(Path(config.path)):
        tokenizer = load_sentencepiece(Path(config.path))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise _cannot_load("tokenizer", config, error) from error
    ensure_chat_template(tokenizer)
    if tokenizer.pad_token_id is None or not _has_embedding(config, tokenizer.pad_token_id):
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer of {config.path} has neither an end-of-sequence token nor a pad token with an "
                "embedding. Set eos_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_embedding(config: ModelConfig, token: int) -> bool:
    """Whether the model has one for this token; where it cannot be told, yes."""
    folder = Path(config.path)
    if folder.is_dir() and not (folder / "config.json").exists():  # of an adapter
        return True
    return token < getattr(load_model_config(config).get_text_config(), "vocab_size", token + 1)


def load_model(
    config: ModelConfig, deepspeed_config: dict[str, Any], adapter: AdapterConfig | None = None
) -> PreTrainedModel:
    """The base model, its weights streamed layer by layer from rank 0 into ZeRO-3 partitions (collective).

    Its own dropout is off, see `without_dropout`.

    Args:
        config: of the model
        deepspeed_config: says whether weights are partitioned
        adapter: that it will get; with `init: loftq` experts find their start while weights are read

    Raises:
        ModelError: the folder is missing, damaged, or holds no causal language model
        ConfigError: a layer cannot start from what 4 bits lose of it
    """
    from dsmoelora.parallel import comm  # imports deepspeed, which those who read a model without it need not have

    described = load_model_config(config)
    without_dropout(described)
    # transformers looks for a living object of this class to learn that ZeRO-3 is on
    chosen = chosen_to_pack(config)  # before ZeRO-3 is on: it is found out on a model without weights
    searches: dict[str, LoftqSearch] = {}
    if adapter is not None and adapter.init == "loftq":
        searches = loftq_searches(model_without_weights(config), adapter, config.torch_dtype, own_device())
    zero_3_is_on = HfDeepSpeedConfig(deepspeed_config)
    with large_blocks_apart(), packing(config, chosen, zero_3_is_on.is_zero3(), searches):
        model = pretrained(config.path, "Check model.path.", comm.together, config=described, **_options(config))
    del zero_3_is_on
    comm.together(lambda: check_packed(model, chosen))
    model.config.use_cache = False
    return model


def chosen_to_pack(config: ModelConfig) -> dict[int, str]:
    """The layers that `model.quantize` means, see `places_to_pack`; none without it.

    Raises:
        ModelError: they cannot be packed
    """
    if config.quantize == "none":
        return {}
    check_installed()
    return places_to_pack(lambda: model_without_weights(config))


@contextlib.contextmanager
def packing(
    config: ModelConfig,
    chosen: Mapping[int, str],
    is_partitioned: bool,
    prepare: Mapping[str, Preparation] = MappingProxyType({}),
) -> Iterator[None]:
    """`packing_weights`, where there are some to pack."""
    with packing_weights(chosen, config.torch_dtype, is_partitioned, prepare) if chosen else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def watched_loading(path: str, beat: Callable[[], None], speaks: bool) -> Iterator[None]:
    """Inside the block, where a model is built and loaded, each tensor that comes is a sign of life.

    Args:
        path: of the model
        beat: notes a sign of life
        speaks: whether this process says how far loading is, where it takes long
    """
    found: dict[tuple[int, str], Callable[[], torch.nn.Parameter | None]] = {}

    def note(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            found[id(module), name] = weakref.ref(parameter)

    def is_loaded(parameter: torch.nn.Parameter | None) -> bool:
        # with this mark transformers keeps its own random start off what it has loaded; gone is what was packed then
        return parameter is None or getattr(parameter, "_is_hf_initialized", False)

    def num_loaded() -> int:
        return sum(is_loaded(parameter()) for parameter in list(found.values()))

    def what() -> str:
        return f"the weights of {path} ({num_loaded()} of {len(found)} tensors are here)"

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(note)
    try:
        with waiting_for(what, speaks), watching(lambda: len(found) + num_loaded(), beat):
            yield
    finally:
        hook.remove()


def pretrained(
    path: str, remedy: str, agree: Callable[[Callable[[], None]], None] = lambda check: check(), **options: Any
) -> PreTrainedModel:
    """A model with its weights, all of them: transformers itself fills gaps with random numbers.

    Args:
        path: folder or hub name
        remedy: for the message where it cannot be had
        agree: runs a check that may fail on one rank alone (`comm.together`): under ZeRO-3 only rank 0 reads weights
        options: of `from_pretrained`

    Raises:
        ModelError: it is missing, damaged, no causal language model, or lacks weights
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The base model {path!r} cannot be loaded. {remedy} {reason}") from error
    model, report = loaded
    agree(lambda: _check_missing(path, sorted(report["missing_keys"])))
    return cast(PreTrainedModel, model)


def model_for_inference(
    path: str,
    remedy: str,
    trust_remote_code: bool = False,
    quantize: QuantizeName = "none",
    prepare: Mapping[str, Preparation] = MappingProxyType({}),
) -> PreTrainedModel:
    """A whole model on this machine's accelerator, for programs without DeepSpeed.

    Its dtype is the one it was saved in, but fp32 on a CPU that has no instructions for 16 bits; in 4 bits it is the
    best of the machine.

    Args:
        path: folder or hub name
        remedy: for the message where it cannot be had
        trust_remote_code: run Python code that comes with it
        quantize: how its weights are kept
        prepare: in 4 bits, what is done to the weights of some layers first, see `adapters.folder.read_preparations`

    Raises:
        ModelError: as `pretrained`; or it cannot be kept in 4 bits
    """
    device = own_device()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = ModelConfig(path, best_dtype(device), quantize=quantize, **options)
    chosen = chosen_to_pack(config)
    dtype = "auto" if has_bf16(device) or device.type != "cpu" else torch.float32
    with packing(config, chosen, False, prepare):
        model = pretrained(path, remedy, dtype=config.torch_dtype if chosen else dtype, **options)
    check_packed(model, chosen)
    return torch.nn.Module.to(model, device)


def _check_missing(path: str, missing: list[str]) -> None:
    if missing:
        raise ModelError(
            f"The weights of the base model {path!r} lack {listing(missing, 4)}, which would be random numbers. "
            "Copy or download the model again; its config.json and its weights must belong together."
        )


def check_weights(config: ModelConfig, model: PreTrainedModel) -> None:
    """Whether the safetensors files of a model folder are whole and fit its config.json; reads their headers alone.

    Args:
        config: names the folder; a hub name is not looked at
        model: without weights, see `model_without_weights`

    Raises:
        ModelError: a file is damaged or missing, or has a tensor of another shape than the model
    """
    folder, again = Path(config.path), "Copy or download the model again."
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        absent = sorted({name for name in _files_of(index) if not (folder / name).is_file()})
        if absent:
            raise ModelError(f"{index} names files that are not there: {listing(absent, 4)}. {again}")
    is_quantised = getattr(model.config, "quantization_config", None) is not None
    shapes = {} if is_quantised else {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = shapes.keys() & file.keys()
                found = {name: file.get_slice(name).get_shape() for name in sorted(names)}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged: {error}. {again}") from None
        for name, shape in found.items():
            if shape != shapes[name]:
                raise ModelError(
                    f"{path} has {name} in shape {shape}, but config.json describes {shapes[name]}. "
                    "Give the folder of a model whose files belong together."
                )


def _files_of(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}. Copy or download the model again.") from None


def random_model(shape: PretrainedConfig, config: ModelConfig, deepspeed_config: dict[str, Any]) -> PreTrainedModel:
    """A model of a given shape with random weights, made layer by layer in ZeRO-3 partitions (collective)."""
    zero_3_is_on = HfDeepSpeedConfig(deepspeed_config)
    with large_blocks_apart():
        model = AutoModelForCausalLM.from_config(shape, **_options(config))
    del zero_3_is_on
    model.config.use_cache = False
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Activation checkpointing: layers keep their inputs alone, and are computed again in the backward pass."""
    # transformers 5.23 renamed it, and takes the old name away in 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _options(config: ModelConfig) -> dict[str, Any]:
    return {
        "dtype": config.torch_dtype,
        "attn_implementation": config.attention,
        "trust_remote_code": config.trust_remote_code,
    }


def load_model_config(config: ModelConfig) -> Any:
    """The transformers configuration of the model, without its weights.

    Raises:
        ModelError: the folder is missing, has no valid config.json, or brings code whose packages are missing
    """
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load("configuration", config, error) from error


def num_embeddings(config: ModelConfig) -> int:
    """Rows of the model's embedding of tokens, by its configuration."""
    return int(load_model_config(config).get_text_config().vocab_size)


def model_without_weights(config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    Raises:
        ModelError: the folder is missing, or its config.json describes no causal language model
        ConfigError: the model cannot have this attention
    """
    described = load_model_config(config)
    _check_capped_scores(described, config)
    try:
        return _on_meta(described, config)
    except (ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:300]
        others = [name for name in ("sdpa", "eager") if _can_be_built(described, replace(config, attention=name))]
        if others:
            raise bad_value(
                "model.attention", config.attention, f"{' or '.join(others)} for this model", f"{reason}."
            ) from error
        raise ModelError(
            f"model.path is {config.path!r}, but its config.json describes no causal language model that this "
            f"transformers can build: {reason}"
        ) from error


def _check_capped_scores(described: PretrainedConfig, config: ModelConfig) -> None:
    """Older transformers let such models (Gemma 2) have sdpa, which computes something else without a word."""
    if config.attention == "sdpa" and getattr(described.get_text_config(), "attn_logit_softcapping", None):
        reason = "Its attention scores are capped (attn_logit_softcapping), which sdpa leaves out."
        raise bad_value("model.attention", config.attention, "eager for this model", reason)


def _on_meta(described: PretrainedConfig, config: ModelConfig) -> PreTrainedModel:
    if config.dtype == "auto":  # shapes have none
        config = replace(config, dtype="fp32")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(described), **_options(config))


def _can_be_built(described: PretrainedConfig, config: ModelConfig) -> bool:
    with contextlib.suppress(ValueError, KeyError, TypeError, ImportError):
        _on_meta(described, config)
        return True
    return False


def without_dropout(described: PretrainedConfig) -> dict[str, float]:
    """Set every dropout, layer dropout and router noise of a model's configuration to 0; returns what was on.

    Their masks would come from each rank's own random numbers, so losses would depend on the number of ranks, and a
    layer that only some ranks skip stops ZeRO-3 for ever. The frozen base has nothing to be kept from overfitting.
    """
    found: dict[str, float] = {}
    for key, value in list(vars(described).items()):
        if isinstance(value, PretrainedConfig):
            found |= without_dropout(value)
        elif _RANDOM.search(key) and not _OF_OTHER_HEADS.match(key) and isinstance(value, float) and value > 0:
            found[key] = value
            setattr(described, key, 0.0)
    return found


def _cannot_load(what: str, config: ModelConfig, error: Exception) -> ModelError:
    is_folder = Path(config.path).is_dir()
    allowed = "config.json, tokenizer files and *.safetensors" if is_folder else "a folder, or a hub name in reach"
    if isinstance(error, ImportError):
        allowed = "a model whose code imports packages that are installed"
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"model.path is {config.path!r}: its {what} cannot be loaded; wanted is {allowed}. {reason}")

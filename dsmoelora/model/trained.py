"""A trained adapter on its base, without DeepSpeed: what programs need that ask it something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dsmoelora.adapters.folder import load_adapter, read_preparations
from dsmoelora.adapters.folder_files import read_adapter_config
from dsmoelora.config.run import QuantizeName
from dsmoelora.data.readers import may_be_hub_name
from dsmoelora.errors import CheckpointError, ModelError
from dsmoelora.model.loading import model_for_inference

_REMEDY = "Give its folder with --base, and --trust-remote-code where it brings code that you trust."


@dataclass(frozen=True)
class Trained:
    """A trained adapter and its base, both on disk.

    Args:
        adapter: folder
        base: folder or hub name
        trust_remote_code: run Python code that comes with it
        quantize: how the base's weights are kept
    """

    adapter: Path
    base: str
    trust_remote_code: bool = False
    quantize: QuantizeName = "none"

    def load_base(self, as_trained_on: bool = False) -> PreTrainedModel:
        """The base model, on an accelerator if there is one.

        Args:
            as_trained_on: in 4 bits, packed as it was in training; otherwise as it is without the adapter

        Raises:
            CheckpointError: the adapter is damaged
            ModelError: the base model cannot be loaded
        """
        prepare = read_preparations(self.adapter) if as_trained_on and self.quantize != "none" else {}
        return model_for_inference(self.base, _REMEDY, self.trust_remote_code, self.quantize, prepare)

    @property
    def has_own_base(self) -> bool:
        """Whether the adapter cannot be put on the base as it is without it."""
        return self.quantize != "none" and bool(read_preparations(self.adapter))

    def load(self, base: PreTrainedModel | None = None) -> Any:
        """The base model with its adapter.

        Args:
            base: of `load_base`, which the adapter is put on; not where it has its own

        Raises:
            CheckpointError: the adapter is damaged, or was made for another base
            ModelError: the base model cannot be loaded
        """
        assert base is None or not self.has_own_base, "the adapter would be put on other weights than its own"
        return load_adapter(self.load_base(as_trained_on=True) if base is None else base, self.adapter)


def find_trained(
    adapter: Path, base: str | None, trust_remote_code: bool = False, quantize: QuantizeName = "none"
) -> Trained:
    """An adapter folder, and its base: by default the one that it names.

    Raises:
        CheckpointError: the adapter is missing or damaged
        ModelError: there is no such folder, and no hub has such names
    """
    path = base or read_adapter_config(adapter)["base_model_name_or_path"]
    if not Path(path).is_dir() and not may_be_hub_name(path):
        raise ModelError(f"The base model {path!r} is not there. {_REMEDY}")
    return Trained(adapter, path, trust_remote_code, quantize)


def load_trained(
    adapter: Path, base: str | None, trust_remote_code: bool = False, quantize: QuantizeName = "none"
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model with its adapter, and the tokenizer that it was trained with; see `find_trained`.

    Raises:
        CheckpointError: the adapter is missing, damaged, or was made for another base
        ModelError: the base model cannot be loaded
    """
    trained = find_trained(adapter, base, trust_remote_code, quantize)
    tokenizer = trained_tokenizer(adapter, trust_remote_code)
    return trained.load(), tokenizer


def trained_tokenizer(adapter: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with, as training wrote it.

    Raises:
        CheckpointError: there is none that can be read
        ModelError: it brings code whose packages are missing
    """
    try:
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The tokenizer of {adapter} needs a package that is not installed. {reason}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} holds no tokenizer that can be read. Copy the adapter folder again."
        ) from error

"""The experts of an adapter folder, one plain LoRA adapter each.

s * a_e m_e b_e^T  ->  A = a_e^T (R, D),  B = b_e m_e^T (O, R),  the same r, alpha and scale

Experts of kind `dora` become DoRA adapters, with their magnitudes as they are. With n shared experts each adapter has
rank R (1 + n): factors of one expert and of the shared ones side by side.

With `adapter.init: svd` and `loftq` experts were trained on a base that goes without their start. What is exported
takes that along, so that it is right on the base as it came: A = [a_e, all start a]^T, B = [b_e, -all start b / E], of
rank R (1 + E).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.function import outgoing
from dsmoelora.adapters.folder_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_adapter_config,
    read_start,
    read_weights,
)
from dsmoelora.adapters.starts.svd import StartFactors, start_names
from dsmoelora.adapters.targets import layer_config
from dsmoelora.config import AdapterConfig
from dsmoelora.config.adapter_options import EXPERTS
from dsmoelora.errors import CheckpointError, listing
from dsmoelora.export.peft_folder import Lora, folder_names


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of one layer's experts, with the mixer folded into `b`.

    Args:
        a_EDR: (E, D, R)
        b_EOR: (E, O, R)
        start: with `adapter.init: svd` and `loftq`, the factors before the first step
        magnitude_EO: of experts of kind `dora`
        num_shared: the last of them, which every token uses with gate 1
    """

    a_EDR: Tensor
    b_EOR: Tensor
    start: StartFactors | None = None
    magnitude_EO: Tensor | None = None
    num_shared: int = 0

    @property
    def in_out(self) -> tuple[int, int]:
        """In-features D and out-features O."""
        return self.a_EDR.shape[1], self.b_EOR.shape[1]

    @property
    def num_routed(self) -> int:
        """Experts that are used as a router says; 1 of a layer without a router."""
        return len(self.a_EDR) - self.num_shared

    def shift(self) -> tuple[Tensor, Tensor]:
        """Factors (D, F) and (O, F) of what was taken from the base, without the scale s; F is 0 where nothing was."""
        if self.start is None:
            num_in, num_out = self.in_out
            return self.a_EDR.new_empty(num_in, 0), self.b_EOR.new_empty(num_out, 0)
        return self.start.shift()


def read_experts(folder: Path) -> tuple[AdapterConfig, dict[str, ExpertFactors]]:
    """Configuration and experts of an adapter folder, the experts by layer name.

    Raises:
        CheckpointError: the folder is damaged, or has tensors that no LoRA adapter could hold
    """
    description = read_adapter_config(folder)
    config, layers = adapter_config(description), description["layers"]
    tensors = read_weights(folder / WEIGHTS_FILE)
    own = EXPERTS[config.expert].parameters
    wanted = {f"{layer}.experts.{name}": layer_config(config, layer) for layer in layers for name in own}
    wrong = [name for name, own in wanted.items() if name not in tensors or not _fits(tensors[name], own)]
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {listing(wrong)}. Copy the adapter folder again."
        )
    starts = read_start(folder, config, tensors)
    experts = {}
    for layer in layers:
        a_name, b_name = start_names(layer)
        start = StartFactors(starts[a_name], starts[b_name]) if starts else None
        found = {name: tensors.pop(f"{layer}.experts.{name}") for name in own}
        b_EOR = _fold(found["b"], found["m"]) if "m" in found else found["b"]
        num_shared = layer_config(config, layer).shared_experts
        experts[layer] = ExpertFactors(found["a"], b_EOR, start, found.get("magnitude"), num_shared)
    strange = [name for name in tensors if ".router." not in name]
    if strange:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has {listing(strange)}, which a plain LoRA adapter has no place for. "
            "Use such experts with dsmoelora.load_adapter."
        )
    return config, experts


def expert_loras(config: AdapterConfig, experts: dict[str, ExpertFactors]) -> dict[str, Lora]:
    """Expert e of every layer as one LoRA adapter, by the name of its folder.

    Each has the shared experts and the layers with one expert in it.
    """
    loras = {}
    for expert, folder in enumerate(folder_names(config.num_experts)):
        num_beside = config.num_experts if config.shifts_base else config.shared_experts
        rank = config.r * (1 + num_beside)
        layers = {name: _with_company(factors, expert, rank) for name, factors in experts.items()}
        scale = (config.scale * rank, False) if num_beside else (config.lora_alpha, config.use_rslora)
        magnitudes = {
            name: factors.magnitude_EO[expert % len(factors.magnitude_EO)]
            for name, factors in experts.items()
            if factors.magnitude_EO is not None
        }
        loras[folder] = Lora(rank, *scale, layers, magnitudes)
    return loras


def _with_company(factors: ExpertFactors, expert: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, D) and B (O, rank) of an expert, of the shared ones and of the base's shift.

    A layer with one expert gives that one.
    """
    own, (a_DF, b_OF) = expert % factors.num_routed, factors.shift()
    used = [own, *range(factors.num_routed, len(factors.a_EDR))]
    joined = torch.cat((*factors.a_EDR[used], a_DF), 1), torch.cat((*factors.b_EOR[used], -b_OF), 1)
    a_DR, b_OR = (nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in joined)
    return a_DR.t(), b_OR


def _fits(factor: Tensor, config: AdapterConfig) -> bool:
    if factor.dim() == 2:  # magnitudes
        return factor.shape[0] == config.num_in_layer
    return factor.dim() == 3 and (factor.shape[0], factor.shape[2]) == (config.num_in_layer, config.r)


def _fold(b_EOR: Tensor, m_ERR: Tensor) -> Tensor:
    """`b m^T` of every expert, rounded once."""
    return outgoing(b_EOR.float(), m_ERR.float()).to(b_EOR.dtype)

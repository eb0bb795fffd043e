"""The experts of an adapter folder, one plain LoRA adapter each.

s * a_e m_e b_e^T  ->  A = a_e^T (R, D),  B = b_e m_e^T (O, R),  the same r, alpha and scale
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsmoelora.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, adapter_config, read_adapter_config, read_weights
from dsmoelora.adapters.function import outgoing
from dsmoelora.adapters.targets import layer_config
from dsmoelora.config import AdapterConfig
from dsmoelora.errors import CheckpointError, listing
from dsmoelora.export.peft_folder import Lora, folder_names


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of one layer's experts, with the mixer folded into `b`.

    Args:
        a_EDR: (E, D, R)
        b_EOR: (E, O, R)
    """

    a_EDR: Tensor
    b_EOR: Tensor

    @property
    def in_out(self) -> tuple[int, int]:
        """In-features D and out-features O."""
        return self.a_EDR.shape[1], self.b_EOR.shape[1]


def read_experts(folder: Path) -> tuple[AdapterConfig, dict[str, ExpertFactors]]:
    """Configuration and experts of an adapter folder, the experts by layer name.

    Raises:
        CheckpointError: the folder is damaged, or has tensors that no LoRA adapter could hold
    """
    description = read_adapter_config(folder)
    config, layers = adapter_config(description), description["layers"]
    tensors = read_weights(folder / WEIGHTS_FILE)
    own = "abm" if config.expert == "moslora" else "ab"
    wanted = {f"{layer}.experts.{factor}": layer_config(config, layer) for layer in layers for factor in own}
    wrong = [name for name, own in wanted.items() if name not in tensors or not _fits(tensors[name], own)]
    if wrong:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {listing(wrong)}. Copy the adapter folder again."
        )
    experts = {}
    for layer in layers:
        a_EDR, b_EOR, *m = (tensors.pop(f"{layer}.experts.{factor}") for factor in own)
        experts[layer] = ExpertFactors(a_EDR, _fold(b_EOR, m[0]) if m else b_EOR)
    strange = [name for name in tensors if ".router." not in name]
    if strange:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} has {listing(strange)}, which a plain LoRA adapter has no place for. "
            "Use such experts with dsmoelora.load_adapter."
        )
    return config, experts


def expert_loras(config: AdapterConfig, experts: dict[str, ExpertFactors]) -> dict[str, Lora]:
    """Expert e of every layer as one LoRA adapter, by the name of its folder; each has the layers with one expert."""
    loras = {}
    for expert, folder in enumerate(folder_names(config.num_experts)):
        layers = {}
        for name, factors in experts.items():
            own = expert % len(factors.a_EDR)
            layers[name] = (factors.a_EDR[own].t(), factors.b_EOR[own])
        loras[folder] = Lora(config.r, config.lora_alpha, config.use_rslora, layers)
    return loras


def _fits(factor: Tensor, config: AdapterConfig) -> bool:
    return factor.dim() == 3 and (factor.shape[0], factor.shape[2]) == (config.num_experts, config.r)


def _fold(b_EOR: Tensor, m_ERR: Tensor) -> Tensor:
    """`b m^T` of every expert, rounded once."""
    return outgoing(b_EOR.float(), m_ERR.float()).to(b_EOR.dtype)

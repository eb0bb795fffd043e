"""Experts that start from singular vectors of the base weight, and the shift of the base that goes with them.

    W0 = U S V^T            a_e = V_e sqrt(S_e / s)    b_e = U_e sqrt(S_e / s)    so that  s b_e a_e^T = U_e S_e V_e^T
    W0' = W0 - (s / E) sum_e b_e a_e^T

Expert e owns the singular values from `e * floor(min(D, O) / E)` on and starts from the first R of them: GOAT, Fan et
al. 2025 (arXiv 2502.16894). For E = 1 these are the R largest: PiSSA, Meng et al. 2024 (arXiv 2404.02948). With gates
of 1 / E the layer says what the base said; so it does on the average over routers that choose K experts at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsmoelora.adapters.experts.products import side_by_side
from dsmoelora.adapters.layer import RoutedLinear, adapted_layers, adapter_context
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.targets import layer_config
from dsmoelora.adapters.targets.linear import Linear, features, weight_of
from dsmoelora.config import AdapterConfig
from dsmoelora.config.checks import require
from dsmoelora.errors import ModelError, listing


@dataclass(frozen=True)
class StartFactors:
    """The factors of all experts of a layer before the first step.

    Args:
        a_EDR: (E, D, R)
        b_EOR: (E, O, R)
    """

    a_EDR: Tensor
    b_EOR: Tensor

    def shift(self) -> tuple[Tensor, Tensor]:
        """Factors (D, F) and (O, F) of what was taken from the base, without the scale s."""
        return side_by_side(self.a_EDR), side_by_side(self.b_EOR) / len(self.a_EDR)

    def to_host(self) -> StartFactors:
        """The same in the host's memory."""
        return StartFactors(self.a_EDR.cpu(), self.b_EOR.cpu())


# Opens weights for reading and writing: inside the block they are whole, and what is written lasts.
OpenWeights = Callable[[Iterable[Tensor]], AbstractContextManager[None]]
# The start factors of a layer whose weight is open.
FindStart = Callable[[RoutedLinear], StartFactors]


def svd_start(weight_OD: Tensor, num_experts: int, rank: int, scale: float) -> StartFactors:
    """The start factors of a layer, in the dtype of its weight (the decomposition is in fp32).

    Args:
        weight_OD: W0, whole
        num_experts: E, with `E * R <= min(D, O)`
        rank: R
        scale: s
    """
    u_OK, singular_K, v_KD = torch.linalg.svd(weight_OD.float(), full_matrices=False)
    own_places = len(singular_K) // num_experts
    firsts_E1 = own_places * torch.arange(num_experts, device=weight_OD.device).unsqueeze(1)
    places_ER = firsts_E1 + torch.arange(rank, device=weight_OD.device)
    roots_ER = (singular_K[places_ER] / scale).sqrt()
    a_EDR = v_KD[places_ER].transpose(1, 2) * roots_ER.unsqueeze(1)
    b_EOR = u_OK[:, places_ER].transpose(0, 1) * roots_ER.unsqueeze(1)
    return StartFactors(a_EDR.to(weight_OD.dtype).contiguous(), b_EOR.to(weight_OD.dtype).contiguous())


@dataclass(frozen=True)
class Dealers:
    """The ranks among which decompositions are dealt out; by default one that does all.

    Args:
        rank, count: of this one, of all
        together: does something that may fail on one rank alone, and then fails on all
        broadcast: makes a tensor, in place, on all ranks that of the given one
    """

    rank: int = 0
    count: int = 1
    together: Callable[[Callable[[], StartFactors | None]], StartFactors | None] = lambda decompose: decompose()
    broadcast: Callable[[Tensor, int], object] = lambda _, __: None


@torch.no_grad()
def start_experts(
    model: nn.Module, open_weights: OpenWeights = lambda _: nullcontext(), dealers: Dealers = Dealers()
) -> float:
    """Set the factors of all adapted layers to their starts, and shift the base.

    As many layers as there are ranks are decomposed at a time, each by one rank: others could find other signs. At most
    two whole weights lie on a rank.

    Args:
        model: adapted, its base untouched
        open_weights: opens a base weight that is not whole
        dealers: who decomposes

    Returns:
        as `shift_bases`
    """
    layers, rounding = [layer for _, layer in adapted_layers(model)], Rounding()
    for first in range(0, len(layers), dealers.count):
        turn, own = layers[first : first + dealers.count], None
        for place, layer in enumerate(turn):
            with open_weights([layer.base.weight]):
                if place == dealers.rank:
                    own = partial(_decompose, layer, weight_of(layer.base).to(torch.float32, copy=True))
        found = dealers.together(own or (lambda: None))
        for place, layer in enumerate(turn):
            bank = layer.experts
            with open_weights([layer.base.weight]):
                empty = (layer.base.weight.new_empty(bank.shapes[name]) for name in ("a", "b"))
                start = found if found is not None and place == dealers.rank else StartFactors(*empty)
                for factor in (start.a_EDR, start.b_EOR):
                    dealers.broadcast(factor, place)
                held = slice(bank.held.start, bank.held.stop)
                bank.a.copy_(start.a_EDR[held])
                bank.b.copy_(start.b_EOR[held])
                _shift(layer, start, rounding)
    return rounding.share


def _decompose(layer: RoutedLinear, weight_OD: Tensor) -> StartFactors:
    num_experts, _, rank = layer.experts.shapes["a"]
    try:
        found = svd_start(weight_OD, num_experts, rank, layer.experts.scale)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ModelError(
            f"adapter.init is 'svd', but the weight of {layer.name} has no singular value decomposition: {error}. "
            "Look for numbers in it that are not finite, or set adapter.init to kaiming."
        ) from error
    dtype = layer.base.weight.dtype
    return StartFactors(found.a_EDR.to(dtype), found.b_EOR.to(dtype))


def start_names(layer: str) -> tuple[str, str]:
    """What the start factors `a` and `b` of a layer are called in files: as the factors themselves."""
    return f"{layer}.experts.a", f"{layer}.experts.b"


@dataclass
class Rounding:
    """Squared Frobenius norms over all layers: of what rounding to the dtype of the weights lost, and of the shift."""

    lost: float = 0.0
    shifted: float = 0.0

    @property
    def share(self) -> float:
        """What rounding adds, as a share of the shift."""
        return (self.lost / self.shifted) ** 0.5 if self.shifted else 0.0


@torch.no_grad()
def shift_bases(model: nn.Module, find_start: FindStart, open_weights: OpenWeights = lambda _: nullcontext()) -> float:
    """`W0' = W0 - (s / E) sum_e b_e a_e^T` for every adapted layer, one after the other (fp32 inside).

    Args:
        model: adapted, its base untouched
        find_start: gives a layer's start factors while its weight is open
        open_weights: opens a base weight that is not whole

    Returns:
        what rounding to the dtype of the weights adds, as a share of the shift (Frobenius norms over all layers)
    """
    rounding = Rounding()
    for _, layer in adapted_layers(model):
        with open_weights([layer.base.weight]):
            _shift(layer, find_start(layer), rounding)
    return rounding.share


def _shift(layer: RoutedLinear, start: StartFactors, rounding: Rounding) -> None:
    """Of a layer whose weight is open."""
    weight_OD = weight_of(layer.base)
    factors = (factor.to(weight_OD.device, torch.float32) for factor in (start.b_EOR, start.a_EDR))
    b_OF, a_DF = (factor.permute(1, 0, 2).flatten(1) for factor in factors)
    shift_OD = (b_OF @ a_DF.t()).mul_(layer.experts.scale / start.a_EDR.shape[0])
    wanted_OD = weight_OD.float() - shift_OD
    weight_OD.copy_(wanted_OD)
    rounding.lost += float(wanted_OD.sub_(weight_OD).square_().sum())
    rounding.shifted += float(shift_OD.square_().sum())


@contextmanager
def uniform_gates(model: nn.Module) -> Iterator[None]:
    """Inside the block every expert has the gate 1 / E for every token: the base as it was, before the first step."""

    def even_out(_: nn.Module, __: object, gate_TE: Tensor) -> Tensor:
        return torch.full_like(gate_TE, 1 / gate_TE.shape[-1])

    with adapter_context(model).hooks([router.register_forward_hook(even_out) for _, router in routers(model)]):
        yield


def check_svd_start(model: nn.Module, config: AdapterConfig, names: list[str]) -> None:
    """Whether layers can start from the singular vectors of their weights; looks at shapes alone.

    Raises:
        ConfigError: more singular values are wanted than a weight has
        ModelError: a weight belongs to another module too, which the shift would change
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name in names:
        base: Linear = model.get_submodule(name)  # type: ignore[assignment]
        check_num_singular(layer_config(config, name), name, base)
        others = [owner for owner in owners[id(base.weight)] if owner != name]
        if others:
            raise ModelError(
                f"adapter.init is 'svd', which changes the weight of {name}, but {listing(others)} has the same one. "
                f"Take {name} out of adapter.target_modules (or adapter.lora_modules), or set adapter.init to kaiming."
            )


def check_num_singular(config: AdapterConfig, name: str, base: Linear) -> None:
    """Whether a weight has as many singular values as the experts of its layer want.

    Raises:
        ConfigError: it has fewer
    """
    most, wanted = min(features(base)), config.num_experts * config.r
    require(
        wanted <= most,
        "adapter.init",
        config.init,
        f"another one where num_experts x r = {config.num_experts} x {config.r} = {wanted} is above min(in, out) = "
        f"{most} of {name}",
        "Lower adapter.num_experts or adapter.r, take that layer out of adapter.target_modules, or set kaiming.",
    )

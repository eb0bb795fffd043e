"""A mixture as one LoRA adapter: every layer's gate is replaced by its average over a data file.

    s * sum_e g_e a_e b_e^T  =  A^T B^T   with   A^T = [a_1 ... a_E] (D, E*R),   B = s [g_1 b_1 ... g_E b_E] (O, E*R)

With `adapter.init: svd` or `loftq` the columns of the shift of the base are added to both, as in `experts`.

This is another function than the mixture, whose gate depends on the token; what it costs is measured on the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsmoelora.adapters import adapted_layers, adapter_context, eject, inject
from dsmoelora.adapters.experts.function import with_shared
from dsmoelora.adapters.folder import load_adapter
from dsmoelora.adapters.folder_files import WEIGHTS_FILE
from dsmoelora.adapters.given.experts import shapes_in
from dsmoelora.adapters.given.ours import same_gates
from dsmoelora.config import AdapterConfig
from dsmoelora.data import InstructionDataset
from dsmoelora.data.dataset import IGNORED
from dsmoelora.errors import bad_value
from dsmoelora.export.experts import ExpertFactors, read_experts
from dsmoelora.export.fitted import measured_moments
from dsmoelora.export.peft_folder import Lora

Pairs = dict[str, tuple[Tensor, Tensor]]  # by layer: (D, F) and (O, F), fp64


@dataclass(frozen=True)
class Fit:
    """What `b` by least squares is worth (see `fitted`).

    Args:
        loss: as those of `Average`
        average_error, error: squared distance from the mixture's updates, of their square, over all layers and tokens,
            with the average gates and with the fit; before the rank is cut
    """

    loss: float
    average_error: float
    error: float


@dataclass(frozen=True)
class Average:
    """The averaged mixture, and what it costs.

    Args:
        lora: the adapter, with scale 1; where there is a fit, its
        kept: share of the averaged update's squared Frobenius norm that the rank keeps, over all layers
        base_loss, mixture_loss, average_loss: mean negative log likelihood per supervised token, in nats
        fit: None for the average gates alone
    """

    lora: Lora
    kept: float
    base_loss: float
    mixture_loss: float
    average_loss: float
    fit: Fit | None = None


def average_experts(
    model: Any, folder: Path, samples: InstructionDataset, num_samples: int, rank: int, fits: bool = False
) -> Average:
    """Measure the average gates, put the experts together with them, and compare the losses.

    Args:
        model: the base model, not adapted; it ends with the adapter on it
        folder: adapter folder
        samples: tokenised data file
        num_samples: how many of its first rows are used
        rank: of the adapter; 0 for that of all experts (with `adapter.init: svd` or `loftq` twice that), which loses
            nothing
        fits: whether `b` is then fitted to what the mixture did on these rows

    Raises:
        ConfigError: a rank above that
        CheckpointError: the folder is damaged, or was trained on another base model
    """
    config, experts = read_experts(folder)
    rank = _settled_rank(config, rank)
    base_loss = mean_loss(model.eval(), samples, num_samples)
    load_adapter(model, folder)
    with measured_gates(model) as gates, measured_moments(model, fits) as moments:
        mixture_loss = mean_loss(model, samples, num_samples)
    shifts = {name: _scaled_shift(factors, config.scale) for name, factors in experts.items()}
    pairs = {name: weighted_sum(one, config.scale * gates[name].cpu()) for name, one in experts.items()}
    dtypes = {name: factors.a_EDR.dtype for name, factors in experts.items()}
    lora, kept = _as_lora(pairs, shifts, dtypes, rank)
    _put_on(model, lora, shifts)
    average = Average(lora, kept, base_loss, mixture_loss, mean_loss(model, samples, num_samples))
    if not fits:
        return average
    error = average_error = square = 0.0
    for name, factors in experts.items():
        a_DF, start_OF = pairs[name]
        _, b_OF = weighted_sum(factors, torch.full((len(factors.b_EOR),), config.scale))
        pairs[name] = a_DF, moments[name].fitted(b_OF, start_OF)
        of_average, of_mixture = moments[name].errors(b_OF, start_OF)
        of_fit, _ = moments[name].errors(b_OF, pairs[name][1])
        error, average_error, square = error + of_fit, average_error + of_average, square + of_mixture
    lora, kept = _as_lora(pairs, shifts, dtypes, rank)
    _put_on(model, lora, shifts)
    found = Fit(mean_loss(model, samples, num_samples), average_error / square, error / square)
    return replace(average, lora=lora, kept=kept, fit=found)


def same_for_every_token(folder: Path, rank: int) -> tuple[Lora, float]:
    """A mixture with the router `constant` as one adapter, and the share that it keeps: all, at its whole rank.

    Args:
        folder: adapter folder
        rank: of the adapter; 0 for that of all experts

    Raises:
        ConfigError: a rank above that
        CheckpointError: the folder is damaged
    """
    config, experts = read_experts(folder)
    rank, names = _settled_rank(config, rank), shapes_in(folder / WEIGHTS_FILE)
    pairs, shifts = {}, {}
    for name, factors in experts.items():
        gate_E = with_shared(same_gates(folder, config, names, name), factors.num_shared)
        pairs[name] = weighted_sum(factors, config.scale * gate_E)
        shifts[name] = _scaled_shift(factors, config.scale)
    return _as_lora(pairs, shifts, {name: factors.a_EDR.dtype for name, factors in experts.items()}, rank)


def _settled_rank(config: AdapterConfig, rank: int) -> int:
    """That of all experts where it is 0.

    Raises:
        ConfigError: a rank above that
    """
    twice = 2 if config.shifts_base else 1
    full = twice * config.num_in_layer * config.r
    if not 0 <= rank <= full:
        count = "(num_experts + shared_experts)" if config.shared_experts else "num_experts"
        count = "r" if config.style == "decoder_layer" else f"{'2 x ' * (twice - 1)}{count} x r"
        allowed = f"between 1 and {count} = {full}"
        raise bad_value("--rank", rank, allowed, "Leave it out for the whole rank.")
    return rank or full


def _as_lora(pairs: Pairs, shifts: Pairs, dtypes: dict[str, torch.dtype], rank: int) -> tuple[Lora, float]:
    """The updates `a b^T` of all layers and what was taken from the base, as one adapter, and the share it keeps."""
    layers, kept, total = {}, 0.0, 0.0
    for name, (a_DF, b_OF) in pairs.items():
        taken_DF, taken_OF = shifts[name]
        a_DF, b_OF = torch.cat((a_DF, taken_DF), 1), torch.cat((b_OF, -taken_OF), 1)
        before = _square_norm(a_DF, b_OF)
        if rank < a_DF.shape[1]:
            a_DF, b_OF = truncated(a_DF, b_OF, rank)
        else:  # a layer of plain LoRA has the rank of one expert
            a_DF, b_OF = (nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in (a_DF, b_OF))
        kept, total = kept + _square_norm(a_DF, b_OF), total + before
        layers[name] = (a_DF.t().to(dtypes[name]), b_OF.to(dtypes[name]))
    return Lora(rank, rank, False, layers), kept / total if total else 1.0


@contextmanager
def measured_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The average gate (E,) fp64 of each adapted layer over all tokens that the model sees meanwhile.

    The dictionary is filled when the context ends.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    means: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            gate_TE = inputs[2]
            sums[name] = sums.get(name, 0.0) + gate_TE.detach().double().sum(0)
            counts[name] = counts.get(name, 0) + gate_TE.shape[0]

        return add

    handles = [layer.experts.register_forward_pre_hook(watch(name)) for name, layer in adapted_layers(model)]
    with adapter_context(model).hooks(handles):
        yield means
        means.update({name: total_E / counts[name] for name, total_E in sums.items()})


def mean_loss(model: Any, samples: InstructionDataset, num_samples: int) -> float:
    """Mean negative log likelihood per supervised token of the first samples, one at a time: there is no padding."""
    nll_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    num_supervised = 0
    for index in range(min(num_samples, len(samples))):
        ids, labels = (torch.tensor(part, device=model.device) for part in samples.sample(index))
        with torch.no_grad():  # labels tell router `prompt` where the prompt ends
            logits_SV = model(input_ids=ids[None], labels=labels[None], use_cache=False).logits[0]
        nll_sum += nn.functional.cross_entropy(
            logits_SV[:-1].float(), labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        num_supervised += int((labels[1:] != IGNORED).sum())
    return nll_sum.item() / num_supervised


def weighted_sum(factors: ExpertFactors, weight_E: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_e w_e a_e b_e^T` as two factors (D, E*R) and (O, E*R), fp64."""
    weighted_EOR = factors.b_EOR.double() * weight_E.double()[:, None, None]
    return factors.a_EDR.double().permute(1, 0, 2).flatten(1), weighted_EOR.permute(1, 0, 2).flatten(1)


def truncated(a_DF: Tensor, b_OF: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `a b^T` of that rank (Eckart & Young 1936), with equal singular values in both factors.

    The singular values of the product are those of the small `R_a R_b^T` of two QR decompositions, so the (D, O)
    product never exists. Where D or O is below `rank`, columns of zeros fill up.
    """
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a_DF), torch.linalg.qr(b_OF)
    u, singular, v_t = torch.linalg.svd(r_a @ r_b.t(), full_matrices=False)
    keep = min(rank, len(singular))
    root = singular[:keep].sqrt()
    a_DR, b_OR = q_a @ (u[:, :keep] * root), q_b @ (v_t[:keep].t() * root)
    zeros = (0, rank - keep)
    return nn.functional.pad(a_DR, zeros), nn.functional.pad(b_OR, zeros)


def _square_norm(a_DF: Tensor, b_OF: Tensor) -> float:
    """||a b^T||_F^2 = <a^T a, b^T b>."""
    return float(((a_DF.t() @ a_DF) * (b_OF.t() @ b_OF)).sum())


def _scaled_shift(factors: ExpertFactors, scale: float) -> tuple[Tensor, Tensor]:
    a_DF, b_OF = factors.shift()
    return a_DF.double(), scale * b_OF.double()


def _put_on(model: nn.Module, lora: Lora, shifts: Pairs) -> None:
    """Replace the mixture on a model by one adapter (of scale 1), and give the base back what was taken from it."""
    eject(model)
    rank = lora.r + max(a_DF.shape[1] for a_DF, _ in shifts.values())
    inject(model, AdapterConfig(r=rank, lora_alpha=rank, num_experts=1, top_k=1, target_modules=[*lora.layers]))
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            (a_RD, b_OR), (taken_DF, taken_OF) = lora.layers[name], shifts[name]
            for whole, *parts in ((layer.experts.a, a_RD.t(), taken_DF), (layer.experts.b, b_OR, taken_OF)):
                joined = torch.cat([part.to(whole) for part in parts], 1)
                whole.copy_(nn.functional.pad(joined, (0, rank - joined.shape[1]))[None])
    model.eval()

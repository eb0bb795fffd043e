"""Sums over the tokens of an optimizer step, of all routers of a model. Padding counts nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_KEPT = 1 << 18  # numbers, 1 MiB: what is kept then has tokens enough to be worth kernels of its own


class Totals(NamedTuple):
    """Sums over tokens by kind, routers (and their experts) one after another.

    Args:
        choices: (sum of all E,), how many tokens used each expert
        gates: of each expert's gate
        probabilities: of each expert's share of the softmax over all logits
        entropy: of each expert's share of the gates' entropy, `-gate log gate`, in nats
        z: of the squared logarithm of the sum of the exponentials
    """

    choices: Tensor
    gates: Tensor
    probabilities: Tensor
    entropy: Tensor
    z: Tensor


@dataclass
class _Heard:
    """What routers said that have as many experts each and looked at the same N tokens or sequences.

    Args:
        num_tokens_N: fp32, how many real tokens each of them stands for
        routers: places in the order of the model
        said: of each router (N, E)
    """

    num_tokens_N: Tensor
    routers: list[int] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)


class _Places(NamedTuple):
    """For each kind of sum, where the numbers of each router lie."""

    choices: Sequence[Tensor]
    gates: Sequence[Tensor]
    probabilities: Sequence[Tensor]
    entropy: Sequence[Tensor]
    z: Sequence[Tensor]


class RoutingSums:
    """All sums in one fp64 tensor, so that one all-reduce brings those of all ranks together.

    What routers say is kept until the forward pass is over, or much has come together, and summed for many of them at
    once, in fp32: a layer's forward adds nothing itself.

    Args:
        sizes: number of experts of each router
        device: where sums are kept

    Attributes:
        flat: the tensor
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self._lengths = [*4 * [sum(sizes)], len(sizes)]  # of the fields of `Totals`
        self.flat = torch.zeros(sum(self._lengths), dtype=torch.float64, device=device)
        places = self.totals(torch.arange(len(self.flat), device=device))
        choices, gates, probabilities, entropy = (part.split(sizes) for part in places[:4])
        self._places = _Places(choices, gates, probabilities, entropy, places.z.split(1))
        self._gates: dict[tuple[int, int], _Heard] = {}
        self._scores: dict[tuple[int, int], _Heard] = {}
        self._num_kept = 0

    def totals(self, flat: Tensor) -> Totals:
        """A tensor as `flat`, such as the sum over all ranks, by kind."""
        return Totals(*flat.split(self._lengths))

    def add_gates(self, router: int, gate_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router decided.

        Args:
            router: its place in the order of the model
            gate_NE: fp32, of N tokens or sequences; 0 where an expert is not used
            num_tokens_N: fp32, how many real tokens each of them stands for
        """
        self._keep(self._gates, router, num_tokens_N, gate_NE)

    def add_logits(self, router: int, logits_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router's logits were (arguments as of `add_gates`)."""
        self._keep(self._scores, router, num_tokens_N, logits_NE)

    @torch.no_grad()
    def finish_forward(self) -> None:
        """Move what has been kept to `flat`."""
        for heard in self._gates.values():
            gate_NKE = torch.stack(heard.said, 1)
            self._add(heard, (gate_NKE != 0).float(), self._places.choices)
            self._add(heard, gate_NKE, self._places.gates)
            self._add(heard, torch.special.entr(gate_NKE), self._places.entropy)
        for heard in self._scores.values():
            logits_NKE = torch.stack(heard.said, 1)
            self._add(heard, logits_NKE.softmax(-1), self._places.probabilities)
            self._add(heard, logits_NKE.logsumexp(-1, keepdim=True).square(), self._places.z)
        self._gates.clear()
        self._scores.clear()
        self._num_kept = 0

    def _keep(self, kept: dict[tuple[int, int], _Heard], router: int, num_tokens_N: Tensor, said_NE: Tensor) -> None:
        key = (said_NE.shape[-1], id(num_tokens_N))
        heard = kept.setdefault(key, _Heard(num_tokens_N))
        heard.routers.append(router)
        heard.said.append(said_NE.detach())
        self._num_kept += said_NE.numel()
        if self._num_kept > _MOST_KEPT:
            self.finish_forward()

    def _add(self, heard: _Heard, values_NKX: Tensor, places: Sequence[Tensor]) -> None:
        """Add sums over tokens of K routers' X numbers where `places` of each router says."""
        where = torch.cat([places[router] for router in heard.routers])
        self.flat.index_add_(0, where, (heard.num_tokens_N @ values_NKX.flatten(1)).double())


class ExpertsOfRouters:
    """Which numbers of a tensor over all routers' experts belong to which router.

    Args:
        sizes: number of experts of each router
        device: of the tensors

    Attributes:
        uniform: (sum of all E,) fp64, 1 / E of the router
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        num_experts = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._num_routers = len(sizes)
        self._router_of = torch.arange(len(sizes), device=device).repeat_interleave(num_experts, output_size=sum(sizes))
        self.uniform = (1.0 / num_experts.double())[self._router_of]

    def per_router(self, values: Tensor) -> Tensor:
        """(routers,): sums over each router's experts."""
        zeros = torch.zeros(self._num_routers, dtype=values.dtype, device=values.device)
        return zeros.index_add_(0, self._router_of, values)

    def shares(self, choices: Tensor) -> Tensor:
        """Each expert's share of its router's choices; 1 / E where nobody chose."""
        total = self.per_router(choices)[self._router_of]
        return torch.where(total > 0, choices / total.clamp(min=1), self.uniform)

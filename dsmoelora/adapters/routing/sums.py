"""Sums over the tokens of an optimizer step, of all routers of a model. Padding counts nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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


class RoutingSums:
    """All sums in one fp64 tensor, so that one all-reduce brings those of all ranks together.

    A router's numbers lie side by side, so that it adds them in two products: what it decided (choices, gates, entropy)
    and what its logits were (probabilities, z). The sums of one forward pass are taken in fp32, all of them are moved
    to `flat` at once when it is over.

    Args:
        sizes: number of experts of each router
        device: where sums are kept

    Attributes:
        flat: the tensor
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        lengths = [4 * size + 1 for size in sizes]
        self.flat = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        self._of_forward = self.flat.float()
        # Views are made once: to cut them in each layer's forward would take time that grows with the layers' square.
        blocks = zip(self._of_forward.split(lengths), sizes, strict=True)
        pairs = [block.split([3 * size, size + 1]) for block, size in blocks]
        self._decided, self._logits = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        begins = [sum(lengths[:router]) for router in range(len(sizes))]

        def places(of_router: Callable[[int], range]) -> Tensor:
            found = [b + k for b, size in zip(begins, sizes, strict=True) for k in of_router(size)]
            return torch.tensor(found, dtype=torch.int64, device=device)

        self._places = Totals(
            choices=places(lambda size: range(size)),
            gates=places(lambda size: range(size, 2 * size)),
            probabilities=places(lambda size: range(3 * size, 4 * size)),
            entropy=places(lambda size: range(2 * size, 3 * size)),
            z=places(lambda size: range(4 * size, 4 * size + 1)),
        )

    def totals(self, flat: Tensor) -> Totals:
        """A tensor as `flat`, such as the sum over all ranks, by kind."""
        return Totals(*(flat[places] for places in self._places))

    def add_decisions(self, router: int, gate_NE: Tensor, selected_NE: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router decided.

        Args:
            router: its place in the order of the model
            gate_NE: fp32, of N tokens or sequences
            selected_NE: bool
            num_tokens_N: fp32, how many real tokens each of them stands for
        """
        decided_NX = torch.cat((selected_NE, gate_NE, torch.special.entr(gate_NE)), -1)
        self._decided[router].addmv_(decided_NX.t(), num_tokens_N)

    def add_logits(self, router: int, share_NE: Tensor, log_total_N1: Tensor, num_tokens_N: Tensor) -> None:
        """Count what a router's logits were.

        Args:
            router: its place in the order of the model
            share_NE: fp32, their softmax
            log_total_N1: the logarithm of the sum of their exponentials
            num_tokens_N: as of `add_decisions`
        """
        self._logits[router].addmv_(torch.cat((share_NE, log_total_N1.square()), -1).t(), num_tokens_N)

    def finish_forward(self) -> None:
        """Move the sums of a forward pass to `flat`."""
        self.flat += self._of_forward
        self._of_forward.zero_()


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

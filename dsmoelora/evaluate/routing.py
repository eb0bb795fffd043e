"""Which experts read the rows of an evaluation, apart for right and for wrong answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dsmoelora.adapters import adapter_context
from dsmoelora.adapters.routers import routers
from dsmoelora.adapters.routing.sums import RoutingSums
from dsmoelora.evaluate.reader import Reader, Tokens
from dsmoelora.parallel import comm


class RoutingCount:
    """Sums over the tokens that go through a model, for each group of rows.

    Args:
        model: adapted, with at least one router that has something to choose
        groups: names of the groups
    """

    def __init__(self, model: nn.Module, groups: Sequence[str]) -> None:
        found = dict(routers(model))
        self.layers, self._routers = list(found), list(found.values())
        self._sizes = [router.shapes["weight"][0] for router in self._routers]
        device = next(model.parameters()).device
        self._context = adapter_context(model)
        self._sums = {group: RoutingSums(self._sizes, device) for group in groups}
        self._num_tokens = dict.fromkeys(groups, 0)

    def count(self, reader: Reader, group: str, texts: Sequence[Tokens]) -> None:
        """Put texts of a group through the model."""
        with self._listening(group) as weights_T:
            for real_BS in reader.read(texts):
                self._sums[group].finish_forward()
                weights_T[:] = [real_BS.flatten().float().to(reader.model.device)]
                self._num_tokens[group] += int(real_BS.sum())
            self._sums[group].finish_forward()

    def report(self) -> dict[str, Any]:
        """What was counted, on all ranks together (collective); JSON-able.

        For each group `num_tokens`, and for each layer the `share` of the tokens that use each expert, the mean `gate`
        of each, and the mean `entropy` of the gates, in nats.
        """
        report: dict[str, Any] = {"layers": self.layers}
        for group, sums in self._sums.items():
            (num_tokens,) = comm.all_reduce_sum([float(self._num_tokens[group])])
            totals = sums.totals(comm.sum_over_ranks(sums.flat) / max(num_tokens, 1.0))
            report[group] = {
                "num_tokens": int(num_tokens),
                "share": [part.tolist() for part in totals.choices.split(self._sizes)],
                "gate": [part.tolist() for part in totals.gates.split(self._sizes)],
                "entropy": [float(part.sum()) for part in totals.entropy.split(self._sizes)],
            }
        return report

    @contextmanager
    def _listening(self, group: str) -> Iterator[list[Tensor]]:
        """Routers count for a group inside the block, with the weights (T,) in the list."""
        weights_T: list[Tensor] = []

        def add(place: int) -> Any:
            def hook(_: nn.Module, __: Any, gate_TE: Tensor) -> None:
                self._sums[group].add_gates(place, gate_TE.float(), weights_T[0])

            return hook

        handles = [router.register_forward_hook(add(place)) for place, router in enumerate(self._routers)]
        with self._context.hooks(handles):
            yield weights_T


def remarks_on(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    groups = {name: found for name, found in report.items() if name != "layers" and found["num_tokens"]}
    lines = []
    for name, found in groups.items():
        mean = sum(found["entropy"]) / len(found["entropy"])
        lines.append(f"Routing, {name}: {found['num_tokens']:,} tokens, mean entropy of the gates {mean:.3f} nats")
    if len(groups) == 2:
        (one, ours), (other, theirs) = groups.items()
        pairs = [
            (abs(a - b), layer, expert, a, b)
            for layer, first, second in zip(report["layers"], ours["share"], theirs["share"], strict=True)
            for expert, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        _, layer, expert, a, b = max(pairs)
        lines.append(f"They differ most in expert {expert} of {layer}: used by {a:.1%} ({one}), {b:.1%} ({other})")
    return lines


def is_routed(model: nn.Module) -> bool:
    """Whether there is a router with something to choose."""
    return any(True for _ in routers(model))

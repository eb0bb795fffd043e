"""What the optimizer step reports, put together over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsmoelora.optim.preconditioner import StepReport
from dsmoelora.parallel import comm


def over_ranks(reports: Sequence[StepReport]) -> dict[str, float]:
    """What the preconditioners of all process groups met in a step, by name, the same on all ranks (collective).

    Empty without a preconditioner, where all ranks have none.
    """
    if not reports:
        return {}
    # a rank reports what its whole process group met
    square_norm = torch.stack([report.square_norm for report in reports]).double().sum()
    condition = torch.stack([report.condition for report in reports]).double().amax()
    num_fallbacks = torch.stack([report.num_fallbacks / report.num_ranks for report in reports]).double().sum()
    own = torch.stack([square_norm, condition, num_fallbacks])
    square_norms, conditions, fallbacks = zip(*comm.all_gather_numbers(own), strict=True)
    return {
        "preconditioned_norm": sum(square_norms) ** 0.5,
        "condition": max(conditions),
        "eigh_fallbacks": float(round(sum(fallbacks))),
    }

"""What the optimizer step reports, put together over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoelora.optim.preconditioner import StepReport
from dsmoelora.parallel import comm


def over_ranks(reports: Sequence[StepReport]) -> dict[str, float]:
    """What the preconditioners of all process groups met in a step, by name, the same on all ranks (collective).

    Empty without a preconditioner, where all ranks have none.
    """
    if not reports:
        return {}
    # a rank reports what its whole process group met
    own = [
        sum(float(report.square_norm) for report in reports),
        max(float(report.condition) for report in reports),
        sum(report.num_fallbacks / report.num_ranks for report in reports),
    ]
    square_norms, conditions, num_fallbacks = zip(*comm.all_gather_floats(own), strict=True)
    return {
        "preconditioned_norm": sum(square_norms) ** 0.5,
        "condition": max(conditions),
        "eigh_fallbacks": float(round(sum(num_fallbacks))),
    }

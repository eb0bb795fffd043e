"""What the preconditioners of several process groups report, put together."""

from __future__ import annotations

import torch

from dsmoelora.optim.preconditioner import StepReport
from dsmoelora.parallel.reports import over_ranks
from tests.host_waits import HostWaits


def test_reports_of_all_groups_are_read_at_once() -> None:
    reports = [
        StepReport(torch.tensor(7.0), torch.tensor(2), torch.tensor(9.0)),
        StepReport(torch.tensor(8.0), torch.tensor(1), torch.tensor(16.0)),
    ]
    with HostWaits() as waits:
        found = over_ranks(reports)
    assert found == {"preconditioned_norm": 5.0, "condition": 8.0, "eigh_fallbacks": 3.0}
    assert waits.num_reads == 0


def test_without_a_preconditioner_there_is_nothing_to_report() -> None:
    assert over_ranks([]) == {}

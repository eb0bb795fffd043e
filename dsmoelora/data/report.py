"""What was lost of a source on its way to samples, and which conversations were taken apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsmoelora.data.tokenised import TokenisedSet

_SHOWN = 3  # problems that are spelled out


@dataclass(frozen=True)
class SetReport:
    """Counts of one source.

    Args:
        name: of the source
        num_rows: all of them
        num_skipped: wrong rows that were left out (`data.on_bad_row: skip`)
        problems: the first of these, each with its row
        num_truncated: samples that were cut at `data.max_length` and still have something to learn
        num_dropped: samples of right rows left out because nothing to learn was left of them
        splits: conversations that have a row for each answer: why, how many, and their rows
    """

    name: str
    num_rows: int
    num_skipped: int
    problems: tuple[str, ...]
    num_truncated: int
    num_dropped: int
    splits: tuple[tuple[str, int, int], ...] = ()

    def losses(self) -> str:
        """A line for the user, empty where nothing was lost and no conversation was taken apart."""
        of, of_samples = f"of {self.num_rows:,}", f"of {self.num_samples:,}"
        parts = []
        if self.num_skipped:
            more = " ..." if self.num_skipped > len(self.problems) else ""
            shown = f" ({' '.join(self.problems)}{more})" if self.problems else ""
            parts.append(f"{self.num_skipped:,} {of} rows skipped{shown}")
        if self.num_truncated:
            parts.append(f"{self.num_truncated:,} {of_samples} cut at data.max_length")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} {of_samples} left out, for nothing to learn was left of them")
        for why, num_conversations, num_rows in self.splits:
            parts.append(f"{num_conversations:,} {of} became {num_rows:,} rows, one for each answer, because {why}")
        return f"{self.name}: {'; '.join(parts)}" if parts else ""

    @property
    def num_samples(self) -> int:
        """Rows, and the further ones of conversations that have a row for each answer."""
        return self.num_rows + sum(num_rows - num_conversations for _, num_conversations, num_rows in self.splits)


def report_of(data: TokenisedSet) -> SetReport:
    """Count one source's rows."""
    columns = data.tokens.with_format("numpy")
    num_supervised, truncated = (np.asarray(columns[name][:]) for name in ("num_supervised", "truncated"))
    problems = data.tokens["problem"][:]
    skipped = [i for i, problem in enumerate(problems) if problem]
    places, splits = data.tokens["place"][:], data.tokens["split"][:]
    shown = [f"row {data.rows[places[i]]['row']}: {problems[i]}" for i in skipped[:_SHOWN]]
    rows_of: dict[str, list[int]] = {}
    for place, why in zip(places, splits, strict=True):
        if why:
            rows_of.setdefault(why, []).append(place)
    return SetReport(
        data.name,
        len(data.rows),
        len(skipped),
        tuple(shown),
        int(np.sum(truncated & (num_supervised > 0))),
        int(np.sum(num_supervised == 0)) - len(skipped),
        tuple((why, len(set(rows)), len(rows)) for why, rows in sorted(rows_of.items())),
    )


def all_losses(reports: Iterable[SetReport]) -> list[str]:
    """A line for each source that lost something."""
    return [line for report in reports if (line := report.losses())]

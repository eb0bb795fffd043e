"""What comes of all rows: scores with their intervals, the base's beside the adapter's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dsmoelora.evaluate.items import Item
from dsmoelora.evaluate.marks import Interval, mean_of_tokens, wilson
from dsmoelora.evaluate.scores import Outcome, Score

ALL = "all"


def summary_of(score: Score, items: Sequence[Item], stages: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """For each source, and for all where there are several: counts and scores; JSON-able.

    Args:
        score: what was asked
        items: all of them
        stages: what came of them, by who was asked: `base`, `adapter`
    """
    paths = list(dict.fromkeys(item.path for item in items))
    groups = {path: [place for place, item in enumerate(items) if item.path == path] for path in paths}
    if len(groups) > 1:
        groups[ALL] = list(range(len(items)))
    metrics: dict[str, Callable[[Sequence[Outcome]], Interval]] = {"loss": _loss}
    shares = score.shares_of(items)
    if shares:
        metrics = {name: _share_of(key) for key, name in shares.items()}
    rows = []
    for name, places in groups.items():
        chosen = {stage: [found[place] for place in places] for stage, found in stages.items()}
        for metric, value in metrics.items():
            row: dict[str, Any] = {"data": name, "metric": metric, "count": len(places)}
            row |= {stage: asdict(value(found)) for stage, found in chosen.items()}
            key = next((key for key, called in shares.items() if called == metric), None)
            if key is not None and "base" in chosen and "adapter" in chosen:
                row |= _changed(key, chosen["base"], chosen["adapter"])
            rows.append(row)
    return rows


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The summary for a reader: values with their 95 % intervals."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    stages = [stage for stage in ("base", "adapter") if stage in rows[0]]
    table.add_column("data", overflow="fold")
    table.add_column("score")
    for header in ("rows", *stages, *(["won / lost"] if any("won" in row for row in rows) else [])):
        table.add_column(header, justify="right", no_wrap=True)
    names = {row["data"]: Path(row["data"]).stem for row in rows}
    for row in rows:
        cells = [_shown(row["metric"], row[stage]) for stage in stages]
        if "won" in row:
            cells.append(f"{row['won']:,} / {row['lost']:,}")
        unique = len(set(names.values())) == len(names)
        name = names[row["data"]] if unique else row["data"]
        table.add_row(Text(name), row["metric"], f"{row['count']:,}", *cells)
    return table


def _shown(metric: str, value: Mapping[str, float]) -> str:
    if metric == "loss":
        return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})"
    return f"{value['value']:.1%} ({100 * value['low']:.1f}-{100 * value['high']:.1f})"


def _loss(outcomes: Sequence[Outcome]) -> Interval:
    counts = [outcome["num_tokens"] for outcome in outcomes]
    return mean_of_tokens([outcome["score"] * n for outcome, n in zip(outcomes, counts, strict=True)], counts)


def _share_of(key: str) -> Callable[[Sequence[Outcome]], Interval]:
    return lambda outcomes: wilson(sum(outcome[key] for outcome in outcomes), len(outcomes))


def _changed(key: str, base: Sequence[Outcome], adapter: Sequence[Outcome]) -> dict[str, int]:
    """Rows that the base gets wrong and the adapter right, and the other way round."""
    pairs = [(one[key], other[key]) for one, other in zip(base, adapter, strict=True)]
    return {"won": pairs.count((0, 1)), "lost": pairs.count((1, 0))}

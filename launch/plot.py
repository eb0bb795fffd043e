"""Draw the curves of one or more runs into one picture.

    python launch/plot.py runs/a runs/b --out plot.png

Training and held-out loss, learning rate and throughput, a colour for each run, and the load of the routers and how
alike the experts are, where a run wrote it down, out of runs/<name>/metrics.jsonl. Works while a run goes on. Needs
matplotlib and no screen.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from dsmoelora.cli import FlagParser, run_guarded
from dsmoelora.errors import ConfigError, bad_value
from dsmoelora.run.files import METRICS_FILE, read_metrics

SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = "petroff10"  # of matplotlib: tells ten lines apart, also for colour-blind eyes
SMOOTHED_SHARE = 0.04  # of a run's steps: the window of the running mean that is drawn over a long curve
MIN_WINDOW = 4  # steps; a shorter mean would hide nothing and lag behind
GREY = "0.35"
AROUND_ZERO = "RdBu"  # matplotlib: red below zero, blue above


@dataclass(frozen=True)
class Heat:
    """A number for every expert of every layer.

    Args:
        where: it was written down, such as `step 10`
        rows: for each layer, those of its experts; NaN where a layer has fewer experts, or there is none
    """

    where: str
    rows: list[list[float]]


@dataclass(frozen=True)
class Map:
    """What heat maps show.

    Args:
        table: of a line of metrics
        column: of the table, a list for each layer
        title: what it is called
        unit: of the colours
    """

    table: str
    column: str
    title: str
    unit: str


MAPS = (
    Map("experts", "share", "Router load", "share of tokens that use the expert"),
    Map("cosines", "largest", "Experts alike", "largest cosine with another expert's update"),
)


@dataclass(frozen=True)
class Run:
    """The metrics of one run.

    Args:
        name: in the legend
        rows: lines of its `metrics.jsonl`
    """

    name: str
    rows: Sequence[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; a value that was not finite is NaN, which leaves a gap."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in found], [math.nan if value is None else value for _, value in found]

    def heat(self, what: Map) -> Heat | None:
        """The newest numbers of a kind; None where there are none."""
        lines = [row for row in self.rows if what.table in row]
        if not lines:
            return None
        layers = [[math.nan if one is None else one for one in layer] for layer in lines[-1][what.table][what.column]]
        if not any(not math.isnan(one) for layer in layers for one in layer):
            return None
        return Heat(f"step {lines[-1]['step']}", _of_one_width(layers))


def _of_one_width(layers: Sequence[Sequence[float]]) -> list[list[float]]:
    """Filled up with NaN."""
    width = max(len(layer) for layer in layers)
    return [[*layer, *[math.nan] * (width - len(layer))] for layer in layers]


def main() -> None:
    """Read, draw, save."""
    options = parse_options(sys.argv[1:])
    runs = read_runs(options.runs)
    try:
        draw(runs).savefig(options.out, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written ({error.strerror}). Name another file.") from error
    print(f"Drew {', '.join(run.name for run in runs)} into {options.out}")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: `--out` is no picture
    """
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, e.g. runs/demo")
    parser.add_argument("--out", type=Path, default=Path("plot.png"), help="picture to write; default: plot.png")
    options = parser.parse_args(argv)
    check_picture(options.out)
    return options


def check_picture(out: Path) -> None:
    """Make sure that a picture can be written there.

    Raises:
        ConfigError: `--out` is no picture
    """
    if out.suffix not in SUFFIXES or out.is_dir():
        raise bad_value("--out", str(out), f"a file that ends in {', '.join(SUFFIXES)}", "Example: plot.png.")


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs, named by their folders, or by the paths as given where names are not unique.

    Raises:
        ConfigError: a folder has no metrics
    """
    folders = list(folders)
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        path = folder / METRICS_FILE
        if not path.is_file():
            raise ConfigError(f"{folder} holds no {METRICS_FILE}. Give the folder of a run, e.g. runs/demo.")
        rows = read_metrics(path)
        if not rows:
            raise ConfigError(f"{path} holds no line yet. Wait for the run's first step, or leave it out.")
        runs.append(Run(name if names.count(name) == 1 else str(folder), rows))
    return runs


def draw(runs: Sequence[Run]) -> Any:
    """A matplotlib figure: losses above, learning rate and throughput below, then the heat maps of experts.

    Raises:
        ConfigError: matplotlib is not installed
    """
    check_matplotlib("launch/plot.py")
    import matplotlib
    from matplotlib.figure import Figure

    maps = [(what, heats) for what in MAPS if (heats := {run.name: heat for run in runs if (heat := run.heat(what))})]
    figure = Figure(figsize=(10, 7.5 + 3.5 * len(maps)), layout="constrained")
    grid = figure.add_gridspec(2 + len(maps), 2, height_ratios=[3, 2] + [3] * len(maps))
    loss, rate, speed = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    colours = matplotlib.color_sequences[COLOURS]
    for place, run in enumerate(runs):
        colour = colours[place % len(colours)]
        _draw_smoothed(loss, run.curve("loss"), colour)
        loss.plot(*run.curve("eval/loss"), color=colour, marker="o", markersize=5, linewidth=1.8)
        rate.plot(*run.curve("lr"), color=colour, linewidth=1.5)
        _draw_smoothed(speed, run.curve("throughput(tokens/s)"), colour)
    _describe(loss, "Loss", "mean negative log likelihood\n(nats per supervised token)")
    _describe(rate, "Learning rate", "learning rate")
    rate.yaxis.set_major_formatter("{x:g}")
    _describe(speed, "Throughput", "tokens per second, all ranks")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    _add_legend(figure, runs, colours)
    for row, (what, heats) in enumerate(maps, 2):
        below = grid[row, :].subgridspec(1, len(heats))
        _draw_heats([figure.add_subplot(below[0, place]) for place in range(len(heats))], what, heats)
    return figure


def check_matplotlib(who: str) -> None:
    """Make sure that pictures can be drawn.

    Raises:
        ConfigError: they cannot
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{who} draws with matplotlib, which is not installed. pip install matplotlib")


def draw_routing(report: Mapping[str, Any]) -> Any:
    """A matplotlib figure: the load of the routers for each group of rows, and the difference of two.

    Args:
        report: of `RoutingCount.report`
    """
    from matplotlib.figure import Figure

    groups = {name: found for name, found in report.items() if name != "layers" and found["num_tokens"]}
    num_maps = 3 if len(groups) == 2 else len(groups)
    figure = Figure(figsize=(5 * num_maps + 1, 5), layout="constrained")
    all_axes = [figure.add_subplot(1, num_maps, place) for place in range(1, num_maps + 1)]
    heats = {
        name: Heat(f"{found['num_tokens']:,} tokens", _of_one_width(found["share"])) for name, found in groups.items()
    }
    _draw_heats(all_axes[: len(heats)], MAPS[0], heats)
    if len(heats) == 2:
        _draw_difference(all_axes[2], heats)
    return figure


def _draw_heats(all_axes: Sequence[Any], what: Map, heats: Mapping[str, Heat]) -> None:
    """A heat map for each run, of one scale: a row for each layer, a column for each expert."""
    values = [value for heat in heats.values() for row in heat.rows for value in row if not math.isnan(value)]
    lowest, highest = min(0.0, *values), max(1e-9, *values)  # cosines may be negative
    for axes, (name, heat) in zip(all_axes, heats.items(), strict=True):
        image = _draw_map(axes, heat.rows, f"{what.title}, {heat.where}\n{name}", vmin=lowest, vmax=highest)
    all_axes[0].set_ylabel("routed layer, first to last", color=GREY)
    bar = all_axes[0].figure.colorbar(image, ax=list(all_axes))
    bar.set_label(what.unit, color=GREY)


def _draw_difference(axes: Any, heats: Mapping[str, Heat]) -> None:
    """Where the first of two maps is above the second, on a scale of its own."""
    (one, first), (other, second) = heats.items()
    rows = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(first.rows, second.rows, strict=True)]
    largest = max(1e-9, *(abs(value) for row in rows for value in row if not math.isnan(value)))
    image = _draw_map(axes, rows, f"Difference\n{one} - {other}", vmin=-largest, vmax=largest, cmap=AROUND_ZERO)
    axes.figure.colorbar(image, ax=axes)


def _draw_map(axes: Any, rows: Sequence[Sequence[float]], title: str, **colours: Any) -> Any:
    """A row for each layer, a column for each expert."""
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", **colours)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("expert", color=GREY)
    axes.tick_params(colors=GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image


def _draw_smoothed(axes: Any, curve: tuple[list[float], list[float]], colour: Any) -> None:
    """The values pale, their running mean over them; short curves as they are."""
    steps, values = curve
    window = round(len(values) * SMOOTHED_SHARE)
    if window < MIN_WINDOW:
        axes.plot(steps, values, color=colour, linewidth=1.0, alpha=0.9)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.2)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at every place, of fewer at the beginning; NaN values are left out."""
    means = []
    for end in range(1, len(values) + 1):
        part = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def _describe(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer step", color=GREY)
    axes.set_ylabel(unit, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")


def _add_legend(figure: Any, runs: Sequence[Run], colours: Sequence[Any]) -> None:
    """Above everything, where no curve runs: colours tell runs apart, line styles training from held-out."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colours[place % len(colours)], linewidth=3, label=run.name)
        for place, run in enumerate(runs)
    ]
    if any("eval/loss" in row for run in runs for row in run.rows):
        handles.append(Line2D([], [], color=GREY, linewidth=1.2, label="loss in training"))
        handles.append(Line2D([], [], color=GREY, linewidth=1.8, marker="o", markersize=5, label="held-out loss"))
    figure.legend(handles=handles, loc="outside upper right", ncols=min(4, len(handles)), frameon=False)


if __name__ == "__main__":
    sys.exit(run_guarded(main))

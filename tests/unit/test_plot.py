"""launch/plot.py: what is in the files is in the picture, with units and names."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoelora.errors import ConfigError
from launch import plot

pytest.importorskip("matplotlib")


def make_run(folder: Path, num_steps: int = 5, eval_every: int = 5) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(num_steps + 1):
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {"loss": None if step == 3 else 4.0 / step, "lr": 1e-3 * step, "throughput(tokens/s)": 1000.0 + step}
        if eval_every and step % eval_every == 0:
            row["eval/loss"] = 5.0 - step / num_steps
        rows.append(row)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    return folder


def lines_of(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_every_panel_shows_its_metric_of_every_run(tmp_path: Path) -> None:
    figure = plot.draw(plot.read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", eval_every=0)]))
    loss, rate, speed = figure.axes
    (steps, train), held_out, second, nothing = lines_of(loss)
    assert steps == [1, 2, 3, 4, 5]
    assert train[:2] == [4.0, 2.0] and math.isnan(train[2])  # a skipped step leaves a gap
    assert held_out == ([0, 5], [5.0, 4.0])
    assert second[0] == steps and nothing == ([], [])
    assert lines_of(rate)[0] == (steps, pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))
    assert lines_of(speed)[1] == (steps, [1001.0, 1002.0, 1003.0, 1004.0, 1005.0])


def test_axes_have_units_and_the_legend_the_names_of_the_runs(tmp_path: Path) -> None:
    figure = plot.draw(plot.read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    for axes, unit in zip(
        figure.axes, ("nats per supervised token", "learning rate", "tokens per second"), strict=True
    ):
        assert unit in axes.get_ylabel() and axes.get_xlabel() == "optimizer step"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "loss in training", "held-out loss"]


def test_the_load_of_routers_is_drawn_where_a_run_has_it(tmp_path: Path) -> None:
    plain, routed = make_run(tmp_path / "plain"), make_run(tmp_path / "routed")
    shares = [[0.5, 0.25, 0.25], [0.9, 0.1]]  # the second layer has two experts
    with (routed / "metrics.jsonl").open("w") as file:
        for step, factor in ((1, 0.0), (2, 1.0)):
            table = {"layers": ["x", "y"], "share": [[factor * share for share in layer] for layer in shares]}
            file.write(json.dumps({"step": step, "loss": 1.0, "experts": table}) + "\n")
    assert len(plot.draw(plot.read_runs([plain])).axes) == 3
    heat = plot.draw(plot.read_runs([plain, routed])).axes[3]
    ((first, second),) = (image.get_array().tolist() for image in heat.get_images())
    assert first == shares[0] and second[:2] == shares[1] and second[2] is None
    assert heat.get_images()[0].get_clim()[0] == 0.0
    assert heat.get_title("left") == "Router load, step 2\nrouted"
    assert heat.get_xlabel() == "expert" and "layer" in heat.get_ylabel()


def test_how_alike_experts_are_is_drawn_below(tmp_path: Path) -> None:
    routed, unknown = make_run(tmp_path / "routed"), make_run(tmp_path / "unknown")
    for run, largest in ((routed, [[0.5, -0.5], [None, 0.25]]), (unknown, [[None, None]])):
        with (run / "metrics.jsonl").open("w") as file:
            line = {"step": 4, "loss": 1.0, "cosines": {"layers": ["x", "y"], "largest": largest, "mean": [0.1, None]}}
            file.write(json.dumps(line) + "\n")
    _, _, _, heat, bar = plot.draw(plot.read_runs([routed, unknown])).axes
    (image,) = heat.get_images()
    assert image.get_array().tolist() == [[0.5, -0.5], [None, 0.25]]
    assert image.get_clim() == (-0.5, 0.5)  # no negative cosine is cut off
    assert heat.get_title("left") == "Experts alike, step 4\nrouted"
    assert "cosine" in bar.get_ylabel()


def test_right_and_wrong_answers_are_drawn_beside_their_difference() -> None:
    shares = {"right answers": [[0.75, 0.25], [1.0]], "wrong answers": [[0.5, 0.5], [1.0]]}
    groups = {name: {"num_tokens": 4, "share": share} for name, share in shares.items()}
    figure = plot.draw_routing({"layers": ["x", "y"], **groups})
    maps = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title("left").partition("\n")[2] for axes in maps] == [*shares, "right answers - wrong answers"]
    (difference,) = maps[2].get_images()
    assert difference.get_array().tolist() == [[0.25, -0.25], [0.0, None]]  # the second layer has one expert
    assert difference.get_clim() == (-0.25, 0.25)
    alone = plot.draw_routing({"layers": ["x", "y"], "all rows": groups["right answers"]})
    assert len([axes for axes in alone.axes if axes.get_images()]) == 1


def test_a_long_curve_gets_its_running_mean() -> None:
    assert plot.running_mean([1.0, 3.0, math.nan, 5.0, 7.0], 2) == [1.0, 2.0, 3.0, 5.0, 6.0]
    assert math.isnan(plot.running_mean([math.nan], 2)[0])


def test_a_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    make_run(tmp_path / "a", num_steps=200)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "a"), "--out", str(tmp_path / "plot.png")])
    plot.main()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Drew a into" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "x" / "demo"), make_run(tmp_path / "y" / "demo"), make_run(tmp_path / "y" / "other")]
    assert [run.name for run in plot.read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "--out", "plot.txt"], r"--out is 'plot\.txt'.*\.png, \.pdf, \.svg"),
        (["nowhere"], r"nowhere holds no metrics\.jsonl"),
        (["RUN", "--out", "nowhere/plot.png"], r"--out nowhere/plot\.png cannot be written"),
    ],
)
def test_what_cannot_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    make_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["plot.py", *(str(tmp_path / "a") if word == "RUN" else word for word in arguments)]
    )
    with pytest.raises(ConfigError, match=said):
        plot.main()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot.draw(plot.read_runs([make_run(tmp_path / "a")]))

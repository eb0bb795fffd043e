"""The table of docs/planning.md: measurements that are kept, beside what is planned now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planner.__main__ import main
from benchmarks.planner.cells import Cells
from benchmarks.planner.rows import ROWS
from benchmarks.planner.table import Line, Pair, lines_of, summary, table
from dsmoelora.errors import ConfigError
from tests.conftest import thorough

ROOT = Path(__file__).parents[2]
KEPT = Cells(ROOT / "benchmarks/planner/measured")
MEASURED = [name for name in ROWS if KEPT.read(name, "held")]
QUICK = ("stage 0", "stage 3, W 2, ep_size 2, gather")  # the others guard a release
# Plans have no copy that gloo makes of what it gathers: here of the embedding, when most is there (docs/planning.md).
GLOO_COPIES = {"1B, stage 3, W 2": 4 * 128_256 * 2_048}
STAGE_0 = {"at_rest": 100 << 20, "peak": 160 << 20, "resident": 300 << 20, "messages": 0, "sent": 0}


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/planning.md").read_text()


@pytest.mark.parametrize("name", [name if name in QUICK else thorough(name) for name in MEASURED])
def test_what_is_planned_now_is_what_was_measured_and_what_the_page_shows(name: str, page: str, tmp_path: Path) -> None:
    (line,) = lines_of(KEPT, tmp_path, [name])
    assert line.at_rest.ratio == pytest.approx(1, abs=0.02)
    with_copy = (line.peak.planned + GLOO_COPIES.get(name, 0)) / line.peak.measured
    assert with_copy == pytest.approx(1, abs=0.1)
    assert line.sent.ratio == pytest.approx(1, abs=0.02)
    assert line.messages.planned == line.messages.measured
    assert table([line])[-1] in page.splitlines()


def test_the_page_has_all_measured_rows_and_says_what_they_were_measured_on(page: str) -> None:
    (_, *lines) = page[page.index(table([])[0]) :].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[1:]] == MEASURED
    for kind in ("held", "time"):
        assert all(machine in page for machine in KEPT.settings(kind, ROWS))


def test_rows_are_those_that_are_asked_for() -> None:
    """At least a dozen: all stages, one, two and four ranks, experts over ranks, both shapes."""
    assert len(ROWS) >= 12
    assert {row.zero["stage"] for row in ROWS.values()} == {0, 1, 2, 3}
    assert {row.ranks for row in ROWS.values()} == {1, 2, 4}
    assert {row.shape for row in ROWS.values()} == {"135M", "1B"}
    assert {row.recipe(Path()).parallel.ep_size for row in ROWS.values()} == {1, 2}


def test_a_line_shows_planned_measured_and_their_ratio() -> None:
    mib = 1 << 20
    pairs = (Pair(100 * mib, 100 * mib), Pair(150 * mib, 160 * mib))
    line = Line("a run", *pairs, 300 * mib, Pair(30 * mib, 20 * mib), Pair(3, 4), Pair(1.5, 2))
    assert table([line])[-1] == (
        "| a run | 100.0 / 100.0 = 1.000 | 150.0 / 160.0 = 0.938 | 0.83 | 300 | 30.0 / 20.0 = 1.500 | 3 / 4 "
        "| 1.50 / 2.00 = 0.75 |"
    )
    alone = Line("alone", *pairs, 300 * mib, Pair(0, 0), Pair(0, 0), None)
    assert table([alone])[-1].endswith("| 300 | - | - |  |")
    assert summary([line, alone]) == (
        "planned / measured, peak: median 0.938, 0.938 to 0.938; sent: median 1.500, 1.500 to 1.500; "
        "step: median 0.750, 0.750 to 0.750"
    )


def test_a_cell_of_other_settings_is_refused(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    assert cells.read("stage 0", "held") is None
    cells.write("stage 0", "held", "a machine", STAGE_0)
    assert cells.read("stage 0", "held") == STAGE_0
    assert cells.settings("held", ROWS) == ["a machine"]
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"settings": {}}))
    with pytest.raises(ConfigError, match=r"stage-0\.held\.json was measured with other settings of 'stage 0'"):
        cells.read("stage 0", "held")


def test_a_table_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table", "--cells", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == ["held: not measured", "time: not measured", *table([])]

"""What tests cost: CPU seconds of the processes that they start too, `make PYTEST_ARGS="-p tests.costs" test`.

Waits cost nothing here, and what runs beside the tests changes little.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

_SHOWN = 12  # files
_begun = pytest.StashKey[float]()
_of_files: Counter[str] = Counter()
_num_tests: Counter[str] = Counter()


def _cpu_seconds() -> float:
    """Of this process, of its children that have ended, and of those that live."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])
    return total


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_begun] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    result = yield
    item.user_properties.append(("cpu_s", _cpu_seconds() - item.stash[_begun]))
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        file = report.nodeid.partition("::")[0]
        _of_files[file] += dict(report.user_properties).get("cpu_s", 0.0)
        _num_tests[file] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tiers: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for file, seconds in _of_files.items():
        tiers["/".join(file.split("/")[:2])] += seconds
        counts["/".join(file.split("/")[:2])] += _num_tests[file]
    terminalreporter.section("CPU seconds")
    for tier, seconds in tiers.most_common():
        terminalreporter.line(f"{seconds:7.0f}  {counts[tier]:5d} tests  {tier}")
    for file, seconds in _of_files.most_common(_SHOWN):
        terminalreporter.line(f"{seconds:7.1f}  {_num_tests[file]:5d} tests  {file}")

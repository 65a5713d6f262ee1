"""A pytest plugin: tests that have passed, by a list in a file, are not run again. `-p benchmarks.gpu.passed`."""

from __future__ import annotations

from pathlib import Path

import pytest

_passed: Path | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file."""
    parser.addoption("--passed", type=Path, required=True, help="file with the ids of the tests that have passed")


def pytest_configure(config: pytest.Config) -> None:
    """Remember where the file is, for the reports, which do not tell."""
    global _passed
    _passed = config.getoption("--passed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    passed = set(_passed.read_text(encoding="utf-8").splitlines()) if _passed and _passed.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what has passed, at once: the run may be ended at any time."""
    if report.when == "call" and report.passed and _passed:
        with _passed.open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")

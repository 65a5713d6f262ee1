"""The steps of the check: processes that leave a result in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measures import MEASURES
from .target import Target

__all__ = ["LAWS", "Step", "run", "steps"]

ROOT = Path(__file__).resolve().parents[2]
LAWS = sorted(path.stem for path in (ROOT / "tests" / "laws").glob("test_*.py"))
# Of --quick, by pytest's -k.
QUICK_LAWS = {"test_law_01_scope": "llama", "test_pieces_of_a_graph": "llama and to_the_bit"}
NOTHING_TO_RUN = 5  # pytest's exit status

Found = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: As the report calls it.
        command: What to run.
        env: Variables of the environment to add.
        read: Gives the result, from the exit status; None if the process failed.
    """

    name: str
    command: list[str]
    env: dict[str, str]
    read: Callable[[int], Found | None]


def steps(target: Target, arguments: Sequence[str], folder: Path) -> list[Step]:
    """All steps, in their order: a model, the laws' tests, and the measurements.

    Args:
        target: What is checked.
        arguments: Of the command line, that say what is checked.
        folder: Where the steps leave their files.
    """
    first, *others = MEASURES
    laws = [name for name in LAWS if not target.quick or name in QUICK_LAWS]
    return [
        _measure(first, arguments, folder),
        *(_law(name, target, folder) for name in laws),
        *(_measure(name, arguments, folder) for name in others),
    ]


def _measure(name: str, arguments: Sequence[str], folder: Path) -> Step:
    out = folder / f"{name.replace(' ', '-')}.result"

    def read(status: int) -> Found | None:
        return json.loads(out.read_text(encoding="utf-8")) if status == 0 else None

    command = [sys.executable, "-m", "benchmarks.gpu.measures", name, "--out", str(out), *arguments]
    return Step(name, command, {}, read)


def _law(name: str, target: Target, folder: Path) -> Step:
    passed, told = folder / f"{name}.passed", folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", f"tests/laws/{name}.py", "-q", "-p", "benchmarks.gpu.passed",
               "--passed", str(passed), "--junitxml", str(told)]  # fmt: skip
    if target.quick:
        command += ["-k", QUICK_LAWS[name]]
    # All layers of every model on the device; the CPU is handed pieces where it stands in.
    env = {"LLAMACANCEL_TEST_PIECES": "100"} if target.forced else {"LLAMACANCEL_TEST_GPU_LAYERS": "999"}

    def read(status: int) -> Found | None:
        done = passed.read_text(encoding="utf-8").splitlines() if passed.exists() else []
        if status not in (0, 1, NOTHING_TO_RUN) or not told.exists():
            return None
        suite = next(ElementTree.parse(told).iter("testsuite"))
        failed = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
                  if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
        skipped = int(suite.get("skipped", 0))
        return {"passed": len(set(done)), "failed": failed, "skipped": skipped}

    return Step(name, command, env, read)


def run(step: Step, seconds: float, log: Path) -> tuple[Found | None, str]:
    """Run a step's process, and end it and its children when the time is over.

    Returns:
        The result, or None with the reason in words.
    """
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, **step.env}, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, f"not done after {seconds:.0f} s"
    found = step.read(status)
    if found is None:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return None, f"exit status {status}: {''.join(last)}"
    return {"took": time.monotonic() - begin, **found}, ""

"""`python -m benchmarks.gpu`: the laws on a GPU, and what a cancel costs there."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import machine
from ..report import rounded
from . import report
from .measures import add_arguments, target_of
from .steps import ROOT, run, steps
from .target import NoDeviceError, Target

DONE, FAILED, NO_DEVICE, NOT_ALL, STOPPED = 0, 1, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that have not been done yet, and report what all of them found.

    Returns:
        0 if all steps are done and no law was broken; 1 if a step failed, a test of the laws failed or other bits
        came out; 3 if there is no device; 4 if the time was over before the last step: run it again; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, rest = _parser().parse_known_args(arguments)
    checked = argparse.ArgumentParser(prog="python -m benchmarks.gpu", parents=[_parser()], allow_abbrev=False,
                                      description="Run the laws' tests on a GPU and measure what a cancel costs there. "
                                      "What was done is kept: run it again to go on where it stopped.")  # fmt: skip
    add_arguments(checked)
    args = checked.parse_args(arguments)
    try:
        target = target_of(args)
    except NoDeviceError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return NO_DEVICE
    folder = own.out / _slug(target)
    if own.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"gpu-check: {target.name}, {target.description}; results in {folder}", file=sys.stderr)
    state = _Done(folder / "done.json")
    end = time.monotonic() + 60 * own.minutes if own.minutes else float("inf")
    try:
        outcome = _run_all(target, rest, folder, state, own.step_seconds, end)
    except KeyboardInterrupt:
        outcome = STOPPED
    results = {
        "schema": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "target": target.as_dict(),
        "machine": machine.describe(),
        "steps": state.found,
        "failures": state.failures,
        "left": [step.name for step in steps(target, rest, folder) if step.name not in state.found],
    }
    results["targets"] = report.targets(results)
    text = report.markdown(results)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    print(text)
    print(f"wrote {folder / 'report.md'} and report.json", file=sys.stderr)
    if outcome == DONE and (state.failures or report.broken(results)):
        return FAILED
    return outcome


def _run_all(
    target: Target, arguments: Sequence[str], folder: Path, state: _Done, step_seconds: float, end: float
) -> int:
    plan = steps(target, arguments, folder)
    for i, step in enumerate(plan):
        where = f"[{i + 1}/{len(plan)}] {step.name}"
        if step.name in state.found:
            print(f"{where}: done before", file=sys.stderr)
            continue
        left = end - time.monotonic()
        if left <= 0:
            print("gpu-check: the time is over; run it again to go on", file=sys.stderr)
            return NOT_ALL
        print(f"{where} ...", file=sys.stderr, flush=True)
        log = folder / f"{step.name.replace(' ', '-')}.log"
        found, why = run(step, min(step_seconds, left), log)
        if found is None and left < step_seconds:
            continue  # it had less than its time: no failure, the next run does it
        state.note(step.name, found, f"{why} (see {log.name})")
        print(f"{where}: {why}" if found is None else f"{where}: {found['took']:.0f} s", file=sys.stderr)
    return DONE if len(state.found) + len(state.failures) == len(plan) else NOT_ALL


class _Done:
    """What was done, kept in a file that is whole at any time. What failed is tried again by the next run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.failures: dict[str, str] = {}

    def note(self, name: str, found: dict[str, Any] | None, why: str) -> None:
        """Keep a step's result; a step of which a test failed is not done."""
        if found is None:
            self.failures[name] = why
            return
        if found.get("failed"):
            self.failures[name] = f"{len(found['failed'])} tests failed: {', '.join(found['failed'][:5])}"
            return
        self.found[name] = found
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(rounded(self.found)), encoding="utf-8")
        part.replace(self._path)


def _slug(target: Target) -> str:
    words = [target.name, target.description, target.size, "quick" if target.quick else ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for state and reports")
    parser.add_argument("--again", action="store_true", help="forget what was done before on this device")
    parser.add_argument("--minutes", type=float, help="end after so many minutes; the next run goes on from there")
    parser.add_argument("--step-seconds", type=float, default=590, help="most seconds for one step (590)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The process of the clients: takes a job as JSON on stdin, and writes what came of it to stdout.

It is a process of its own, so that clients and server never wait for the same interpreter.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from .engine import EngineJob, run_engine
from .freed import FreedJob, run_freed
from .load import LoadJob, run_load

__all__ = ["WorkerFailed", "do"]

Job = LoadJob | FreedJob | EngineJob


class WorkerFailed(Exception):
    """The process of the clients failed; the message has its last lines."""


def do(job: Job, timeout: float = 1200.0) -> dict[str, Any]:
    """Do a job in a process of its own.

    Raises:
        WorkerFailed: It failed or took too long.
    """
    given = json.dumps({"kind": type(job).__name__, "job": asdict(job)})
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(f"the clients were not done in {timeout:.0f} s") from error
    if done.returncode:
        raise WorkerFailed("the clients failed:\n" + "\n".join(done.stderr.strip().splitlines()[-8:]))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Read the job, do it, and write the result."""
    given = json.load(sys.stdin)
    kind, job = given["kind"], given["job"]
    if kind == "LoadJob":
        result = asyncio.run(run_load(LoadJob(**job)))
    elif kind == "FreedJob":
        result = asyncio.run(run_freed(FreedJob(**job)))
    else:
        result = run_engine(EngineJob(**job))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()

"""Tries cases of a target in a worker, which is begun anew when one has ended it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from .targets import Wrong

CASES = Path(__file__).parent / "cases"
HANG = 240.0  # seconds without an answer, on a slow and busy machine


class Tries:
    """A worker for one target.

    Attributes:
        told: How often what became of a case.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: Counter[str] = Counter()
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, case: Any) -> None:
        """Try a case.

        Raises:
            Wrong: If it is not as it must be, ended the process, or gave no answer.
        """
        if self._worker is None:
            self._begin()
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(case) + "\n")
            worker.stdin.flush()
            line = self._lines.get(timeout=HANG)
        except queue.Empty:
            self._end()
            raise Wrong(f"no answer after {HANG:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            status = worker.wait()
            self._errors.seek(0)
            last = self._errors.read()[-2000:]
            self._end()
            raise Wrong(f"the process ended with status {status}: {last}")
        answer = json.loads(line)
        if "wrong" in answer:
            raise Wrong(answer["wrong"])
        self.told[answer["told"]] += 1

    def _begin(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the worker)
        self._lines: queue.Queue[str] = queue.Queue()
        self._worker = worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", self.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        lines, out = self._lines, worker.stdout
        assert out is not None

        def read() -> None:
            with out:
                for line in out:
                    lines.put(line)
            lines.put("")

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def _end(self) -> None:
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.wait()
        self._reader.join()
        for file in (self._worker.stdin, self._errors):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()
        self._worker = None


def keep(name: str, case: Any) -> Path:
    """Keeps a case that failed; `test_cases.py` tries it from now on."""
    text = json.dumps(case, indent=1, ensure_ascii=True) + "\n"
    path = CASES / name / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

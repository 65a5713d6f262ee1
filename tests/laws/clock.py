"""A clock that tests are told by: a thread's time jumps, runs fast or stops at a chosen reading, and at no other.

A token with a deadline reads the clock each time it is looked at, and so does every call on the main thread, to look
for Ctrl-C. So a test can have a deadline pass, a signal arrive or another thread cancel at the first look, at the
second, ... at every one that there is, on a machine of any speed and load.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import llamacancel as lc

NEVER = 0
FAR = 500_000.0  # seconds: a timeout that only the jump can pass
JUMP = 1_000_000  # seconds
GENEROUS = 120.0  # seconds; a bound for what ends by itself unless something is broken


class _Watch(ctypes.Structure):
    _fields_ = (
        ("jump_at", ctypes.c_long),
        ("jump_seconds", ctypes.c_long),
        ("step_ns", ctypes.c_long),
        ("stop_at", ctypes.c_long),
        ("readings", ctypes.c_long),
        ("stopped", ctypes.c_int),
        ("go_on", ctypes.c_int),
    )


@functools.cache
def _library() -> tuple[ctypes.CDLL, ctypes.PyDLL] | None:
    """The clock, compiled and installed; None where there is no C compiler or the C++ library is another."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        return None
    with tempfile.TemporaryDirectory(prefix="llamacancel-clock-") as folder:
        built = Path(folder) / "clock.so"
        source = Path(__file__).with_name("clock.c")
        command = [compiler, "-O2", "-std=c11", "-shared", "-fPIC", "-o", built, source]
        done = subprocess.run(command, capture_output=True)
        if done.returncode != 0:
            return None
        free, holding = ctypes.CDLL(str(built)), ctypes.PyDLL(str(built))
    lc.CancelToken(), lc.Model  # both extensions are loaded, and the C++ library
    free.clock_arm.argtypes = [ctypes.c_void_p]
    free.clock_arm.restype = None
    holding.clock_hold.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return (free, holding) if free.clock_install() > 0 else None


class Clock:
    """The clock of the thread that enters it, until it leaves.

    Attributes:
        readings: How often it has been read.
    """

    def __init__(self, *, jump_at: int = NEVER, by: int = JUMP, stop_at: int = NEVER, step: float = 0.0) -> None:
        """`jump_at`, `stop_at`: at which reading, counted from 1, it jumps by so many seconds, or stops its thread.
        `step`: seconds by which each reading is ahead of the one before."""
        library = _library()
        if library is None:
            pytest.skip("needs Linux, a C compiler and libstdc++")
        self._free, self._holding = library
        self._watch = _Watch(jump_at, by, int(step * 1e9), stop_at, 0, 0, 0)

    def __enter__(self) -> Clock:
        self._free.clock_arm(ctypes.addressof(self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        self._free.clock_arm(None)

    @property
    def readings(self) -> int:
        return int(self._watch.readings)

    @property
    def stopped(self) -> bool:
        """Whether its thread has come to where it stops."""
        return bool(self._watch.stopped)

    def jumps_in(self, readings: int) -> None:
        """Has the clock, which its thread is reading, jump after so many more readings."""
        self._watch.jump_at = self.readings + readings

    def go_on(self) -> None:
        self._watch.go_on = 1

    def hold_the_gil_until(self, readings: int) -> bool:
        """Lets the stopped thread go on, and keeps the GIL until it has read its clock so many times.

        Returns:
            False if it did not within a minute, because it wants the GIL.
        """
        return bool(self._holding.clock_hold(ctypes.addressof(self._watch), readings, 60))


def deadline_at(reading: int) -> Clock:
    """Within, what has a deadline passes it at that reading of this thread's clock."""
    return Clock(jump_at=reading)


def readings_of(call: Callable[[], object]) -> int:
    """How often a call reads the clock of this thread. Its token should have a deadline, FAR away."""
    with Clock() as clock:
        call()
    return clock.readings


def wait_for(condition: Callable[[], bool], what: str = "it") -> None:
    """Returns once the condition is true, which is a matter of events and not of time."""
    end = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.0005)


class Flight:
    """A call in a thread of its own, stopped in its middle, where it stays until it lands.

    Its token must have a deadline (FAR away), so that it reads the clock.
    """

    def __init__(self, call: Callable[[], Any], at: int = 40, **clock: Any) -> None:
        """`at`: the reading at which it stops; NEVER if it is not to stop, and nothing is waited for."""
        self.told: Any = None
        self.clock = Clock(stop_at=at, **clock)
        self._call = call
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        if at != NEVER:
            wait_for(lambda: self.clock.stopped or not self.thread.is_alive(), "the call's middle")
            assert self.clock.stopped, f"the call was over after {self.clock.readings} readings: {self.told!r}"

    def _run(self) -> None:
        try:
            with self.clock:
                self.told = self._call()
        except BaseException as error:
            self.told = error

    def waits(self) -> None:
        """Returns once the call waits for a context that another one uses."""
        wait_for(lambda: self.clock.readings > 4 or not self.thread.is_alive(), "the call to wait")
        assert self.thread.is_alive(), f"the call did not wait: {self.told!r}"

    def lands(self) -> Any:
        """Lets the call go on to its end; what it returned, or raised."""
        self.clock.go_on()
        self.thread.join(GENEROUS)
        assert not self.thread.is_alive(), "the call hangs"
        return self.told

    def __enter__(self) -> Flight:
        return self

    def __exit__(self, *_: object) -> None:
        self.lands()


@contextmanager
def in_the_middle(act: Callable[[], object], at: int = 40, **clock: Any) -> Iterator[Clock]:
    """Within, a call of this thread stops at a reading of its clock; another thread acts, and the call goes on."""
    errors: list[BaseException] = []
    over = threading.Event()
    stopping = Clock(stop_at=at, **clock)

    def other() -> None:
        try:
            wait_for(lambda: stopping.stopped or over.is_set(), "the call's middle")
            if stopping.stopped:
                act()
        except BaseException as error:
            errors.append(error)
        finally:
            stopping.go_on()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        with stopping:
            yield stopping
    finally:
        over.set()
        thread.join(GENEROUS)
    if errors:
        raise errors[0]
    assert stopping.stopped, f"the call was over after {stopping.readings} readings, before its middle"

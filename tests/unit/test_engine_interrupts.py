"""An interrupt or a garbage collection may come at any line: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import llamacancel as lc
from tests.unit.engines import endless, engine, ids

PACKAGE = str(Path(lc.__file__).parent)
N = 4


class Interrupt:
    """Raises KeyboardInterrupt before the `at`th line of the package that this thread comes to, once."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.raised = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        # What is raised in a finalizer itself CPython throws away.
        ours = frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name != "__del__"
        return self._line if ours else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self.raised:
            self.left -= 1
            if self.left == 0:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def say(e: lc.Engine, seed: int) -> lc.Generation:
    return e.submit(ids(5, seed), max_tokens=N, sampler=endless())


def told(generation: lc.Generation) -> list[int]:
    return [token.id for token in generation.result(60).tokens]


def submit(e: lc.Engine, held: list[lc.Generation]) -> None:
    held.append(e.submit(ids(5, 1), max_tokens=N, sampler=endless(), request_id="it"))


def submit_and_drop(e: lc.Engine, held: list[lc.Generation]) -> None:
    e.submit(ids(5, 1), max_tokens=N, sampler=endless(), request_id="it")


def cancel(e: lc.Engine, held: list[lc.Generation]) -> None:
    held[0].cancel()


def cancel_by_id(e: lc.Engine, held: list[lc.Generation]) -> None:
    e.cancel("it")


def result(e: lc.Engine, held: list[lc.Generation]) -> None:
    held[0].result(60)


def read(e: lc.Engine, held: list[lc.Generation]) -> None:
    for _ in held[0]:
        pass


def leave_with(e: lc.Engine, held: list[lc.Generation]) -> None:
    with held[0]:
        pass


def look(e: lc.Engine, held: list[lc.Generation]) -> None:
    e.snapshot()


@pytest.mark.parametrize(
    ("call", "fresh"),
    [
        (submit, True), (submit_and_drop, True), (cancel, False), (cancel_by_id, False), (result, False),
        (read, False), (leave_with, False), (look, False),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore:nobody waits for:ResourceWarning",
    "ignore:Exception ignored in. <function Handle.__del__:pytest.PytestUnraisableExceptionWarning",
)
def test_an_interrupt_at_any_line_of_a_call_costs_that_request_at_most(
    call: Callable[[lc.Engine, list[lc.Generation]], None], fresh: bool
) -> None:
    at = 0
    with engine(slots=2) as e:
        expected = told(say(e, 2))
        alone = told(say(e, 1))
        raised = True
        while raised:
            at += 1
            neighbour, held = say(e, 2), []
            generation: lc.Generation | None
            if not fresh:
                submit(e, held)
            interrupt = Interrupt(at)
            try:
                with interrupt:
                    call(e, held)
            except KeyboardInterrupt:
                assert interrupt.raised
            raised = interrupt.raised
            assert told(neighbour) == expected, f"at line {at}"
            for generation in held:
                assert generation.wait(60), f"at line {at}"
                assert generation.finish_reason in ("length", "cancelled")
                given = [token.id for token in generation.tokens]
                assert given == alone[: len(given)]
            generation = None
            held.clear()
            while e._desk.works:  # one that was let go, and whose cancel was interrupted, goes on to its end
                say(e, 2).result(60)
            # The id is free, and so are the places.
            again = e.submit(ids(5, 1), max_tokens=N, sampler=endless(), request_id="it")
            assert told(again) == alone, f"at line {at}"
            assert not e._desk.works, f"at line {at}"
        assert at > 5, "the lines were not seen"
    assert not e._desk.names._first


def test_an_interrupt_at_any_line_of_close_leaves_an_engine_that_can_be_closed() -> None:
    at, raised = 0, True
    while raised:
        at += 1
        e = engine(slots=1)
        generation = say(e, 1)
        interrupt = Interrupt(at)
        try:
            with interrupt:
                e.close()
        except KeyboardInterrupt:
            pass
        raised = interrupt.raised
        e.close()
        assert e._thread.stopped
        assert generation.finish_reason == "length"
    assert at > 3


THREADS = ("llamacancel-engine", "llamacancel-embedder")


class Reader:
    """An application's object of a request: in a cycle, and cancels it when it goes."""

    def __init__(self, generation: lc.Generation) -> None:
        self.generation, self.me = generation, self

    def __del__(self) -> None:
        self.generation.cancel("collected")


@pytest.fixture(name="frozen")
def _frozen() -> Iterator[None]:
    """Collections are left to the test, and are short."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def test_a_collection_that_cancels_at_any_line_of_the_engines_threads_leaves_all_others_as_they_were(
    frozen: None,
) -> None:
    victims: deque[lc.Generation] = deque()
    seen: set[tuple[str, int]] = set()
    names: set[str] = set()

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(PACKAGE)
        return line if ours and threading.current_thread().name in THREADS else None

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and place not in seen and victims:
            seen.add(place)
            names.add(frame.f_code.co_name)
            with suppress(IndexError):  # the other thread had the last one
                Reader(victims.popleft())
            gc.collect(0)
        return line

    threading.settrace(call)
    try:
        e = engine(slots=3, queue_limit=2000, step_seconds=None)
        e.embed(ids(3)).result(60)  # begins the other thread
    finally:
        threading.settrace(None)  # type: ignore[arg-type]
    with e:
        expected = None
        kept: list[lc.Generation] = []
        for _ in range(40):
            before = len(seen)
            fresh = [e.submit(ids(40, seed), sampler=endless(), max_tokens=50) for seed in range(30)]
            kept += fresh
            victims.extend(fresh)
            del fresh
            neighbour = e.submit(ids(60, 99), max_tokens=8, sampler=endless(), priority=5)
            embedding = e.embed(ids(8), priority=5)
            given = told(neighbour)
            expected = expected or given
            assert given == expected
            assert embedding.result(60).shape
            victims.clear()
            for each in kept:
                each.cancel()
            for each in kept:
                assert each.wait(60)
                assert each.finish_reason in ("cancelled", "length")
            kept.clear()
            if len(seen) == before:
                break
        assert not e._desk.works
        assert not e.closed
    assert {"plan", "commit", "_tell", "_take_in", "_sample", "_admit", "finish"} <= names
    assert {"_main", "_run", "_fill", "_take"} <= names
    assert len(seen) > 200

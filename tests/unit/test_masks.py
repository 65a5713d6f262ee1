"""What constraints allow next is computed beside llama.cpp, each by itself."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.constraint import Matcher
from llamacancel.engine.masks import Masks
from tests.unit.engines import before_step, endless, engine, idle_slots, ids, model, together

LETTERS = r"[abc]{12}x"


@pytest.fixture(autouse=True)
def vocabulary() -> None:
    """Made before anything is counted."""
    lc.Sampler(regex="a", model=model("llama"))


def letters(seed: int = 1) -> lc.Sampler:
    return lc.Sampler(regex=LETTERS, seed=seed, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)


def during_fill(patch: pytest.MonkeyPatch, fn: Callable[[Matcher], object]) -> None:
    """Calls `fn` before each mask, on the thread that computes it."""
    fill = Matcher.fill

    def hooked(matcher: Matcher, address: int, size: int) -> None:
        fn(matcher)
        fill(matcher, address, size)

    patch.setattr(Matcher, "fill", hooked)


def test_the_engines_thread_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    during_fill(monkeypatch, lambda _: threads.add(threading.current_thread().name))
    with engine() as e:
        assert re.fullmatch(LETTERS, e.submit(ids(5), sampler=letters()).result().text)
    assert threads == {"llamacancel-masks"}


def test_a_mask_is_there_before_the_step_is_computed() -> None:
    with engine() as e:
        runner, seen = e._thread.runner, []
        compute = runner._compute

        def computed(context: Any, batch: Any, tokens: Any, **how: Any) -> Any:
            for request in e._thread.scheduler.active.values():
                if request.rows_left == 1:
                    request.owner.mask.wait()
                    seen.append(request.owner.sampler._lacks_mask)
            return compute(context, batch, tokens, **how)

        runner._compute = computed  # type: ignore[method-assign]
        assert re.fullmatch(LETTERS, e.submit(ids(5), sampler=letters()).result().text)
    assert seen
    assert not any(seen)


def test_the_rows_of_a_step_have_theirs_computed_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    others = threading.Barrier(3, timeout=20)
    rows, met = [], []

    def meet(_: Matcher) -> None:
        if rows[-1] == 3 and not met:
            others.wait()
            met.append(True)

    during_fill(monkeypatch, meet)
    with engine(slots=3) as e:
        before_step(e, lambda _, plan: rows.append(len(plan.rows)))
        generations = [e.submit(ids(5, seed), sampler=letters(seed)) for seed in range(3)]
        assert all(re.fullmatch(LETTERS, each.result().text) for each in generations)
    assert met


def test_masks_beside_a_step_choose_what_masks_behind_it_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[str]:
        with engine(slots=3) as e:
            generations = [e.submit(ids(5, seed), sampler=letters(seed)) for seed in range(6)]
            return [each.result().text for each in generations]

    beside = texts()
    monkeypatch.setattr("llamacancel.engine.runner.Runner._begin_masks", lambda self, planned: None)
    assert texts() == beside


def test_without_threads_masks_are_computed_behind_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with engine() as e:
        monkeypatch.setattr(threading.Thread, "start", no_more)
        generation = e.submit(ids(5), sampler=letters())
        assert re.fullmatch(LETTERS, generation.result().text)
        monkeypatch.undo()


def test_whoever_is_cancelled_waits_for_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is given up where it is, and the sampler is let go of when that ends."""
    computing, go_on, first = threading.Event(), threading.Event(), []

    def hold(matcher: Matcher) -> None:
        if not first:
            first.append(matcher)
            computing.set()
            assert go_on.wait(20)

    during_fill(monkeypatch, hold)
    with engine() as e:
        compute = e._thread.runner._compute

        def computed(*args: Any, **how: Any) -> Any:
            if not held._work.token.cancelled:
                assert computing.wait(20)
                held.cancel()
            return compute(*args, **how)

        e._thread.runner._compute = computed  # type: ignore[method-assign]
        with together(e):
            held = e.submit(ids(5), sampler=letters())
            neighbour = e.submit(ids(5, 1), sampler=endless(), max_tokens=30)
        assert len(neighbour.result().tokens) == 30
        assert held.finish_reason == "cancelled"
        assert not go_on.is_set()
        assert idle_slots(e) == 2
        go_on.set()
        assert re.fullmatch(LETTERS, e.submit(ids(5), sampler=letters()).result().text)


@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError(), KeyboardInterrupt()])
def test_what_a_mask_raises_ends_its_own_request(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    matchers: list[Matcher] = []

    def fail(matcher: Matcher) -> None:
        if not matchers:
            matchers.append(matcher)
        if matcher is matchers[0]:
            raise error

    during_fill(monkeypatch, fail)
    with engine() as e:
        with pytest.raises((type(error), lc.LlamaCancelError)):
            e.submit(ids(5), sampler=letters()).result()
        assert re.fullmatch(LETTERS, e.submit(ids(5), sampler=letters(2)).result().text)


def test_threads_are_made_for_those_that_are_computed_and_no_more() -> None:
    masks, sampler = Masks(2), lc.Sampler(regex="a", model=model("llama"))
    for _ in range(5):
        masks.begin(sampler, lc.CancelToken()).wait()
    assert len(masks._threads) == 1
    for mask in [masks.begin(lc.Sampler(regex="[ab]{50}", model=model("llama")), lc.CancelToken()) for _ in range(20)]:
        mask.wait()
    assert 1 <= len(masks._threads) <= 2
    masks.close()
    assert not masks._threads


EXIT = """
import threading, time
import llamacancel as lc
from llamacancel.constraint import Matcher
from llamacancel.commands.make_model import cached_model

begun = threading.Event()
fill = Matcher.fill

def slow(matcher, address, size):
    begun.set()
    for _ in range(400):
        fill(matcher, address, size)

Matcher.fill = slow
model = lc.Model.load(cached_model("llama", "tiny"))
engine = lc.Engine(model, slots=1, n_threads=1)
generation = engine.submit("Hello", sampler=lc.Sampler(json_schema={}, temperature=1.5, seed=1))
begun.wait()
print("leaving", flush=True)
"""


def test_an_exit_in_the_middle_of_a_mask_is_quiet() -> None:
    ran = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert ran.stdout == "leaving\n"
    assert not ran.stderr

"""CancelToken: what each method says, and that nothing leaks, hangs or crashes whatever the order."""

from __future__ import annotations

import copy
import enum
import gc
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

from llamacancel.cancel import CallbackHandle, CancelToken, Cause
from llamacancel.cancel.deadlines import Alarms
from llamacancel.errors import (
    DeadlineExceeded,
    DecodeCancelled,
    LlamaCancelError,
    LoadCancelled,
    LoadDeadlineExceeded,
    SequenceOutcome,
)

GENEROUS = 120.0  # seconds; a bound for what takes no time unless something is broken


class Unraisable:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def __call__(self, args: Any) -> None:
        self.errors.append(args.exc_value)


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unraisable]:
    hook = Unraisable()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", hook)
        yield hook
        gc.collect()


def run_python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(program), *args],
        capture_output=True,
        text=True,
        timeout=GENEROUS,
    )


def assert_silent(program: str, expect: str = "") -> None:
    done = run_python(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, expect, "")


# Causes


def test_cause_is_an_enum_of_four_strings() -> None:
    assert issubclass(Cause, enum.Enum)
    assert {cause.name: cause.value for cause in Cause} == {
        "CLIENT": "client",
        "DEADLINE": "deadline",
        "INTERRUPT": "interrupt",
        "SHUTDOWN": "shutdown",
    }


def test_a_cause_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(Cause.SHUTDOWN)) is Cause.SHUTDOWN


@pytest.mark.parametrize("kind", [DecodeCancelled, DeadlineExceeded, LoadCancelled, LoadDeadlineExceeded])
def test_a_cancel_is_told_as_it_is_across_processes(kind: type[DecodeCancelled]) -> None:
    outcome = SequenceOutcome("kept", 3, 9, True)
    error = kind(
        "it was enough", cause=Cause.DEADLINE, reason="why", latency=0.5, sequences={2: outcome}, survivors=[1],
        rows_done=6, repair_seconds=0.25,
    )  # fmt: skip
    for told in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(told) is kind
        assert str(told) == "it was enough"
        assert vars(told) == vars(error)


# Cancel


def test_a_new_token_is_live() -> None:
    token = CancelToken()
    assert token.cancelled is False
    assert token.cause is None
    assert token.reason is None
    assert token.cancelled_at is None
    assert token.deadline is None
    assert token.remaining() is None
    token.raise_if_cancelled()


def test_the_first_cancel_wins() -> None:
    token = CancelToken()
    before = time.monotonic()
    assert token.cancel("client hung up") is True
    after = time.monotonic()
    assert token.cancel("late", cause=Cause.SHUTDOWN) is False
    assert token.cancelled is True
    assert token.cause is Cause.CLIENT
    assert token.reason == "client hung up"
    assert token.cancelled_at is not None
    assert before - 1e-6 <= token.cancelled_at <= after + 1e-6


@pytest.mark.parametrize("cause", Cause)
def test_a_cancel_keeps_its_cause(cause: Cause) -> None:
    token = CancelToken()
    token.cancel(cause=cause)
    assert token.cause is cause
    assert token.reason == ""


@pytest.mark.parametrize("reason", ["", "ärger ✂", "a\0b", "\udc80", "x" * 10_000])
def test_a_reason_comes_back_as_it_was(reason: str) -> None:
    token = CancelToken()
    token.cancel(reason)
    assert token.reason == reason


@pytest.mark.parametrize("reason", [None, 3, b"bytes"])
def test_a_reason_that_is_no_string_is_refused(reason: Any) -> None:
    token = CancelToken()
    with pytest.raises(TypeError, match="reason"):
        token.cancel(reason)
    assert not token.cancelled


@pytest.mark.parametrize("cause", [None, "client", 1])
def test_a_cause_that_is_no_cause_is_refused(cause: Any) -> None:
    token = CancelToken()
    with pytest.raises(TypeError, match="cause"):
        token.cancel(cause=cause)
    assert not token.cancelled


def test_of_many_threads_one_is_first() -> None:
    token = CancelToken()
    barrier = threading.Barrier(8)
    firsts: list[int] = []

    def cancel(i: int) -> None:
        barrier.wait()
        if token.cancel(str(i)):
            firsts.append(i)

    threads = [threading.Thread(target=cancel, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(firsts) == 1
    assert token.reason == str(firsts[0])


# Children and any_of


def test_a_cancel_travels_down_with_its_cause_and_reason() -> None:
    root = CancelToken()
    leaf = root.child().child()
    root.cancel("shut", cause=Cause.SHUTDOWN)
    assert leaf.cancelled
    assert (leaf.cause, leaf.reason, leaf.cancelled_at) == (Cause.SHUTDOWN, "shut", root.cancelled_at)


def test_a_cancel_never_travels_up_or_across() -> None:
    root = CancelToken()
    left, right = root.child(), root.child()
    left.cancel()
    assert not root.cancelled
    assert not right.cancelled


def test_a_child_of_a_cancelled_token_is_born_cancelled() -> None:
    root = CancelToken()
    root.cancel("before")
    child = root.child(timeout=5)
    assert (child.cancelled, child.reason) == (True, "before")
    assert child.cancel("late") is False


def test_a_cancel_reaches_a_grandchild_whose_parent_is_gone() -> None:
    root = CancelToken()
    leaf = root.child().child()
    gc.collect()
    root.cancel("gone")
    assert leaf.reason == "gone"


def test_a_child_lives_on_when_its_parent_is_gone() -> None:
    leaf = CancelToken(timeout=3600).child()
    gc.collect()
    assert not leaf.cancelled
    assert leaf.deadline is not None
    assert leaf.cancel()


def test_any_of_is_cancelled_by_each_and_reaches_none() -> None:
    for i in range(3):
        tokens = [CancelToken() for _ in range(3)]
        either = CancelToken.any_of(*tokens)
        assert not either.cancelled
        tokens[i].cancel(str(i))
        assert either.reason == str(i)
        assert [token.cancelled for token in tokens] == [n == i for n in range(3)]
    lone = CancelToken()
    CancelToken.any_of(lone, lone).cancel()
    assert not lone.cancelled


def test_any_of_cancelled_tokens_takes_the_first_in_order() -> None:
    first, second, live = CancelToken(), CancelToken(), CancelToken()
    second.cancel("second")
    first.cancel("first")
    assert CancelToken.any_of(live, first, second).reason == "first"


def test_any_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        CancelToken.any_of()


@pytest.mark.parametrize("other", [None, 3, "token"])
def test_any_of_something_else_is_an_error(other: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(other).__name__}"):
        CancelToken.any_of(CancelToken(), other)


def test_a_chain_of_100_000_is_cancelled_and_freed_without_recursion() -> None:
    root = leaf = CancelToken()
    for _ in range(100_000):
        leaf = leaf.child()
    root.cancel("deep")
    assert leaf.reason == "deep"
    del root, leaf


# Deadlines


def test_a_timeout_becomes_a_deadline() -> None:
    before = time.monotonic()
    token = CancelToken(timeout=100)
    after = time.monotonic()
    assert token.deadline is not None
    assert before + 100 - 1e-6 <= token.deadline <= after + 100 + 1e-6
    remaining = token.remaining()
    assert remaining is not None
    assert 0 < remaining <= 100
    assert not token.cancelled


def test_a_deadline_is_a_monotonic_time() -> None:
    deadline = time.monotonic() + 100
    assert CancelToken(deadline=deadline).deadline == pytest.approx(deadline, abs=1e-6)


def test_of_timeout_and_deadline_the_earlier_counts() -> None:
    now = time.monotonic()
    assert CancelToken(timeout=1000, deadline=now + 100).deadline == pytest.approx(now + 100, abs=1e-6)
    later = CancelToken(timeout=100, deadline=now + 1000).deadline
    assert later is not None
    assert later < now + 500


def test_a_child_has_the_earlier_of_its_own_and_its_parents_deadline() -> None:
    now = time.monotonic()
    parent = CancelToken(deadline=now + 100)
    assert parent.child().deadline == parent.deadline
    assert parent.child(deadline=now + 1000).deadline == parent.deadline
    assert parent.child(deadline=now + 50).deadline == pytest.approx(now + 50, abs=1e-6)
    assert CancelToken.any_of(CancelToken(), parent.child(deadline=now + 50), parent).deadline == pytest.approx(
        now + 50, abs=1e-6
    )


@pytest.mark.parametrize("timeout", [0, -1, -0.0, -math.inf, -(10**400)])
def test_a_timeout_of_zero_or_less_has_passed(timeout: float) -> None:
    token = CancelToken(timeout=timeout)
    assert token.cancelled
    assert token.cause is Cause.DEADLINE
    assert token.reason == ""
    assert token.remaining() == 0.0
    assert token.cancelled_at == token.deadline


@pytest.mark.parametrize("deadline", [0, -5.0, -math.inf])
def test_a_deadline_in_the_past_has_passed(deadline: float) -> None:
    assert CancelToken(deadline=deadline).cause is Cause.DEADLINE
    assert CancelToken(deadline=time.monotonic()).cause is Cause.DEADLINE


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 1e10, 10**400])
def test_infinity_and_what_does_not_fit_is_no_deadline(seconds: float) -> None:
    assert CancelToken(timeout=seconds).deadline is None
    assert CancelToken(deadline=seconds).deadline is None


def test_seconds_may_be_any_real_number() -> None:
    assert CancelToken(timeout=Fraction(200, 2)).deadline is not None  # type: ignore[arg-type]
    assert CancelToken(timeout=100).deadline is not None


@pytest.mark.parametrize("name", ["timeout", "deadline"])
@pytest.mark.parametrize("make", [CancelToken, CancelToken().child])
def test_nan_and_no_numbers_are_refused_by_name(make: Callable[..., CancelToken], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be NaN"):
        make(**{name: math.nan})
    for wrong in ("1", b"1", 1j, [1], object()):
        with pytest.raises(TypeError, match=f"{name} must be a number of seconds or None, not "):
            make(**{name: wrong})


def test_a_cancel_after_the_deadline_is_late() -> None:
    token = CancelToken(timeout=0)
    assert token.cancel("late") is False
    assert token.cause is Cause.DEADLINE


# raise_if_cancelled


def test_raise_if_cancelled_says_why_and_since_when() -> None:
    token = CancelToken()
    token.cancel("client hung up", cause=Cause.INTERRUPT)
    with pytest.raises(DecodeCancelled, match="interrupt 'client hung up'") as caught:
        token.raise_if_cancelled()
    assert not isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, LlamaCancelError)
    assert (caught.value.cause, caught.value.reason) == (Cause.INTERRUPT, "client hung up")
    assert 0 <= caught.value.latency < GENEROUS


def test_raise_if_cancelled_raises_a_timeout_error_at_a_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match="deadline") as caught:
        CancelToken(timeout=0).raise_if_cancelled()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.cause is Cause.DEADLINE


# wait


def test_wait_returns_at_once_on_a_cancelled_token() -> None:
    token = CancelToken()
    token.cancel()
    assert token.wait() is True
    assert token.wait(0) is True


def test_wait_returns_false_when_its_time_is_up() -> None:
    token = CancelToken()
    assert token.wait(0) is False
    assert token.wait(-1) is False
    assert token.wait(0.07) is False


def test_wait_ends_with_the_cancel_of_a_parent() -> None:
    root = CancelToken()
    leaf = root.child()
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(leaf.wait()))
    waiting.start()
    root.cancel()
    waiting.join(GENEROUS)
    assert results == [True]


def test_wait_ends_with_the_deadline() -> None:
    assert CancelToken(timeout=0.07).wait() is True


def test_wait_does_not_hold_the_gil() -> None:
    token = CancelToken()
    threading.Thread(target=token.cancel).start()
    assert token.wait(GENEROUS) is True


def test_wait_refuses_nan_and_no_numbers() -> None:
    with pytest.raises(ValueError, match="timeout"):
        CancelToken().wait(math.nan)
    with pytest.raises(TypeError, match="timeout"):
        CancelToken().wait("1")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself SIGINT")
def test_ctrl_c_ends_a_wait_on_the_main_thread() -> None:
    # A process in the background may have been told to ignore SIGINT.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        CancelToken().wait(GENEROUS)
        pytest.fail("not interrupted")
    except KeyboardInterrupt:
        timer.join()
    finally:
        signal.signal(signal.SIGINT, previous)


# Callbacks


def test_callbacks_run_once_in_order_on_the_cancelling_thread() -> None:
    token = CancelToken()
    calls: list[tuple[int, int]] = []
    for i in range(5):
        token.add_callback(lambda i=i: calls.append((i, threading.get_ident())))  # type: ignore[misc]
    canceller = threading.Thread(target=token.cancel)
    canceller.start()
    canceller.join()
    token.cancel()
    assert calls == [(i, canceller.ident) for i in range(5)]


def test_callbacks_have_run_when_cancel_returns() -> None:
    root = CancelToken()
    tokens = [root, root.child(), root.child().child(), CancelToken.any_of(root, CancelToken())]
    calls: list[int] = []
    for i, token in enumerate(tokens):
        token.add_callback(lambda i=i: calls.append(i))  # type: ignore[misc]
    root.cancel()
    assert sorted(calls) == [0, 1, 2, 3]


def test_a_callback_sees_every_descendant_cancelled() -> None:
    root = CancelToken()
    leaves = [root.child().child() for _ in range(10)]
    seen: list[bool] = []
    root.add_callback(lambda: seen.extend(leaf.cancelled for leaf in leaves))
    root.cancel()
    assert seen == [True] * 10


def test_a_callback_on_a_cancelled_token_runs_at_once() -> None:
    for token in (CancelToken(), CancelToken(timeout=0)):
        token.cancel()
        calls: list[int] = []
        handle = token.add_callback(lambda calls=calls: calls.append(threading.get_ident()))  # type: ignore[misc]
        assert calls == [threading.get_ident()]
        assert handle.done
        assert not handle.remove()


def test_a_removed_callback_does_not_run() -> None:
    token = CancelToken()
    calls: list[str] = []
    removed = token.add_callback(lambda: calls.append("removed"))
    kept = token.add_callback(lambda: calls.append("kept"))
    assert not removed.done
    assert removed.remove() is True
    assert removed.remove() is False
    assert removed.done
    token.cancel()
    assert calls == ["kept"]
    assert kept.done
    assert kept.remove() is False


def test_a_callback_may_remove_a_later_one() -> None:
    token = CancelToken()
    calls: list[str] = []
    handles: list[CallbackHandle] = []
    token.add_callback(lambda: calls.append(f"removed: {handles[0].remove()}"))
    handles.append(token.add_callback(lambda: calls.append("never")))
    token.cancel()
    assert calls == ["removed: True"]


def test_a_callback_may_cancel_derive_and_add_callbacks() -> None:
    token, other = CancelToken(), CancelToken()
    calls: list[object] = []

    def callback() -> None:
        calls.append(token.cancel())
        calls.append(token.child().cancelled)
        token.add_callback(lambda: calls.append("nested"))
        other.cancel("by callback")

    other.add_callback(lambda: calls.append("other"))
    token.add_callback(callback)
    token.add_callback(lambda: calls.append("after"))
    token.cancel()
    assert calls == [False, True, "nested", "other", "after"]


def test_the_same_function_may_be_added_twice() -> None:
    token = CancelToken()
    calls: list[int] = []

    def callback() -> None:
        calls.append(1)

    first = token.add_callback(callback)
    token.add_callback(callback)
    first.remove()
    token.cancel()
    assert calls == [1]


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
def test_what_a_callback_raises_is_reported_and_stops_nothing(error: BaseException, unraisable: Unraisable) -> None:
    def fail() -> None:
        raise error

    root = CancelToken()
    child = root.child()
    calls: list[str] = []
    root.add_callback(fail)
    root.add_callback(lambda: calls.append("root"))
    child.add_callback(fail)
    child.add_callback(lambda: calls.append("child"))
    assert root.cancel("why") is True
    assert calls == ["root", "child"]
    root.add_callback(fail)
    assert unraisable.errors == [error, error, error]
    unraisable.errors.clear()
    error.__traceback__ = None


def test_an_interrupt_in_a_callback_reaches_the_main_thread() -> None:
    calls: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    token = CancelToken()
    token.add_callback(interrupted)
    token.add_callback(lambda: calls.append("after"))

    def cancel() -> None:
        token.cancel()
        for _ in range(1_000_000):  # until the interpreter looks for signals
            pass

    with pytest.raises(KeyboardInterrupt):
        cancel()
    assert token.cancelled
    assert calls in ([], ["after"]), "it may come before the next callback ends"


def test_a_callback_must_be_callable() -> None:
    with pytest.raises(TypeError, match="fn must be callable, not int"):
        CancelToken().add_callback(3)  # type: ignore[arg-type]


def test_callbacks_run_exactly_once_or_are_removed_whoever_races() -> None:
    for _ in range(200):
        root = CancelToken()
        token = root.child()
        barrier = threading.Barrier(4)
        runs: list[int] = []
        removed: list[bool] = []
        handle = token.add_callback(lambda runs=runs: runs.append(0))  # type: ignore[misc]

        def adds(token: CancelToken = token, barrier: threading.Barrier = barrier, runs: list[int] = runs) -> None:
            barrier.wait()
            for i in range(1, 6):
                token.add_callback(lambda: runs.append(i))  # noqa: B023

        def removes(
            barrier: threading.Barrier = barrier, handle: CallbackHandle = handle, removed: list[bool] = removed
        ) -> None:
            barrier.wait()
            removed.append(handle.remove())

        def cancels(token: CancelToken, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            token.cancel()

        threads = [threading.Thread(target=target) for target in (adds, removes)]
        threads += [threading.Thread(target=cancels, args=(each,)) for each in (root, token)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runs.count(0) + removed.count(True) == 1
        assert len(runs) - runs.count(0) == 5


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def with_more_and_more_time(attempt: Callable[[float], bool]) -> None:
    """Calls `attempt` with longer and longer timeouts until it says that a deadline was not too early for it."""
    timeout = 0.02
    while not attempt(timeout):
        timeout *= 4
        assert timeout < GENEROUS, "it is always too early"


def test_at_a_deadline_callbacks_run_on_a_daemon_thread() -> None:
    def attempt(timeout: float) -> bool:
        threads: list[threading.Thread] = []
        parent = CancelToken(timeout=2 * timeout)
        tokens = [parent, parent.child(), CancelToken(timeout=timeout), CancelToken(timeout=3 * timeout)]
        for token in tokens:
            token.add_callback(lambda: threads.append(threading.current_thread()))
        wait_for(lambda: len(threads) == 4)
        assert all(token.cause is Cause.DEADLINE for token in tokens)
        if threading.main_thread() in threads:  # the deadline had passed when the callback was added
            return False
        assert {thread.name for thread in threads} == {"llamacancel-deadlines"}
        assert all(thread.daemon for thread in threads)
        return True

    with_more_and_more_time(attempt)


def test_a_callback_that_fails_at_a_deadline_is_reported_and_the_thread_goes_on(unraisable: Unraisable) -> None:
    done = threading.Event()

    def fail() -> None:
        raise SystemExit

    first, second = CancelToken(timeout=0.01), CancelToken(timeout=0.03)
    first.add_callback(fail)
    second.add_callback(done.set)
    assert done.wait(GENEROUS)
    assert [type(error) for error in unraisable.errors] == [SystemExit]


def test_a_cancel_before_the_deadline_runs_callbacks_once() -> None:
    def attempt(timeout: float) -> bool:
        calls: list[int] = []
        token = CancelToken(timeout=timeout)
        token.add_callback(lambda: calls.append(threading.get_ident()))
        if not token.cancel():
            return False
        assert token.deadline is not None
        time.sleep(max(0.0, token.deadline - time.monotonic()) + 0.05)
        assert calls == [threading.get_ident()]
        return True

    with_more_and_more_time(attempt)


def test_a_deadline_that_nobody_listens_to_starts_no_thread() -> None:
    assert_silent(
        """
        import threading, time
        from llamacancel.cancel import CancelToken
        CancelToken().add_callback(print)
        token = CancelToken(timeout=0.01)
        time.sleep(0.03)
        token.add_callback(lambda: None)
        assert threading.active_count() == 1, threading.enumerate()
        CancelToken(timeout=100).add_callback(print)
        assert [t.name for t in threading.enumerate()] == ["MainThread", "llamacancel-deadlines"]
        """
    )


class Item:
    pass


def test_callbacks_that_block_hold_up_no_other_deadline() -> None:
    release, others = threading.Event(), [threading.Event() for _ in range(3)]
    tokens = []
    try:
        for other in others:
            for call in (lambda: release.wait(60), other.set):
                token = CancelToken(timeout=0.001)
                token.add_callback(call)
                tokens.append(token)
            assert other.wait(30)
    finally:
        release.set()


def eventually(so: Callable[[], bool]) -> None:
    """Waits until it is so."""
    until = time.monotonic() + 30
    while not so():
        assert time.monotonic() < until, "it never was so"
        time.sleep(0.001)


def test_alarms_forget_items_that_die() -> None:
    alarms: Alarms[Item] = Alarms(lambda item: pytest.fail("rung too early"))
    later = time.monotonic_ns() + 3600 * 10**9
    for _ in range(10_000):
        alarms.add(Item(), later)
    eventually(lambda: alarms._box.empty() and len(alarms._heap) <= 65)
    living = [Item() for _ in range(1000)]
    for item in living:
        alarms.add(item, later)
    eventually(lambda: sum(entry[2]() is not None for entry in tuple(alarms._heap)) == 1000)


def test_alarms_ring_in_order_and_again_if_it_was_too_early() -> None:
    rung: list[Item] = []
    tries: list[Item] = []

    def ring(item: Item) -> bool:
        tries.append(item)
        if tries.count(item) < 3:
            return False
        rung.append(item)
        return True

    def attempt(timeout: float) -> bool:
        rung.clear()
        tries.clear()
        alarms: Alarms[Item] = Alarms(ring)
        items = [Item(), Item()]
        now = time.monotonic_ns()
        alarms.add(items[1], now + int(10 * timeout * 1e9))
        alarms.add(items[0], now + int(timeout * 1e9))
        in_time = time.monotonic_ns() < now + int(5 * timeout * 1e9)
        wait_for(lambda: len(rung) == 2)
        assert len(tries) == 6
        assert not in_time or rung == items
        return in_time

    with_more_and_more_time(attempt)


# Memory


def test_tokens_can_be_referred_to_weakly() -> None:
    token = CancelToken()
    reference = weakref.ref(token)
    assert reference() is token
    del token
    assert reference() is None


class Function:
    def __call__(self) -> None:
        pass


def test_a_callback_is_released_when_it_has_run() -> None:
    token, fn = CancelToken(), Function()
    reference = weakref.ref(fn)
    handle = token.add_callback(fn)
    del fn
    assert reference() is not None
    token.cancel()
    assert reference() is None
    assert handle.done


def test_a_callback_is_released_when_it_is_removed() -> None:
    token, fn = CancelToken(), Function()
    reference = weakref.ref(fn)
    handle = token.add_callback(fn)
    del fn
    handle.remove()
    assert reference() is None


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_callback_is_released_when_its_token_dies_uncancelled(timeout: float | None) -> None:
    token, fn = CancelToken(timeout=timeout), Function()
    root = CancelToken()
    child = CancelToken.any_of(token, root)
    reference = weakref.ref(fn)
    token.add_callback(fn)
    del fn, token
    assert reference() is None
    assert not child.cancelled
    root.cancel()
    assert child.cancelled


def test_a_handle_keeps_its_token() -> None:
    calls: list[int] = []
    root = CancelToken()
    handle = root.child().add_callback(lambda: calls.append(1))
    root.cancel()
    assert calls == [1]
    assert handle.done


def test_callbacks_of_a_token_that_is_gone_never_run() -> None:
    calls: list[int] = []
    root = CancelToken()
    middle = root.child()
    leaf = middle.child()
    middle.add_callback(lambda: calls.append(1))
    del middle
    root.cancel()
    assert leaf.cancelled
    assert calls == []


@pytest.mark.parametrize("kind", ["token", "handle"])
def test_a_cycle_through_a_callback_is_collected(kind: str) -> None:
    token = CancelToken(timeout=3600)
    holder: dict[str, object] = {}

    class Cycle(Function):
        held = holder

    fn = Cycle()
    handle = token.add_callback(fn)
    holder["it"] = token if kind == "token" else handle
    holder["fn"] = fn
    references: list[weakref.ref[Any]] = [weakref.ref(token), weakref.ref(fn)]
    del token, fn, handle, holder, Cycle
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_nothing_is_left_after_many_lives() -> None:
    def live() -> None:
        root = CancelToken()
        for i in range(20):
            child = root.child(timeout=3600 if i % 2 else None)
            child.add_callback(child.cancel)
            handle = CancelToken.any_of(root, child).add_callback(Function())
            if i % 3 == 0:
                handle.remove()
            if i % 4 == 0:
                child.cancel("a reason")
        root.cancel()

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, (CancelToken, CallbackHandle, Function)) for each in gc.get_objects())

    live()
    before = count()
    for _ in range(100):
        live()
    assert count() == before


def test_tokens_may_die_while_others_cancel_them() -> None:
    stop = threading.Event()
    calls: list[int] = []
    slots: list[CancelToken] = [CancelToken() for _ in range(8)]

    def churn(seed: int) -> None:
        i = seed
        while not stop.is_set():
            i = (i * 1103515245 + 12345) % 2**31
            here, there = slots[(i >> 8) % 8], slots[(i >> 12) % 8]
            what = (i >> 16) % 8
            if what < 3:
                slots[(i >> 20) % 8] = CancelToken.any_of(here, there)
            elif what == 3:
                slots[(i >> 20) % 8] = CancelToken(timeout=0.002)
            elif what == 4:
                slots[(i >> 20) % 8] = CancelToken()
            elif what == 5:
                here.cancel("churn")
            elif what == 6:
                here.add_callback(lambda: calls.append(1))
            else:
                there.wait(0.0005)
                assert here.cancelled == (here.reason is not None) or not here.wait(0) or here.cancelled

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join(GENEROUS)
        assert not thread.is_alive()


# Habits


def test_the_repr_states_the_life() -> None:
    token = CancelToken()
    assert repr(token) == "<CancelToken live>"
    token.cancel("client hung up")
    assert repr(token) == "<CancelToken cancelled: client 'client hung up'>"
    assert repr(CancelToken(timeout=0)) == "<CancelToken cancelled: deadline>"
    told = re.fullmatch(r"<CancelToken live, (\d+\.\d) s left>", repr(CancelToken(timeout=1000)))
    assert told
    assert 1000 - GENEROUS < float(told[1]) <= 1000


def test_the_repr_of_a_handle_states_its_life() -> None:
    token = CancelToken()
    handle = token.add_callback(print)
    assert repr(handle) == "<CallbackHandle pending of <CancelToken live>>"
    handle.remove()
    assert repr(handle) == "<CallbackHandle done of <CancelToken live>>"


@pytest.mark.parametrize("make", [CancelToken, lambda: CancelToken().add_callback(print)])
@pytest.mark.parametrize("dump", [pickle.dumps, copy.copy, copy.deepcopy])
def test_tokens_and_handles_cannot_be_pickled_or_copied(dump: Callable[[Any], Any], make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        dump(make())


def test_a_token_cannot_be_subclassed() -> None:
    with pytest.raises(TypeError, match="CancelToken"):
        type("Sub", (CancelToken,), {})


def test_everything_public_has_a_docstring() -> None:
    for cls in (CancelToken, CallbackHandle, Cause):
        assert cls.__doc__
        for name, member in vars(cls).items():
            if not name.startswith("_") and not isinstance(member, Cause):
                assert getattr(cls, name).__doc__, f"{cls.__name__}.{name}"


# Fork and exit

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@needs_fork
def test_tokens_and_deadline_callbacks_work_in_a_forked_child() -> None:
    assert_silent(
        """
        import os, threading, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
        from llamacancel.cancel import CancelToken
        calls = []
        root = CancelToken()
        child = root.child()
        child.add_callback(lambda: calls.append("root"))
        early = CancelToken(timeout=0.3)
        early.add_callback(lambda: calls.append("early"))
        waiter = threading.Thread(target=root.child().wait, daemon=True)
        waiter.start()
        time.sleep(0.05)
        pid = os.fork()
        if pid == 0:
            assert threading.active_count() == 1
            done = threading.Event()
            late = CancelToken(timeout=0.01)
            late.add_callback(done.set)
            assert done.wait(20)
            root.cancel("in the child")
            assert child.reason == "in the child" and "root" in calls
            while "early" not in calls:
                time.sleep(0.01)
            raise SystemExit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert not root.cancelled and "root" not in calls
        while "early" not in calls:
            time.sleep(0.01)
        """
    )


@needs_fork
def test_a_cancel_in_a_forked_child_stays_there() -> None:
    assert_silent(
        """
        import os
        from llamacancel.cancel import CancelToken
        token = CancelToken()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if token.cancel() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert not token.cancelled
        """
    )


def test_the_interpreter_exits_with_threads_waiting_and_callbacks_pending() -> None:
    assert_silent(
        """
        import threading, time
        from llamacancel.cancel import CancelToken
        keep = []
        root = CancelToken()
        for i in range(50):
            token = root.child(timeout=(None, 3600, 0.05)[i % 3])
            token.add_callback(lambda: time.sleep(0.001))
            token.add_callback(token.cancel)
            keep.append(token)
        for token in keep[:4]:
            threading.Thread(target=token.wait, daemon=True).start()
        time.sleep(0.06)
        print("end")
        """,
        "end\n",
    )


def test_the_interpreter_exits_while_daemon_threads_cancel_and_call_back() -> None:
    program = """
        import threading, time
        from llamacancel.cancel import CancelToken
        def churn():
            while True:
                root = CancelToken(timeout=0.001)
                for i in range(20):
                    root.child().add_callback(lambda: None)
                    child = root.child()
                    child.add_callback(lambda: sum(range(100)))
                root.cancel()
        for _ in range(4):
            threading.Thread(target=churn, daemon=True).start()
        time.sleep(0.1)
        """
    for _ in range(3):
        assert_silent(program)


def test_a_token_cancelled_from_a_destructor_at_exit_is_safe() -> None:
    assert_silent(
        """
        from llamacancel.cancel import CancelToken
        class Owner:
            def __init__(self):
                self.token = CancelToken()
                self.child = self.token.child()
                self.child.add_callback(lambda: None)
            def __del__(self):
                self.token.cancel("bye")
        owner = Owner()
        """
    )


def test_a_token_cancelled_from_a_destructor_in_a_cycle_is_safe() -> None:
    assert_silent(
        """
        import gc
        from llamacancel.cancel import CancelToken
        class Owner:
            def __init__(self):
                self.token = CancelToken()
                self.child = self.token.child()
                self.handle = self.child.add_callback(self.told)
            def told(self):
                assert self.child.cancelled
            def __del__(self):
                assert self.token.cancel("bye")
                assert self.child.cancelled
                self.handle.remove()
        for _ in range(100):
            Owner()
        gc.collect()
        """
    )

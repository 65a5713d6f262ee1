"""Law 9, habit: Ctrl-C, `with`, threads and asyncio behave as Python people expect."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import CONTEXT, load

from .clock import Clock, deadline_at
from .words import (
    ModelPath,
    NewContext,
    Pair,
    batch,
    cancelled,
    dead,
    decode,
    far,
    holds,
    one_more,
    run_python,
    same_bits,
    threads,
    tokens,
)

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")

_BEGIN = """
import os, signal, sys, threading, time
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *

rows = batch((tokens(100, 1), 30, 0), logits="last")

def pair(arch):
    model = load(cached_model(arch, "tiny"))
    contexts = [model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT) for _ in range(2)]
    for context in contexts:
        context.decode(batch((tokens(30), 0, 0)))
    model.close()  # the contexts live on
    return contexts

def on_main(number):
    signal.pthread_kill(threading.main_thread().ident, number)

def signalled(number=signal.SIGINT, at=40):
    # The clock jumps a second, so that it is time to look for signals.
    return in_the_middle(lambda: on_main(number), at=at, jump_at=at, by=1)

def check(context, twin):
    assert holds(context) == holds(twin)
    more = batch((tokens(9, 3), holds(twin)[0][1] + 1, 0))
    assert same_bits(decode(context, more), decode(twin, more))
    context.close(); twin.close()
"""
_END = """
print("well")
"""


def _well(program: str) -> None:
    Clock()  # skips the test where there is none
    ran = run_python(_BEGIN + textwrap.dedent(program) + _END)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "well\n", "")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------


@needs_posix
def test_ctrl_c_stops_a_decode_on_the_main_thread_and_leaves_the_context_usable() -> None:
    _well(f"""
        for arch in {GENERATIVE}:
            context, twin = pair(arch)
            for token in (None, lc.CancelToken(), far(), {{0: lc.CancelToken()}}):
                try:
                    with signalled():
                        context.decode(rows, token)
                    raise SystemExit("the decode ran to its end")
                except KeyboardInterrupt as error:
                    cause = error.__cause__
                assert type(cause) is lc.DecodeCancelled and cause.cause is lc.Cause.INTERRUPT, cause
                assert (cause.sequences[0].state, cause.sequences[0].end) == ("rolled_back", 30)
                assert cause.latency >= 0
                assert not isinstance(token, lc.CancelToken) or not token.cancelled, "the token is the caller's"
                assert holds(context) == holds(twin)
            check(context, twin)
    """)


@needs_posix
def test_ctrl_c_keeps_what_was_done_if_asked_to() -> None:
    _well(f"""
        for arch in {GENERATIVE}:
            context, twin = pair(arch)
            readings = readings_of(lambda: twin.decode(rows))
            try:
                with signalled(at=readings // 2):
                    context.decode(rows, on_cancel="keep")
                raise SystemExit("the decode ran to its end")
            except KeyboardInterrupt as error:
                end = error.__cause__.sequences[0].end
            assert 30 < end < 130 and holds(context)[0][1] == end - 1
            context.decode(batch((tokens(100, 1)[end - 30:], end, 0), logits="last"))
            assert same_bits(context.logits(-1), twin.logits(-1))
            check(context, twin)
    """)


@needs_posix
def test_ctrl_c_that_comes_as_a_call_begins_is_not_left_to_its_end() -> None:
    _well("""
        import ctypes
        from functools import partial
        press = ctypes.pythonapi.PyErr_SetInterruptEx  # as the signal would; no handler runs while no Python runs
        press.argtypes = [ctypes.c_int, ctypes.py_object]
        class Tokens(dict):
            items = partial(filter, partial(press, signal.SIGINT), [None])  # pressed as the call reads its tokens
        context, twin = pair("llama")
        try:
            context.decode(rows, Tokens())
            raise SystemExit("the decode ran to its end")
        except KeyboardInterrupt:
            assert holds(context) == holds(twin), "it was computed first"
        check(context, twin)
    """)


@needs_posix
def test_ctrl_c_while_the_main_thread_waits_does_not_reach_a_worker() -> None:
    _well("""
        context, twin = pair("llama")
        token = lc.CancelToken()
        expected = decode(twin, rows)
        for wait in (lambda: flight.thread.join(), token.wait, lambda: token.wait(600), lambda: time.sleep(600)):
            flight = Flight(lambda: decode(context, rows, far()))
            def press():
                time.sleep(0.05)  # by now it should wait
                on_main(signal.SIGINT)
            presser = threading.Thread(target=press)
            try:
                presser.start()
                wait()
                raise SystemExit("no KeyboardInterrupt")
            except KeyboardInterrupt:
                pass
            presser.join()
            assert flight.told is None and flight.clock.stopped
            flight.clock.go_on()
            wait_for(lambda: flight.told is not None)  # an interrupted join() may take the thread for ended
            assert same_bits(flight.told, expected) and not token.cancelled
            context.memory.clear()
            context.decode(batch((tokens(30), 0, 0)))
        decode(context, rows)
        check(context, twin)
    """)


@needs_posix
def test_ctrl_c_stops_a_load_and_the_wait_for_a_busy_context() -> None:
    _well("""
        context, twin = pair("llama")
        with Flight(lambda: context.decode(rows, far())):
            try:
                threading.Timer(0.05, on_main, (signal.SIGINT,)).start()
                context.decode(batch(([5], 130, 0)), lc.CancelToken())
                raise SystemExit("not interrupted")
            except KeyboardInterrupt:
                pass
        twin.decode(rows)
        shares = []
        def progress(share):
            shares.append(share)
            signal.raise_signal(signal.SIGINT)
        try:
            load(cached_model("llama", "tiny"), progress=progress)
            raise SystemExit("not interrupted")
        except KeyboardInterrupt:
            pass
        assert len(shares) < 5
        check(context, twin)
    """)


@needs_posix
def test_ctrl_c_stops_the_making_of_a_context() -> None:
    _well("""
        model = load(cached_model("llama", "tiny"))
        large = dict(n_ctx=1 << 17, n_ubatch=32, n_threads=1, **CONTEXT)
        for params, at in ((dict(n_ctx=64), 4), (large, 40)):  # in its measuring, and in the clearing of its memory
            try:
                with signalled(at=at):
                    model.context(**params)
                raise SystemExit("not interrupted")
            except KeyboardInterrupt:
                pass
        with model.context(**large) as context:
            decode(context, rows)
        model.close()
    """)


# ---- other signals ---------------------------------------------------------------------------------------------


@needs_posix
def test_a_handler_of_ones_own_runs_in_the_middle_of_a_decode() -> None:
    _well("""
        for arch in ("llama", "hybrid"):
            context, twin = pair(arch)
            seen = []
            def handler(number, frame):
                try:
                    context.memory.pos_max(0)
                except lc.ContextBusyError:
                    seen.append(number)
            signal.signal(signal.SIGUSR1, handler)
            with signalled(signal.SIGUSR1):
                assert context.decode(rows).rows_done == 100
            assert seen == [signal.SIGUSR1], "the handler ran after the call"
            twin.decode(rows)
            check(context, twin)
    """)


@needs_posix
def test_what_a_handler_raises_comes_out_of_the_decode() -> None:
    _well("""
        class Hangup(Exception): pass
        context, twin = pair("llama")
        for kind, number in ((Hangup, signal.SIGUSR1), (TimeoutError, signal.SIGALRM)):
            def handler(number, frame):
                raise kind("rang")
            signal.signal(number, handler)
            try:
                with signalled(number):
                    context.decode(rows, lc.CancelToken())
                raise SystemExit("nothing was raised")
            except kind as error:
                assert error.args == ("rang",) and error.__cause__.cause is lc.Cause.INTERRUPT
            assert holds(context) == holds(twin)
        check(context, twin)
    """)


@needs_posix
def test_a_handler_may_cancel_the_token_of_the_decode() -> None:
    _well("""
        context, twin = pair("llama")
        token = lc.CancelToken()
        signal.signal(signal.SIGTERM, lambda number, frame: token.cancel("terminated", cause=lc.Cause.SHUTDOWN))
        with signalled(signal.SIGTERM):
            error = cancelled(context, rows, token)
        assert (error.cause, error.reason) == (lc.Cause.SHUTDOWN, "terminated")
        check(context, twin)
    """)


@needs_posix
def test_a_handler_that_tokenizes_leaves_the_outer_call_its_token() -> None:
    _well("""
        model = load(cached_model("llama", "tiny"))
        token = lc.CancelToken()
        def handler(number, frame):
            assert len(model.tokenize("word")) > 0
            lc.Sampler(grammar='root ::= "a"', model=model)
            token.cancel("enough")
        signal.signal(signal.SIGUSR1, handler)
        with signalled(signal.SIGUSR1, at=10) as clock:
            try:
                model.tokenize("some words " * 20_000, token=token)
                raise SystemExit("it went on to its end")
            except lc.DecodeCancelled as error:
                assert error.reason == "enough"
                assert clock.readings > 10, "the handler ran before the call"
        model.close()
    """)


@needs_posix
def test_a_handler_that_decodes_leaves_the_outer_call_its_quiet_log() -> None:
    _well("""
        import logging
        told = []
        class Ear(logging.Handler):
            def emit(self, record):
                told.append((record.levelno, record.getMessage()))
        logging.getLogger("llamacancel.llama").addHandler(Ear())
        logging.getLogger("llamacancel.llama").setLevel(logging.DEBUG)
        context, twin = pair("llama")
        told.clear()
        token = lc.CancelToken()
        def handler(number, frame):
            twin.decode(batch(([7], 30, 0)))
            token.cancel("enough")
        signal.signal(signal.SIGUSR1, handler)
        with signalled(signal.SIGUSR1):
            cancelled(context, rows, token)
        assert holds(twin)[0][1] == 30, "the handler did not run"
        assert any("failed to" in text for _, text in told), "it was not stopped inside of a graph"
        assert not [text for level, text in told if level >= logging.ERROR]
        context.close(); twin.close()
    """)


@needs_posix
def test_a_storm_of_signals_does_no_harm() -> None:
    _well(f"""
        for arch in {GENERATIVE}:
            context, twin = pair(arch)
            busy = []
            def handler(number, frame):
                try:
                    context.memory.pos_max(0)
                except lc.ContextBusyError:
                    busy.append(number)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            end = 30
            while len(busy) < 20:
                step = batch((tokens(100, end), end, 0), logits="last")
                with Clock(step=0.1):  # so that it is always time to look for signals
                    assert context.decode(step, lc.CancelToken()).rows_done == 100
                twin.decode(step)
                end += 100
                if end > 900:
                    context.memory.clear(); twin.memory.clear()
                    end = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            context.decode(batch(([7], end, 0)))
            twin.decode(batch(([7], end, 0)))
            check(context, twin)
    """)


def test_importing_the_library_prints_nothing_and_leaves_signals_alone() -> None:
    ran = run_python("""
import signal
before = [signal.getsignal(number) for number in signal.valid_signals()]
import llamacancel
assert before == [signal.getsignal(number) for number in signal.valid_signals()]
""")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


# ---- with, threads, asyncio ------------------------------------------------------------------------------------


def test_a_with_block_closes_also_after_a_cancel(model_path: ModelPath) -> None:
    with (
        pytest.raises(lc.DecodeCancelled),
        load(model_path("llama")) as model,
        model.context(n_ctx=256, n_threads=1, **CONTEXT) as context,
    ):
        context.decode(batch((tokens(8), 0, 0)), dead())
    assert model.closed
    assert context.closed


@pytest.mark.parametrize("arch", GENERATIVE)
def test_contexts_of_one_model_work_in_several_threads_at_once(arch: str, new_context: NewContext) -> None:
    contexts = [new_context(arch, n_ubatch=8) for _ in range(4)]
    rows = [batch((tokens(60, seed), 0, 0), logits="last") for seed in range(4)]
    expected = [decode(new_context(arch, n_ubatch=8), each) for each in rows]
    results: dict[int, object] = {}

    def use(i: int) -> None:
        for _ in range(3):
            contexts[i].memory.clear()
            if i % 2:
                token = far()
                with deadline_at(100):
                    assert cancelled(contexts[i], rows[i], token) is not None
            results[i] = decode(contexts[i], rows[i])

    with threads(*(lambda i=i: use(i) for i in range(4))):
        pass
    assert all(same_bits(results[i], expected[i]) for i in range(4))


async def _decode(context: lc.Context, rows: lc.Batch, clock: Clock) -> lc.DecodeResult:
    """A decode in a thread, stopped in its middle until its task is cancelled, and awaited to its end."""
    token = far()
    token.add_callback(clock.go_on)

    def call() -> lc.DecodeResult:
        with clock:
            return context.decode(rows, token)

    work = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        token.cancel("the task was cancelled")
        await asyncio.wait([work])
        assert isinstance(work.exception(), lc.DecodeCancelled)
        raise


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancelled_task_and_one_that_timed_out_return_when_the_context_is_free(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(60, 1), 30, 0), logits="last")
    for each in (context, twin):
        decode(each, batch((tokens(30), 0, 0)))
    before = holds(context)

    async def main() -> None:
        for at in (1, 40, 200):
            clock = Clock(stop_at=at)
            task = asyncio.create_task(_decode(context, rows, clock))
            await _until(lambda clock=clock: clock.stopped)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert holds(context) == before
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_decode(context, rows, Clock(stop_at=at)), 0.02)
            assert holds(context) == before
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(context.decode, rows, lc.CancelToken(timeout=0))

    asyncio.run(main())
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))

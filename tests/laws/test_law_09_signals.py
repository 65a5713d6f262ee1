"""Law 9, habit: signals of every kind in the middle of a decode, and asyncio's own ways to cancel."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, decode, holds, one_more, run_python, same_bits, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")

_BEGIN = """
import os, signal, sys, threading, time
import llamacancel as lc
from tests.laws.words import batch, decode, holds, same_bits, tokens

model = lc.Model.load(sys.argv[1])
context, twin = (model.context(n_ctx=4096, n_batch=4096, n_ubatch=1, n_threads=1) for _ in range(2))
for each in (context, twin):
    each.decode(batch((tokens(30), 0, 0), logits="none"))
rows = batch((tokens(4000, 1), 30, 0), logits="none")

def when_busy(number):
    def run():
        time.sleep(0.2)  # not asked of the context: to ask is to use it for a moment
        os.kill(os.getpid(), number)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread

def check(end):
    assert context.memory.pos_max(0) == twin.memory.pos_max(0) == end - 1
    more = batch((tokens(9, 3), end, 0))
    assert same_bits(decode(context, more), decode(twin, more))
"""
_END = """
context.close(); twin.close(); model.close()
print("well")
"""


def _well(path: Path, program: str) -> None:
    ran = run_python(_BEGIN + textwrap.dedent(program) + _END, args=[str(path)])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "well\n", "")


@needs_posix
@pytest.mark.parametrize("arch", GENERATIVE)
def test_ctrl_c_stops_decodes_with_and_without_tokens_and_cancels_none_of_them(arch: str, model_path: ModelPath) -> None:
    _well(model_path(arch), """
        for token in (None, lc.CancelToken(), {0: lc.CancelToken()}):
            thread = when_busy(signal.SIGINT)
            try:
                context.decode(rows, token)
                raise SystemExit("the decode ran to its end")
            except KeyboardInterrupt as error:
                cause = error.__cause__
            thread.join()
            assert isinstance(cause, lc.DecodeCancelled) and cause.cause is lc.Cause.INTERRUPT
            assert (cause.sequences[0].state, cause.sequences[0].end) == ("rolled_back", 30)
            assert not isinstance(token, lc.CancelToken) or not token.cancelled
        check(30)
    """)


@needs_posix
@pytest.mark.parametrize("wait", ["worker.join()", "token.wait()", "token.wait(60)", "time.sleep(60)"])
def test_ctrl_c_while_the_main_thread_waits_does_not_reach_a_worker(wait: str, model_path: ModelPath) -> None:
    _well(model_path("llama"), f"""
        token = lc.CancelToken()
        worker = threading.Thread(target=lambda: context.decode(rows, lc.CancelToken()))
        worker.start()
        when_busy(signal.SIGINT)
        try:
            {wait}
            raise SystemExit("no KeyboardInterrupt")
        except KeyboardInterrupt:
            pass
        worker.join()
        assert not token.cancelled
        twin.decode(rows)
        check(4030)
    """)


@needs_posix
def test_ctrl_c_stops_a_load_from_within_its_progress(model_path: ModelPath) -> None:
    _well(model_path("llama"), """
        shares = []
        def progress(share):
            shares.append(share)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        try:
            lc.Model.load(sys.argv[1], progress=progress)
            raise SystemExit("no KeyboardInterrupt")
        except KeyboardInterrupt:
            pass
        assert len(shares) < 5
        check(30)
    """)


@needs_posix
def test_what_a_handler_raises_comes_out_of_the_decode(model_path: ModelPath) -> None:
    _well(model_path("llama"), """
        class Hangup(Exception): pass
        def handler(number, frame):
            raise Hangup
        signal.signal(signal.SIGUSR1, handler)
        when_busy(signal.SIGUSR1)
        try:
            context.decode(rows, lc.CancelToken())
            raise SystemExit("nothing was raised")
        except Hangup as error:
            assert error.__cause__.cause is lc.Cause.INTERRUPT
        check(30)
    """)


@needs_posix
def test_an_alarm_stops_a_decode(model_path: ModelPath) -> None:
    _well(model_path("llama"), """
        def handler(number, frame):
            raise TimeoutError("the alarm rang")
        signal.signal(signal.SIGALRM, handler)
        for seconds in (0.1, 0.2):
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                context.decode(rows)
                raise SystemExit("the decode ran to its end")
            except TimeoutError as error:
                assert error.args == ("the alarm rang",)
            assert context.memory.pos_max(0) == 29
        check(30)
    """)


@needs_posix
@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_storm_of_signals_does_no_harm(arch: str, model_path: ModelPath) -> None:
    _well(model_path(arch), """
        busy = []
        def handler(number, frame):
            try:
                context.memory.pos_max(0)
            except lc.ContextBusyError:
                busy.append(number)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        result = context.decode(rows, lc.CancelToken())
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(busy) > 1 and result.rows_done == 4000
        twin.decode(rows)
        check(4030)
    """)


@needs_posix
def test_a_handler_may_cancel_the_token_of_the_decode(model_path: ModelPath) -> None:
    _well(model_path("llama"), """
        token = lc.CancelToken()
        signal.signal(signal.SIGTERM, lambda number, frame: token.cancel("terminated", cause=lc.Cause.SHUTDOWN))
        when_busy(signal.SIGTERM)
        try:
            context.decode(rows, token)
            raise SystemExit("the decode ran to its end")
        except lc.DecodeCancelled as error:
            assert (error.cause, error.reason) == (lc.Cause.SHUTDOWN, "terminated")
        check(30)
    """)


async def _decode(context: lc.Context, rows: lc.Batch) -> lc.DecodeResult:
    """A decode in a thread, cancelled with its task and awaited to its end."""
    token = lc.CancelToken()
    work = asyncio.ensure_future(asyncio.to_thread(context.decode, rows, token))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        token.cancel("the task was cancelled")
        await asyncio.wait([work])
        error = work.exception()
        assert error is None or isinstance(error, lc.DecodeCancelled)
        raise


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancelled_task_and_one_that_timed_out_return_when_the_context_is_free(
    arch: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ctx=4096, n_batch=4096, n_ubatch=1) for _ in range(2))
    rows = batch((tokens(4000, 1), 30, 0), logits="none")
    for each in (context, twin):
        decode(each, batch((tokens(30), 0, 0)))
    before = holds(context)

    async def main() -> None:
        for seconds in (0, 0.01, 0.05):
            task = asyncio.create_task(_decode(context, rows))
            await asyncio.sleep(seconds)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert holds(context) == before
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_decode(context, rows), 0.02)
            assert holds(context) == before

    asyncio.run(main())
    assert same_bits(one_more(context), one_more(twin))

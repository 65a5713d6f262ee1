"""Law 9, habit: Ctrl-C, `with`, threads and asyncio behave as Python people expect."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, one_more, run_python, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]

PREPARE = """
import os, signal, sys, threading, time
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
arch = sys.argv[1]
model = lc.Model.load(cached_model(arch, "tiny"))
def make(**params):
    context = model.context(**{"n_ctx": 4096, "n_batch": 4096, "n_ubatch": 8, "n_threads": 1, **params})
    decode(context, batch((tokens(30), 0, 0)))
    return context
context, twin = make(), make()
rows = batch((tokens(3000, 1), 30, 0), logits="last")
def press_ctrl_c(after):
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    return timer
"""
CLOSE = """
context.close(); twin.close(); model.close()
print("fine")
"""


def _runs(source: str, arch: str) -> None:
    ran = run_python(PREPARE + source + CLOSE, args=[arch])
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_ctrl_c_stops_a_decode_on_the_main_thread_and_leaves_the_context_usable(arch: str) -> None:
    _runs("""
before = holds(context)
for token in (None, lc.CancelToken(), lc.CancelToken(timeout=1000), {0: lc.CancelToken()}):
    timer = press_ctrl_c(0.05)
    try:
        context.decode(rows, token)
        raise SystemExit("not interrupted")
    except KeyboardInterrupt as error:
        cause = error.__cause__
        assert type(cause) is lc.DecodeCancelled, cause
        assert cause.cause is lc.Cause.INTERRUPT
        assert cause.sequences[0].state == "rolled_back" and cause.sequences[0].end == 30
        assert cause.latency >= 0
    timer.join()
    assert holds(context) == before
    if isinstance(token, lc.CancelToken):
        assert not token.cancelled, "the token is the caller's"
assert same_bits(decode(context, rows), decode(twin, rows))
assert same_bits(one_more(context), one_more(twin))
""", arch)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_ctrl_c_keeps_what_was_done_if_asked_to(arch: str) -> None:
    _runs("""
press_ctrl_c(0.06)
try:
    context.decode(rows, on_cancel="keep")
    raise SystemExit("not interrupted")
except KeyboardInterrupt as error:
    end = error.__cause__.sequences[0].end
assert holds(context)[0][1] == end - 1
context.decode(batch((tokens(3000, 1)[end - 30:], end, 0), logits="last"))
twin.decode(rows)
assert same_bits(context.logits(-1), twin.logits(-1))
""", arch)


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_signal_handler_of_ones_own_runs_in_the_middle_of_a_decode(arch: str) -> None:
    _runs("""
seen = []
signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(time.monotonic()))
timer = threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGUSR1)); timer.start()
context.decode(rows)
end = time.monotonic()
timer.join()
assert len(seen) == 1 and seen[0] < end, "the handler ran after the call"
twin.decode(rows)
assert same_bits(context.logits(-1), twin.logits(-1))

class Stop(Exception): pass
def stop(number, frame): raise Stop("from a handler")
signal.signal(signal.SIGUSR1, stop)
context.memory.clear()
timer = threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGUSR1)); timer.start()
try:
    context.decode(batch((tokens(3000, 1), 0, 0), logits="last"))
    raise SystemExit("not stopped")
except Stop as error:
    assert error.__cause__.cause is lc.Cause.INTERRUPT
timer.join()
assert holds(context)[0] == (-1, -1)

signal.signal(signal.SIGINT, lambda number, frame: token.cancel("handled"))
token = lc.CancelToken()
press_ctrl_c(0.03)
error = cancelled(context, batch((tokens(3000, 1), 0, 0)), token)
assert error is not None and error.reason == "handled" and error.cause is lc.Cause.CLIENT
""", arch)


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_ctrl_c_leaves_a_decode_in_a_worker_thread_alone(arch: str) -> None:
    _runs("""
results = []
worker = threading.Thread(target=lambda: results.append(decode(context, rows)))
worker.start()
press_ctrl_c(0.03)
try:
    while worker.is_alive():  # not join(): interrupted, it would take the thread for ended
        time.sleep(0.002)
    raise SystemExit("no interrupt on the main thread")
except KeyboardInterrupt:
    pass
worker.join()
assert same_bits(results[0], decode(twin, rows))
""", arch)


def test_ctrl_c_stops_a_load_and_the_wait_for_a_busy_context() -> None:
    _runs("""
worker = threading.Thread(target=context.decode, args=(rows,)); worker.start()
time.sleep(0.02)
press_ctrl_c(0.05)
try:
    context.decode(batch(([5], 3030, 0)), lc.CancelToken())
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    pass
worker.join()
assert holds(context)[0][1] in (3029, 3030)
def report(share):
    signal.raise_signal(signal.SIGINT)
try:
    lc.Model.load(model.path, progress=report)
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    pass
""", "llama")


def test_importing_the_library_prints_nothing_and_leaves_signals_alone() -> None:
    ran = run_python("""
import signal
before = [signal.getsignal(number) for number in signal.valid_signals()]
import llamacancel
assert before == [signal.getsignal(number) for number in signal.valid_signals()]
""")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_with_block_closes_also_after_a_cancel(arch: str, model_path: Callable[[str], object]) -> None:
    with pytest.raises(lc.DecodeCancelled), lc.Model.load(model_path(arch)) as model, \
            model.context(n_ctx=256, n_threads=1) as context:
        context.decode(batch((tokens(8), 0, 0)), dead())
    assert model.closed
    assert context.closed


@pytest.mark.parametrize("arch", GENERATIVE)
def test_contexts_of_one_model_work_in_several_threads_at_once(arch: str, new_context: NewContext) -> None:
    contexts = [new_context(arch, n_ubatch=8) for _ in range(4)]
    rows = [batch((tokens(200, seed), 0, 0), logits="last") for seed in range(4)]
    expected = [decode(new_context(arch, n_ubatch=8), each) for each in rows]
    results: dict[int, object] = {}

    def use(i: int) -> None:
        for _ in range(3):
            token = lc.CancelToken(timeout=0.004) if i % 2 else None
            if token is not None:
                cancelled(contexts[i], rows[i], token)
            contexts[i].memory.clear()
            results[i] = decode(contexts[i], rows[i])
            contexts[i].memory.clear()

    with threads(*(lambda i=i: use(i) for i in range(4))):
        pass
    assert all(same_bits(results[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_asyncio_can_stop_a_decode_in_a_thread_through_its_token(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ubatch=8) for _ in range(2))
    rows = batch((tokens(900), 0, 0), logits="last")

    async def main() -> None:
        token = lc.CancelToken()
        call = asyncio.ensure_future(asyncio.to_thread(context.decode, rows, token))
        await asyncio.sleep(0.005)
        token.cancel("the client hung up")
        with pytest.raises(lc.DecodeCancelled, match="hung up"):
            await call
        await asyncio.to_thread(context.decode, rows)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(context.decode, batch((tokens(9), 900, 0)), lc.CancelToken(timeout=0))

    asyncio.run(main())
    twin.decode(rows)
    assert same_bits(context.logits(-1), twin.logits(-1))
    assert same_bits(one_more(context), one_more(twin))


def test_a_token_wakes_those_who_wait_for_it_and_runs_callbacks_once() -> None:
    token, seen = lc.CancelToken(), []
    token.add_callback(lambda: seen.append(threading.get_ident()))
    with threads(lambda: seen.append(token.wait(30))):
        time.sleep(0.01)
        token.cancel()
    assert sorted(map(bool, seen)) == [True, True]
    assert not token.cancel()
    assert len(seen) == 2

"""An engine closes in any way and at any moment: draining or not, collected, at exit, in a forked child."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.unit.engines import Gate, answer, engine, greedy, ids, model, same_answer, stalled

ROOT = Path(__file__).parents[2]


def thread_of(e: lc.Engine) -> threading.Thread:
    """The engine's own thread."""
    thread = e._thread._thread
    assert thread.name == "llamacancel-engine"
    return thread


def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    e = engine(slots=1)
    generations = [e.submit(ids(10, i), max_tokens=5, sampler=greedy(), logprobs=2) for i in range(3)]
    e.close()
    assert all(generation.state == "finished" for generation in generations)
    for i, generation in enumerate(generations):
        assert same_answer("llama", generation, answer("llama", ids(10, i), 5))
    with pytest.raises(lc.ClosedError):
        e.submit(ids(3))
    with pytest.raises(lc.ClosedError):
        e.embed(ids(3))
    assert e._thread.runner.context.closed
    assert not thread_of(e).is_alive()


def test_closing_without_draining_ends_all_with_shutdown() -> None:
    e = engine(slots=1)
    running, queued = stalled(e), e.submit(ids(10))
    next(running)
    e.close(drain=False)
    for generation in (running, queued):
        assert generation.finish_reason == "shutdown"
        assert generation.cause is lc.Cause.SHUTDOWN
        with pytest.raises(lc.DecodeCancelled) as caught:
            generation.result()
        assert caught.value.cause is lc.Cause.SHUTDOWN
    assert running.text
    assert not thread_of(e).is_alive()


def test_a_drain_that_takes_too_long_ends_the_rest_with_shutdown() -> None:
    e = engine(slots=1)
    running = stalled(e)
    e.close(timeout=0)
    assert running.finish_reason == "shutdown"
    e.close()
    e.close(drain=False)


def test_several_threads_close_at_the_same_time() -> None:
    e = engine()
    generation = e.submit(ids(10), max_tokens=5)
    threads = [threading.Thread(target=e.close, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert generation.finish_reason in ("length", "stop", "shutdown")
    assert not thread_of(e).is_alive()


def test_a_listener_may_close_the_engine() -> None:
    e = engine()
    e.add_listener(lambda view: e.close() if view.state == "decode" else None)
    assert e.submit(ids(10), max_tokens=5).result(60).finish_reason in ("length", "stop")
    e.close()
    assert e._thread.stopped


def test_leaving_the_with_statement_by_an_exception_does_not_drain() -> None:
    try:
        with engine() as e:
            generation = stalled(e)
            raise KeyError
    except KeyError:
        pass
    assert generation.finish_reason == "shutdown"


def test_an_engine_that_nobody_holds_is_collected_with_a_warning_and_its_thread_ends() -> None:
    e = engine()
    generation = stalled(e)
    next(generation)
    core, thread = e._thread, thread_of(e)
    gone = weakref.ref(e)
    held = [e]
    del e
    with pytest.warns(ResourceWarning, match="unclosed <Engine"):
        held.clear()
    assert gone() is None
    thread.join(60)
    assert not thread.is_alive()
    assert core.runner.context.closed
    assert generation.finish_reason == "shutdown"


def test_a_closed_engine_is_collected_silently_and_leaves_nothing() -> None:
    e = engine()
    e.submit(ids(10), max_tokens=3, timeout=1000, token=lc.CancelToken()).result(60)
    e.close()
    gone = [weakref.ref(e), weakref.ref(e._thread), weakref.ref(e._thread.runner)]
    del e
    gc.collect()
    assert [each() for each in gone] == [None, None, None]


def test_a_generation_outlives_its_engine() -> None:
    with engine() as e:
        generation = e.submit(ids(10), max_tokens=3, sampler=greedy())
    del e
    gc.collect()
    assert len(generation.tokens) == 3
    assert "".join(generation) == generation.text
    assert not generation.cancel()


def test_a_finished_request_is_not_kept_by_the_tokens_that_could_have_cancelled_it() -> None:
    client = lc.CancelToken(timeout=1000)
    with engine(history=0) as e:
        gone = []
        for _ in range(5):
            generation = e.submit(ids(10), max_tokens=2, token=client)
            generation.result(60)
            gone.append(weakref.ref(generation))
        del generation
        gc.collect()
        assert [each() for each in gone] == [None] * 5
        assert e._desk.works == {}


def test_thousands_of_waiting_requests_take_no_threads() -> None:
    with engine(slots=1, queue_limit=3000) as e:
        with Gate(e):
            before = threading.active_count()
            generations = [e.submit(ids(2), timeout=1000) for _ in range(3000)]
            assert threading.active_count() <= before + 2, "two for the deadlines of all tokens"
            for generation in generations:
                generation.cancel()
            assert all(generation.wait(60) for generation in generations[1:])
            assert e.snapshot().queue == ()
        assert generations[0].wait(60)


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    begin = (
        "import threading, time, llamacancel as lc\n"
        f"model = lc.Model.load({str(cached_model('llama', 'tiny', quant='f32'))!r})\n"
        "endless = lc.Sampler(temperature=0, logit_bias={2: -1000.0})\n"
    )
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", begin + source],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "source",
    [
        "",
        "held = engine.submit([400], sampler=endless); next(held)",
        "held = engine.submit(list(range(300, 4000)))",
        "held = [engine.submit([400], timeout=9) for _ in range(9)]",
        "held = engine.embed([400] * 2000)",
        "engine.add_listener(lambda _: time.sleep(0.01)); held = engine.submit([400])",
        "engine.stop()",
    ],
)
def test_a_process_that_ends_with_a_running_engine_is_silent(source: str) -> None:
    ran = run_python(f"engine = lc.Engine(model, n_threads=1, slots=2); {source}")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_an_exit_hook_from_before_the_import_closes_an_engine_within_its_timeout() -> None:
    source = (
        "import atexit\n"
        "atexit.register(lambda: (engine.close(timeout=0.2), print('closed')))\n"
        "import llamacancel as lc\n"
        f"model = lc.Model.load({str(cached_model('llama', 'tiny', quant='f32'))!r})\n"
        "engine = lc.Engine(model, n_threads=1, slots=1)\n"
        "generation = engine.submit([400], sampler=lc.Sampler(temperature=0, logit_bias={2: -1000.0}))\n"
        "next(generation)\n"
    )
    ran = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "closed\n", "")


def test_ctrl_c_while_reading_stops_the_generation_and_the_engine_goes_on() -> None:
    ran = run_python(
        "import os, signal\n"
        "with lc.Engine(model, n_threads=1) as engine:\n"
        "    for read, all_read in (list, lambda: not generation.readable), (lc.Generation.result, lambda: True):\n"
        "        generation = engine.submit([400], sampler=endless)\n"
        "        def interrupt():\n"
        "            if threading.current_thread() is threading.main_thread() or len(generation.tokens) < 5:\n"
        "                return\n"
        "            if generation._token.cancelled:\n"
        "                return\n"
        "            while not (generation._work.bells and all_read()):\n"  # so that it comes while the reader waits
        "                time.sleep(0.001)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            generation._token.wait(30)\n"
        "        generation.add_notify(interrupt)\n"
        "        try:\n"
        "            read(generation)\n"
        "        except KeyboardInterrupt:\n"
        "            print(generation.finish_reason, generation.cause)\n"
        "    print(len(engine.submit([400], max_tokens=3, sampler=endless).result().tokens))\n"
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["cancelled Cause.INTERRUPT"] * 2 + ["3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_the_engine_is_not_its_own() -> None:
    ran = run_python(
        "import os, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "engine = lc.Engine(model, n_threads=1)\n"
        "generation = engine.submit([400], max_tokens=3, sampler=endless)\n"
        "generation.result()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    calls = [lambda: engine.submit([1]), lambda: engine.embed([1]), lambda: engine.cancel('a')]\n"
        "    for call in [*calls, engine.snapshot]:\n"
        "        try:\n"
        "            call()\n"
        "            os._exit(1)\n"
        "        except lc.ClosedError:\n"
        "            pass\n"
        "    engine.close()\n"
        "    del engine\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "print(len(engine.submit([400], max_tokens=3, sampler=endless).result().tokens))\n"
        "engine.close()\n"
    )
    assert (ran.stderr, ran.stdout) == ("", "3\n")


def test_the_model_may_be_closed_after_the_engine() -> None:
    own = lc.Model.load(cached_model("llama", "tiny", quant="f32"))
    with lc.Engine(own, n_ctx=256, n_threads=1) as e:
        e.submit(ids(5), max_tokens=2).result(60)
    own.close()
    assert repr(e).startswith("<Engine closed")
    assert e.model is own
    assert (model("llama").closed, own.closed) == (False, True)

"""What nobody waits for is not computed, and what is finished is not kept."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest

import llamacancel as lc
from llamacancel import aio
from llamacancel.commands.make_model import cached_model
from tests.unit.engines import Gate, endless, engine, ids
from tests.unit.test_engine_lifetime import run_python

DROPPED = pytest.mark.filterwarnings("ignore:nobody waits for:ResourceWarning")


def ended(e: lc.Engine) -> list[tuple[str, str | None]]:
    """The finished requests, once those before this call are."""
    e.submit(ids(3), max_tokens=1, request_id="last").result(60)
    return [(view.id, view.finish_reason) for view in e.snapshot().recent if view.id != "last"]


def test_a_loop_that_is_left_cancels_its_generation_and_says_so() -> None:
    with engine(slots=1) as e:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in e.submit(ids(5), sampler=endless(), request_id="a"):
                break
        assert [each.category for each in told] == [ResourceWarning]
        assert "nobody waits for <Generation a" in str(told[0].message)
        assert ended(e) == [("a", "cancelled")]


@DROPPED
def test_a_loop_that_fails_cancels_its_generation() -> None:
    with engine(slots=1) as e:
        try:
            for _ in e.submit(ids(5), sampler=endless(), request_id="a"):
                raise KeyError
        except KeyError:
            pass
        assert ended(e) == [("a", "cancelled")]


@DROPPED
def test_a_generation_that_is_collected_in_a_cycle_is_cancelled_in_the_queue_too() -> None:
    with engine(slots=1) as e:
        with Gate(e) as gate:
            running = e.submit(ids(5), max_tokens=2)
            gate.wait()
            cycle: list[object] = [e.submit(ids(5), sampler=endless(), request_id="a")]
            cycle.append(cycle)
            del cycle
            gc.collect()
            (view,) = e.snapshot().recent
            assert (view.id, view.finish_reason, view.started_at) == ("a", "cancelled", None)
        running.result(60)


@DROPPED
def test_an_asynchronous_loop_that_is_left_cancels_its_generation() -> None:
    async def main() -> None:
        async with aio.Engine(engine(slots=1)) as e:
            async for _ in e.submit(ids(5), sampler=endless(), request_id="a"):
                break
            assert ended(e.engine) == [("a", "cancelled")]
            e.engine.close()

    asyncio.run(main())


def test_somebody_who_waits_holds_what_he_waits_for() -> None:
    with engine(slots=1) as e:
        assert len(e.submit(ids(5), max_tokens=5, sampler=endless()).result(60).tokens) == 5
        assert len(list(e.submit(ids(5), max_tokens=5, sampler=endless()))) > 0

        async def main() -> int:
            return len((await aio.Engine(e).submit(ids(5), max_tokens=5, sampler=endless()).result()).tokens)

        assert asyncio.run(main()) == 5


def test_what_is_finished_is_dropped_without_a_word() -> None:
    with engine(slots=1) as e:
        generation = e.submit(ids(5), max_tokens=2)
        generation.result(60)
        del generation
        generation = e.submit(ids(5), sampler=endless())
        generation.cancel()
        del generation
        gc.collect()


def test_a_finished_generation_lets_go_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "kept.gguf"
    shutil.copy(cached_model("llama", "tiny"), path)
    model = lc.Model.load(path)
    with lc.Engine(model, n_threads=1, slots=1) as e:
        finished = e.submit([400], max_tokens=3, token=lc.CancelToken(timeout=1000))
        finished.result(60)
        cancelled = e.submit([400], sampler=endless())
        cancelled.cancel()
        assert cancelled.wait(60)
    model.close()
    del e, model
    gc.collect()
    assert "kept.gguf" not in Path("/proc/self/maps").read_text()
    assert (finished.finish_reason, cancelled.finish_reason) == ("length", "cancelled")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_generation_in_a_forked_child_says_that_it_is_not_its_own() -> None:
    ran = run_python(
        "import os, asyncio, signal, warnings\n"
        "from llamacancel import aio\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "engine = lc.Engine(model, n_threads=1)\n"
        "token = lc.CancelToken()\n"
        "generation = engine.submit([400], sampler=endless, token=token)\n"
        "next(generation)\n"
        "def leave():\n"
        "    with generation: pass\n"
        "async def wait(): await aio.Generation(generation).result()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"
        "    for call in generation.result, generation.wait, lambda: list(generation), generation.cancel, leave, \\\n"
        "                engine.snapshot, lambda: asyncio.run(wait()):\n"
        "        try:\n"
        "            call()\n"
        "            os._exit(1)\n"
        "        except lc.ClosedError:\n"
        "            pass\n"
        "    token.cancel()\n"
        "    del generation\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "assert next(generation) is not None and generation.finish_reason is None\n"
        "engine.close(drain=False)\n"
    )
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")


def test_a_late_cancel_does_not_reach_a_later_request_of_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    with engine(slots=1) as e:
        first = e.submit(ids(5), sampler=endless(), request_id="it")
        next(first)
        leave = first._work.leave

        def held() -> None:
            inside.set()
            assert go_on.wait(60)
            leave()

        monkeypatch.setattr(first._work, "leave", held)
        thread = threading.Thread(target=first.cancel, args=("the first one hung up",))
        thread.start()
        assert inside.wait(60)
        assert first.wait(60), "the step has seen the token"
        second = e.submit(ids(5), max_tokens=20, sampler=endless(), request_id="it")
        next(second)
        go_on.set()
        thread.join(60)
        assert second.result(60).finish_reason == "length"


def test_a_request_follows_on_one_of_its_id_that_is_just_being_cancelled() -> None:
    with engine(slots=2) as e:
        with Gate(e) as gate:
            first = e.submit(ids(5), sampler=endless(), request_id="it")
            gate.wait()
            with pytest.raises(ValueError, match="unfinished request 'it'"):
                e.submit(ids(5), request_id="it")
            assert e.cancel("it", "hung up")
            assert not first.ended, "its step is being computed"
            second = e.submit(ids(5), max_tokens=3, sampler=endless(), request_id="it")
            with pytest.raises(ValueError, match="unfinished request 'it'"):
                e.submit(ids(5), request_id="it")
        assert first.wait(60)
        assert second.result(60).finish_reason == "length"
        assert first.finish_reason == "cancelled"


def test_of_many_threads_as_many_are_let_in_as_there_are_places() -> None:
    with engine(slots=1, queue_limit=20) as e:
        with Gate(e) as gate:
            got = [e.submit(ids(3), max_tokens=1)]
            gate.wait()
            refused: list[lc.QueueFullError] = []
            together = threading.Barrier(8)

            def submit() -> None:
                together.wait(30)
                for _ in range(10):
                    try:
                        got.append(e.submit(ids(3), max_tokens=1))
                    except lc.QueueFullError as error:
                        refused.append(error)

            threads = [threading.Thread(target=submit) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert (len(got), len(refused)) == (21, 60)
        for each in got:
            each.result(60)

"""The engine under asyncio and anyio: cancelling a task stops the native work, and it returns when the slot is free."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest

import llamacancel as lc
from llamacancel import aio
from tests.unit.engines import EXACT, Gate, answer, endless, greedy, ids, model, same_answer, stalled


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 90)

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def aengine(arch: str = "llama", **params: Any) -> AsyncIterator[aio.Engine]:
    async with aio.Engine(model(arch), **{**EXACT, "slots": 2, "stream_interval": 0, **params}) as e:
        yield e


def idle(e: aio.Engine) -> int:
    return sum(slot.state == "idle" for slot in e.snapshot().slots)


async def reached(gate: Gate) -> None:
    await asyncio.sleep(0)  # a task that was not begun cannot be cancelled in what it awaits
    while not gate.reached.is_set():
        await asyncio.sleep(0.001)


async def finish(task: asyncio.Task[Any]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_generation_is_read_piece_by_piece() -> None:
    async def main() -> None:
        async with aengine() as e:
            generation = e.submit(ids(20), max_tokens=10, sampler=greedy(), logprobs=2)
            pieces = [piece async for piece in generation]
            assert "".join(pieces) == generation.text
            assert same_answer("llama", generation.generation, answer("llama", ids(20), 10))
            assert generation.finish_reason == "length"
            assert generation.finished
            assert [piece async for piece in generation] == []
            assert (await generation.result()).text == generation.text

    run(main)


def test_many_tasks_share_an_engine() -> None:
    async def main() -> None:
        async with aengine(slots=3) as e:

            async def client(i: int) -> None:
                generation = e.submit(ids(10 + i, i), max_tokens=8, sampler=greedy(), logprobs=2)
                if i % 2:
                    async for _ in generation:
                        pass
                else:
                    await generation.result()
                assert same_answer("llama", generation.generation, answer("llama", ids(10 + i, i), 8))

            await asyncio.gather(*(client(i) for i in range(12)))

    run(main)


def test_an_embedding_is_awaited() -> None:
    async def main() -> None:
        async with aengine() as e:
            vector = await e.embed(ids(10))
            assert vector.dtype == np.float32
            assert np.array_equal(vector, e.engine.embed(ids(10)).result(60))

    run(main)


def test_a_failed_generation_raises_where_it_is_awaited() -> None:
    async def main() -> None:
        async with aengine() as e:
            nothing = {i: float("-inf") for i in range(model("llama").n_vocab)}
            bad = lc.Sampler(temperature=0, grammar='root ::= "a"', logit_bias=nothing)
            with pytest.raises(ValueError, match="left to choose"):
                await e.submit(ids(5), sampler=bad).result()
            with pytest.raises(lc.DeadlineExceeded):
                await _read(aio.Generation(stalled(e.engine, timeout=0.02)))

    run(main)


READ: dict[str, Callable[[aio.Generation], Awaitable[Any]]] = {
    "for": lambda generation: _read(generation),
    "result": lambda generation: generation.result(),
    "wait": lambda generation: generation.wait(),
}


async def _read(generation: aio.Generation) -> None:
    async for _ in generation:
        pass


@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_task_cancelled_between_two_pieces_stops_the_work_and_ends_when_the_slot_is_free(arch: str, how: str) -> None:
    async def main() -> None:
        async with aengine(arch) as e:
            generation = aio.Generation(stalled(e.engine))  # first: the steps that it is held after are its own
            other = e.submit(ids(20, 1), max_tokens=20, sampler=greedy(), logprobs=2)
            task = asyncio.ensure_future(READ[how](generation))
            await asyncio.sleep(0)  # a task that was not begun cannot be cancelled in what it awaits
            while len(generation.tokens) < 4:
                await asyncio.sleep(0.001)
            task.cancel()
            await finish(task)
            assert (generation.state, generation.finish_reason) == ("finished", "cancelled")
            assert generation.cause is lc.Cause.CLIENT
            assert generation.id not in {slot.request_id for slot in e.snapshot().slots}
            await other.result()
            assert same_answer(arch, other.generation, answer(arch, ids(20, 1), 20))

    run(main)


@pytest.mark.parametrize("how", READ)
def test_a_task_cancelled_in_the_queue_leaves_it_at_once(how: str) -> None:
    async def main() -> None:
        async with aengine(slots=1) as e:
            with Gate(e.engine) as gate:
                running = e.submit(ids(5), max_tokens=3)
                await reached(gate)
                generation = e.submit(ids(10))
                task = asyncio.ensure_future(READ[how](generation))
                await asyncio.sleep(0)
                task.cancel()
                await finish(task)  # while the engine's thread stands still
                assert generation.finish_reason == "cancelled"
                assert e.snapshot().queue == ()
            await running.result()

    run(main)


@pytest.mark.parametrize("how", READ)
def test_a_task_cancelled_in_a_silent_prompt_stops_it_and_ends_when_the_slot_is_free(how: str) -> None:
    async def main() -> None:
        async with aengine(slots=1, n_batch=64) as e:
            with Gate(e.engine, at=3) as gate:
                generation = e.submit(ids(900), max_tokens=2)
                task = asyncio.ensure_future(READ[how](generation))
                await reached(gate)
                task.cancel()
                await asyncio.sleep(0.01)
                assert not task.done(), "the step still computes it"
                assert generation.state == "prefill"
            await finish(task)
            assert generation.state == "finished"
            assert generation.tokens == ()
            assert 0 < generation.view().prompt_done < 900
            assert idle(e) == 1

    run(main)


def test_an_embedding_whose_task_is_cancelled_is_dropped() -> None:
    async def main() -> None:
        async with aengine() as e:
            with Gate(e.engine, texts=True) as gate:
                task = asyncio.ensure_future(e.embed(ids(10)))
                await reached(gate)
                task.cancel()
                await asyncio.sleep(0)  # the task hears of it
            await finish(task)
            assert e.snapshot().recent[-1].finish_reason == "cancelled"

    run(main)


class Reading:
    """Stands in for an engine's model, and turns a text into tokens only once that was cancelled or allowed."""

    def __init__(self, e: aio.Engine) -> None:
        self._model = e.engine.model
        self.token: lc.CancelToken | None = None
        self.reached = threading.Event()
        self.allowed = threading.Event()
        self.over = False
        e.engine._model = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokenize(self, text: str, *, token: lc.CancelToken) -> Any:
        self.token = token
        self.reached.set()
        while not (self.allowed.is_set() or token.cancelled):
            self.allowed.wait(0.001)
        self.over = True
        return self._model.tokenize(text, token=token)


LONG = "Go on. " * 1000


async def embedded(e: aio.Engine) -> int:
    """What a long text that is embedded and one that is only turned into tokens have in common."""
    return len(await e.embed(LONG))


async def tokenized(e: aio.Engine) -> int:
    return len(await e.tokenize(LONG))


reads = pytest.mark.parametrize("read", [tokenized, embedded])


@reads
def test_the_loop_goes_on_while_a_long_text_is_read(read: Callable[[aio.Engine], Awaitable[int]]) -> None:
    async def main() -> None:
        async with aengine(n_batch=4096) as e:
            reading = Reading(e)
            task = asyncio.ensure_future(read(e))
            while not reading.reached.is_set():
                await asyncio.sleep(0.001)
            assert not task.done()
            reading.allowed.set()
            assert await task > 0

    run(main)


def test_a_text_has_the_tokens_that_the_model_gives_it() -> None:
    async def main() -> None:
        async with aengine() as e:
            assert (await e.tokenize(LONG)).tolist() == model("llama").tokenize(LONG).tolist()
            with pytest.raises(lc.DeadlineExceeded):
                await e.tokenize(LONG, timeout=1e-9)
        with pytest.raises(lc.ClosedError):
            await e.tokenize(LONG)

    run(main)


@reads
@pytest.mark.parametrize("how", ["task", "anyio"])
def test_a_task_cancelled_while_a_text_is_read_stops_that_and_waits_for_its_end(
    how: str, read: Callable[[aio.Engine], Awaitable[int]]
) -> None:
    async def main() -> None:
        async with aengine() as e:
            reading = Reading(e)
            scope = anyio.CancelScope()

            async def within() -> None:
                with scope:
                    await read(e)
                assert how == "anyio"

            task = asyncio.ensure_future(within())
            while not reading.reached.is_set():
                await asyncio.sleep(0.001)
            if how == "anyio":
                scope.cancel()
                await task
            else:
                task.cancel()
                await finish(task)
            assert reading.over
            assert reading.token is not None
            assert reading.token.reason == "the asyncio task was cancelled"
            assert e.snapshot().recent == ()

    run(main)


def test_a_task_cancelled_several_times_still_waits_for_the_slot() -> None:
    async def main() -> None:
        async with aengine(slots=1) as e:
            with Gate(e.engine) as gate:
                generation = e.submit(ids(10))
                task = asyncio.ensure_future(generation.result())
                await reached(gate)
                for _ in range(5):
                    task.cancel()
                    await asyncio.sleep(0.002)
                assert not task.done()
            await finish(task)
            assert generation.state == "finished"

    run(main)


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="asyncio.timeout() came with Python 3.11")
def test_a_timeout_block_stops_the_work() -> None:
    async def main() -> None:
        async with aengine() as e:
            generation = aio.Generation(stalled(e.engine))
            with pytest.raises(TimeoutError):
                await _within(asyncio.timeout(0.05), generation)
            assert generation.finish_reason == "cancelled"
            assert idle(e) == 2

    run(main)


async def _within(scope: contextlib.AbstractAsyncContextManager[Any], generation: aio.Generation) -> None:
    async with scope:
        await _read(generation)


def test_wait_for_stops_the_work() -> None:
    async def main() -> None:
        async with aengine() as e:
            generation = aio.Generation(stalled(e.engine))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generation.result(), 0.05)
            assert generation.state == "finished"

    run(main)


def test_a_failing_sibling_in_a_task_group_stops_the_work() -> None:
    async def main() -> None:
        async with aengine() as e:
            generation = aio.Generation(stalled(e.engine))

            async def fails() -> None:
                while len(generation.tokens) < 3:
                    await anyio.sleep(0.001)
                raise KeyError

            failed = False
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(_read, generation)
                    group.start_soon(fails)
            except BaseException as error:  # an exception group, which Python 3.10 does not know
                failed = isinstance(error.exceptions[0], KeyError)  # type: ignore[attr-defined]
            assert failed
            assert generation.finish_reason == "cancelled"
            assert idle(e) == 2

    run(main)


@pytest.mark.parametrize("how", READ)
def test_anyio_scopes_stop_the_work(how: str) -> None:
    async def main() -> None:
        async with aio.Engine(model("llama"), **EXACT, slots=2) as e:
            generation = aio.Generation(stalled(e.engine))
            with anyio.move_on_after(0.05) as scope:
                await READ[how](generation)
            assert scope.cancelled_caught
            assert generation.finish_reason == "cancelled"
            assert idle(e) == 2
            with pytest.raises(TimeoutError), anyio.fail_after(0.05):
                await aio.Generation(stalled(e.engine)).result()
            assert idle(e) == 2

    anyio.run(main, backend="asyncio")


def test_an_anyio_scope_that_is_cancelled_does_not_spin_while_the_slot_gets_free() -> None:
    turns = 0

    async def main() -> None:
        nonlocal turns
        async with aio.Engine(model("llama"), **EXACT, slots=1) as e:
            with Gate(e.engine) as gate:
                generation = e.submit(ids(10))

                async def client(scope: anyio.CancelScope) -> None:
                    with scope:
                        await generation.result()

                scope = anyio.CancelScope()
                task = asyncio.ensure_future(client(scope))
                await reached(gate)
                until = generation._waiting._until

                async def counted(*args: Any) -> None:
                    nonlocal turns
                    turns += 1
                    await until(*args)

                generation._waiting._until = counted  # type: ignore[method-assign]
                scope.cancel()
                await asyncio.sleep(0.05)
                assert not task.done()
            await task

    asyncio.run(main())
    assert turns == 1


def test_news_that_come_faster_than_the_loop_turns_ring_once() -> None:
    async def main() -> None:
        async with aengine() as e:
            generation = e.submit(ids(5), sampler=endless(), max_tokens=60)
            loop, rings = asyncio.get_running_loop(), 0
            call = loop.call_soon_threadsafe

            def counted(fn: Callable[..., object], *args: Any, **how: Any) -> asyncio.Handle:
                nonlocal rings
                rings += 1
                return call(fn, *args, **how)

            loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
            task = asyncio.ensure_future(generation.result())
            await asyncio.sleep(0)
            assert e.engine.snapshot() is not None
            generation.generation.wait(60)  # the loop stands still meanwhile
            assert rings <= 2, "one that the loop saw, and one that it did not"
            assert len((await task).tokens) == 60

    run(main)


def test_requests_that_have_news_at_the_same_time_wake_their_loop_together() -> None:
    async def main() -> None:
        async with aengine(slots=4) as e:
            loop, rings, news = asyncio.get_running_loop(), 0, 0
            call = loop.call_soon_threadsafe

            def counted(fn: Callable[..., object], *args: Any, **how: Any) -> asyncio.Handle:
                nonlocal rings
                rings += 1
                return call(fn, *args, **how)

            async def read(generation: aio.Generation) -> None:
                nonlocal news
                async for _ in generation:
                    news += 1

            with Gate(e.engine):
                works = [e.submit(ids(5, i), sampler=endless(), max_tokens=40) for i in range(4)]
                tasks = [asyncio.ensure_future(read(work)) for work in works]
                await asyncio.sleep(0)
            loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
            await asyncio.gather(*tasks)
            assert news > 100
            assert rings < news / 2, "steps of four"

    run(main)


def test_thousands_of_waiting_tasks_take_no_threads() -> None:
    async def main() -> None:
        async with aengine(slots=1, queue_limit=3000) as e:
            with Gate(e.engine) as gate:
                first = asyncio.ensure_future(e.submit(ids(2), timeout=1000).result())
                await reached(gate)
                before = threading.active_count()
                tasks = [first, *(asyncio.ensure_future(e.submit(ids(2), timeout=1000).result()) for _ in range(2000))]
                await asyncio.sleep(0)
                assert threading.active_count() <= before
                for task in tasks[1:]:
                    task.cancel()
                await asyncio.gather(*tasks[1:], return_exceptions=True)
                assert e.snapshot().queue == ()
                assert all(task.cancelled() for task in tasks[1:])
                tasks[0].cancel()
            await finish(tasks[0])

    run(main)


def test_leaving_a_generation_by_aclosing_frees_its_slot() -> None:
    async def main() -> None:
        async with aengine() as e:
            async with aio.Generation(stalled(e.engine)) as generation:
                async for _ in generation:
                    break
            assert generation.finish_reason == "cancelled"
            assert idle(e) == 2
            await generation.aclose()

    run(main)


def test_closing_drains_and_a_cancelled_close_drains_no_longer() -> None:
    async def main() -> None:
        e = aio.Engine(model("llama"), **EXACT)
        generation = e.submit(ids(5), max_tokens=5)
        await e.close()
        assert generation.finish_reason == "length"
        e = aio.Engine(model("llama"), **EXACT)
        generation = aio.Generation(stalled(e.engine))
        task = asyncio.ensure_future(e.close(timeout=None))
        await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        await finish(task)
        assert generation.finish_reason == "shutdown"
        assert e.engine._thread.stopped
        await e.close()

    run(main)


def test_an_engine_that_was_there_before_is_not_closed() -> None:
    async def main() -> None:
        with lc.Engine(model("llama"), **EXACT) as own:
            async with aio.Engine(own) as e:
                assert e.engine is own
                await e.submit(ids(5), max_tokens=2).result()
            assert not own.closed
            with pytest.raises(TypeError, match="slots"):
                aio.Engine(own, slots=2)

    run(main)


def test_a_full_queue_refuses_without_waiting() -> None:
    async def main() -> None:
        async with aengine(slots=1, queue_limit=1) as e:
            with Gate(e.engine) as gate:
                first = e.submit(ids(3), max_tokens=1)
                await reached(gate)
                second = e.submit(ids(3), max_tokens=1)
                with pytest.raises(lc.QueueFullError):
                    e.submit(ids(3))
            await asyncio.gather(first.result(), second.result())

    run(main)


def test_a_generation_belongs_to_the_loop_that_waited_for_it_first() -> None:
    async def elsewhere(generation: aio.Generation) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await generation.wait()

    async def main() -> None:
        async with aengine() as e:
            with Gate(e.engine):
                generation = e.submit(ids(5), max_tokens=2)
                task = asyncio.ensure_future(generation.result())
                await asyncio.sleep(0)
                await asyncio.to_thread(asyncio.run, elsewhere(generation))
            await task

    run(main)

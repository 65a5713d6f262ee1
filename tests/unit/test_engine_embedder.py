"""Texts are embedded beside the engine's thread, and so is their context made; what goes wrong ends one request."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.engine.scheduler import Outcome
from tests.laws.clock import Clock, in_the_middle
from tests.unit.engines import Gate, answer, endless, engine, greedy, ids, same_answer


class Making:
    """Holds whoever makes the context for embeddings until it is let go, or the token of its request is cancelled.

    Attributes:
        threads: Who has begun to make it, in order.
        begun: Released for each of them.
    """

    def __init__(self, e: lc.Engine, wrong: Callable[[int], Exception | None] = lambda number: None) -> None:
        embedder = e._thread.embedder
        make, self.threads, self.begun, self.go = embedder._make, [], threading.Semaphore(0), lc.CancelToken()

        def held(token: lc.CancelToken | None) -> lc.Context:
            assert token is not None
            self.threads.append(threading.current_thread())
            self.begun.release()
            lc.CancelToken.any_of(self.go, token).wait(60)
            error = wrong(len(self.threads) - 1)
            if error is not None:
                raise error
            return make(token)

        embedder._make = held

    def wait(self) -> None:
        assert self.begun.acquire(timeout=60)


@pytest.mark.parametrize(("pooling", "error"), [("none", IndexError), ("nonsense", ValueError), ("rank", None)])
def test_whatever_pooling_is_asked_for_ends_no_generation_beside_the_embeddings(
    pooling: Any, error: type[Exception] | None
) -> None:
    with engine(pooling=pooling) as e:
        generation = e.submit(ids(10), max_tokens=200, sampler=endless(), logprobs=2)
        next(generation)
        for embedding in [e.embed(ids(5, seed)) for seed in range(3)]:
            assert embedding.wait(60)
            assert embedding.finish_reason == ("stop" if error is None else "error")
            assert type(embedding.error) is (error or type(None))
        assert generation.result(60).finish_reason == "length"
        after = e.submit(ids(20), max_tokens=4, sampler=greedy(), logprobs=2)
        after.result(60)
        assert same_answer("llama", after, answer("llama", ids(20), 4))


def test_generations_go_on_while_the_context_for_embeddings_is_made() -> None:
    with engine() as e:
        making = Making(e)
        embedding = e.embed(ids(5))
        making.wait()
        assert e.submit(ids(10), max_tokens=20, sampler=endless()).result(60).finish_reason == "length"
        assert not embedding.wait(0)
        making.go.cancel()
        assert embedding.result(60).shape
        assert making.threads[0] is not e._thread._thread
        assert e.embed(ids(6)).result(60).shape
        assert len(making.threads) == 1


def test_a_token_that_engine_is_made_under_cancels_nothing_once_it_is_made() -> None:
    starting = lc.CancelToken()
    with engine(token=starting) as e:
        starting.cancel("start-up is over")
        generation = e.submit(ids(10), max_tokens=20, sampler=endless())
        assert e.embed(ids(5)).result(60).shape
        assert generation.result(60).finish_reason == "length"
        runner = e._thread.runner
        first, compute = runner.context, runner._compute

        def unusable(context: lc.Context, *args: Any, **how: Any) -> lc.DecodeResult:
            if context is first:
                raise lc.DecodeFailedError("the context is unusable")
            return compute(context, *args, **how)

        runner._compute = unusable  # type: ignore[method-assign]
        assert e.submit(ids(10), max_tokens=20, sampler=endless()).result(60).finish_reason == "length"
        assert runner.context is not first


def test_an_engine_is_not_made_under_a_cancelled_token() -> None:
    starting = lc.CancelToken()
    starting.cancel("changed my mind")
    with pytest.raises(lc.DecodeCancelled, match="changed my mind"):
        engine(token=starting)


def test_a_request_that_leaves_takes_the_making_for_it_along_and_the_next_one_has_its_own() -> None:
    with engine() as e:
        making = Making(e)
        first, second = e.embed(ids(5)), e.embed(ids(6))
        making.wait()
        first.cancel("hung up")
        making.wait()
        making.go.cancel()
        assert second.result(60).shape
        assert (first.finish_reason, first.reason) == ("cancelled", "hung up")


def test_a_context_for_embeddings_that_cannot_be_made_ends_the_request_it_was_made_for() -> None:
    with engine() as e:
        making = Making(e, lambda number: MemoryError("none left") if number == 0 else None)
        first, second = e.embed(ids(5)), e.embed(ids(6))
        making.go.cancel()
        with pytest.raises(MemoryError):
            first.result(60)
        assert second.result(60).shape
        assert len(making.threads) == 2


def test_an_engine_without_threads_for_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with engine() as e:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="new thread"):
                e.embed(ids(5)).result(60)
        assert e.embed(ids(6)).result(60).shape


@pytest.mark.parametrize("drain", [False, True])
def test_close_waits_for_a_making_or_gives_it_up(drain: bool) -> None:
    e = engine()
    making = Making(e)
    embedding = e.embed(ids(5))
    making.wait()
    if drain:
        making.go.cancel()
    e.close(drain=drain)
    assert embedding.finish_reason == ("stop" if drain else "shutdown")
    assert not making.threads[0].is_alive()
    assert e._thread.embedder.context is None


@pytest.mark.parametrize("arch", ["llama", "embedding"])
@pytest.mark.parametrize("gone", [1, 2, 3])
@pytest.mark.parametrize("is_long", [False, True])
def test_a_cancel_in_the_middle_of_a_batch_ends_those_it_names_and_the_others_have_their_vectors(
    arch: str, gone: int, is_long: bool
) -> None:
    """At points drawn over the whole of the native call."""
    texts = [ids(30 + 7 * i, i) for i in range(3)]
    rng = random.Random(gone)
    with engine(arch, slots=3) as e:
        expected = [e.embed(text).result(60) for text in texts]
        embedder = e._thread.embedder
        compute = embedder._compute
        calls: list[int] = []

        def batch() -> list[lc.Embedding]:
            """The texts in one batch: another one is computed while they come."""
            calls.clear()
            with Gate(e, texts=True) as gate:
                first = e.embed(ids(3), timeout=1000)
                gate.wait()
                embeddings = [e.embed(text, timeout=1000) for text in texts]
            assert first.result(60).shape
            for each in embeddings:
                assert each.wait(60)
            return embeddings

        def clocked(*args: Any) -> Any:
            with Clock() as clock:
                try:
                    return compute(*args)
                finally:
                    calls.append(clock.readings)

        def cancelled(context: lc.Context, batch: lc.Batch, tokens: Any) -> Any:
            calls.append(len(tokens))
            if calls != [1, 3]:
                return compute(context, batch, tokens)
            flight = e._thread.scheduler.texts_in_flight
            assert flight is not None
            flight.pace.row_seconds = 100.0 if is_long else 0.0
            owners = [request.owner for request in flight.plan.texts]
            with in_the_middle(lambda: [each.cancel("hung up") for each in owners[:gone]], rng.randrange(2, last)):
                return compute(context, batch, tokens)

        embedder._compute = clocked  # type: ignore[method-assign]
        batch()
        last = calls[-1] * 9 // 10
        embedder._compute = cancelled  # type: ignore[method-assign]
        for _ in range(6):
            embeddings = batch()
            for each, vector in list(zip(embeddings, expected, strict=True))[gone:]:
                assert np.allclose(each.result(0), vector, atol=1e-2)
            assert {(each.finish_reason, each.reason) for each in embeddings[:gone]} == {("cancelled", "hung up")}
            assert calls == [1, 3, *([3 - gone] if is_long and gone < 3 else [])], "again, where that pays"
        assert embedder.context is not None, "a cancel is no fault"
        assert not e._thread.scheduler.embedding


def test_a_cancel_ends_a_text_while_the_engines_thread_is_busy_with_a_step() -> None:
    with engine() as e:
        e.embed(ids(3)).result(60)
        embedder = e._thread.embedder
        compute, told = embedder._compute, embedder._tell
        outcomes: list[Outcome] = []
        arrived = threading.Event()

        def tell(outcome: Outcome) -> None:
            outcomes.append(outcome)
            arrived.set()
            told(outcome)

        def cancelling(context: lc.Context, batch: lc.Batch, tokens: Any) -> Any:
            with in_the_middle(embedding.cancel, at=20):
                return compute(context, batch, tokens)

        embedder._compute, embedder._tell = cancelling, tell  # type: ignore[method-assign]
        with Gate(e, texts=True) as texts, Gate(e) as gate:
            embedding = e.embed(ids(500), timeout=1000)
            texts.wait()
            generation = e.submit(ids(20), max_tokens=3, sampler=greedy(), logprobs=2)
            gate.wait()
            texts.open()
            assert arrived.wait(60), "the thread is free for the next text"
            assert list(outcomes[0].cancelled.values()) == ["cancelled"]
        generation.result(60)
        assert embedding.wait(60)
        assert embedding.finish_reason == "cancelled"


@pytest.mark.parametrize("drain", [False, True])
def test_close_waits_for_a_batch_or_stops_it(drain: bool) -> None:
    e = engine()
    with Gate(e, texts=True) as gate:
        embedding = e.embed(ids(800))
        waiting = e.embed(ids(5))
        gate.wait()
        closing = threading.Thread(target=e.close, args=(drain,))
        closing.start()
        assert drain or embedding._token.wait(60)
    closing.join(60)
    assert not closing.is_alive()
    assert [each.finish_reason for each in (embedding, waiting)] == ["stop" if drain else "shutdown"] * 2
    thread = e._thread.embedder._thread
    assert thread is not None
    assert not thread.is_alive()
    assert e._thread.embedder.context is None

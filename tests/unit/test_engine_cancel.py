"""A cancel ends its own request, wherever that is, frees the slot, and leaves the neighbours their answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import llamacancel as lc
from llamacancel.scheduler import Plan
from tests.unit.engines import (
    GENERATIVE,
    Gate,
    answer,
    before_step,
    endless,
    engine,
    greedy,
    idle_slots,
    ids,
    same_answer,
)


def when_pieces(generation: lc.Generation, n: int, fn: Callable[[], object]) -> None:
    """Calls `fn` on the engine's thread once the generation has `n` tokens."""
    called = threading.Event()

    def look() -> None:
        if len(generation.tokens) >= n and not called.is_set():
            called.set()
            fn()

    generation.add_notify(look)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_neighbour_says_what_it_says_alone_when_a_request_is_cancelled_between_two_tokens(arch: str) -> None:
    prompt = ids(60, 1)
    with engine(arch) as e:
        other = e.submit(prompt, max_tokens=30, sampler=greedy(), logprobs=2)
        victim = e.submit(ids(40, 2), sampler=endless(), logprobs=2)
        when_pieces(victim, 8, lambda: victim.cancel("client hung up"))
        assert victim.wait(60)
        other.result(60)
    assert same_answer(arch, other, answer(arch, prompt, 30))
    assert victim.finish_reason == "cancelled"
    assert victim.cause is lc.Cause.CLIENT
    assert victim.reason == "client hung up"
    assert victim.cancel_latency is not None
    with pytest.raises(lc.DecodeCancelled, match="client hung up") as caught:
        victim.result()
    assert caught.value.cause is lc.Cause.CLIENT
    assert caught.value.latency == victim.cancel_latency
    assert len(victim.tokens) >= 8


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_neighbour_says_what_it_says_alone_when_a_request_is_cancelled_in_its_prompt(arch: str) -> None:
    prompt = ids(60, 1)
    with engine(arch, n_batch=64, n_ubatch=16) as e:
        with Gate(e):
            victim = e.submit(ids(600, 2), max_tokens=5)
            other = e.submit(prompt, max_tokens=30, sampler=greedy(), logprobs=2)
            before_step(e, lambda number, plan: victim.cancel() if number == 3 else None)
        assert victim.wait(60)
        assert 0 < victim.view().prompt_done < 600
        assert victim.tokens == ()
        other.result(60)
    assert same_answer(arch, other, answer(arch, prompt, 30))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_an_active_cancel_leaves_the_queued_request_and_a_queued_cancel_the_active_one(arch: str) -> None:
    first, second = ids(50, 1), ids(70, 2)
    with engine(arch, slots=1) as e:
        with Gate(e, at=2) as gate:
            active = e.submit(first, max_tokens=10, sampler=greedy(), logprobs=2)
            queued = [e.submit(second, max_tokens=10, sampler=greedy(), logprobs=2) for _ in range(2)]
            gate.wait()
            assert queued[0].cancel("hung up in the queue")
            assert queued[0].wait(0), "at once, whatever the engine computes"
            assert queued[0].state == "finished"
            assert e.snapshot().queue[0].id == queued[1].id
        active.result(60)
        queued[1].result(60)
        assert same_answer(arch, active, answer(arch, first, 10))
        assert same_answer(arch, queued[1], answer(arch, second, 10))
        with Gate(e, at=2) as gate:
            active = e.submit(first, max_tokens=10, sampler=greedy())
            waiting = e.submit(second, max_tokens=10, sampler=greedy(), logprobs=2)
            gate.wait()
            assert active.cancel("hung up while active")
        waiting.result(60)
        assert same_answer(arch, waiting, answer(arch, second, 10))
        assert active.finish_reason == "cancelled"
        assert idle_slots(e) == 1


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_in_the_middle_of_the_native_call_frees_the_slot_and_keeps_what_was_computed(arch: str) -> None:
    prompt = ids(900)
    with engine(arch, slots=1, n_batch=1024, n_ubatch=8, step_seconds=None) as e:
        for attempt in range(200):
            cold = ids(900, attempt + 10)
            victim = e.submit(cold, max_tokens=1, timeout=0.001 + 0.0005 * attempt)
            assert victim.wait(60)
            if victim.finish_reason == "deadline" and 0 < victim.view().prompt_done < 900:
                break
        else:
            pytest.fail("no deadline came in the middle of a prompt")
        assert idle_slots(e) == 1
        done = victim.view().prompt_done
        again = e.submit(cold, max_tokens=5, sampler=greedy(), logprobs=2)
        again.result(60)
        assert again.usage.cached_tokens == done
        assert same_answer(arch, again, answer(arch, cold, 5))
        other = e.submit(prompt, max_tokens=5, sampler=greedy(), logprobs=2)
        other.result(60)
        assert same_answer(arch, other, answer(arch, prompt, 5))


def test_a_request_cancelled_before_it_was_submitted_computes_nothing() -> None:
    steps: list[int] = []
    token = lc.CancelToken()
    token.cancel("long ago")
    with engine() as e:
        before_step(e, lambda number, plan: steps.append(number))
        generation = e.submit(ids(10), token=token)
        assert generation.wait(0)
        assert (generation.finish_reason, generation.reason) == ("cancelled", "long ago")
        assert e.submit(ids(10), timeout=0).finish_reason == "deadline"
        assert e.embed(ids(10), timeout=-1).finish_reason == "deadline"
        assert idle_slots(e) == 2
    assert steps == []


def test_one_deadline_covers_queue_prompt_and_generation() -> None:
    with engine(slots=1) as e:
        with Gate(e):
            running = e.submit(ids(5), sampler=endless(), timeout=0.2)
            queued = e.submit(ids(5), timeout=0.05)
            assert queued.wait(60), "in the queue, while the engine computes"
            assert queued.state == "finished"
        assert running.wait(60)
        for generation in (running, queued):
            assert generation.finish_reason == "deadline"
            assert generation.cause is lc.Cause.DEADLINE
            with pytest.raises(lc.DeadlineExceeded):
                generation.result()
            with pytest.raises(TimeoutError):
                list(generation)
        assert idle_slots(e) == 1


def test_a_token_cancels_all_that_it_was_given_to_and_nothing_else() -> None:
    client = lc.CancelToken()
    prompt = ids(20, 5)
    with engine(slots=3) as e:
        with Gate(e) as gate:
            mine = [e.submit(ids(10, i), sampler=endless(), token=client) for i in range(2)]
            other = e.submit(prompt, max_tokens=15, sampler=greedy(), logprobs=2)
            mine += [e.submit(ids(10, 7), token=client)]
            embedding = e.embed(ids(10), token=client)
            gate.wait()
            client.cancel("logged out")
        for each in (*mine, embedding):
            assert each.wait(60)
            assert (each.finish_reason, each.reason) == ("cancelled", "logged out")
        other.result(60)
        assert same_answer("llama", other, answer("llama", prompt, 15))
        assert mine[0].cancel() is False, "it is finished"
        assert not client.child().cancel()


def test_cancelling_one_request_leaves_the_others_of_the_same_token() -> None:
    client = lc.CancelToken()
    with engine() as e:
        a, b = (e.submit(ids(10, i), max_tokens=20, token=client) for i in range(2))
        a.cancel()
        assert a.wait(60)
        assert not client.cancelled
        assert b.result(60).finish_reason in ("length", "stop")


def test_a_cancel_by_id_says_whether_there_was_such_a_request() -> None:
    with engine() as e:
        with Gate(e):
            generation = e.submit(ids(5), request_id="this one")
            assert not e.cancel("that one")
            assert e.cancel("this one", "deleted")
            assert not e.cancel("this one"), "it was cancelled before"
        assert generation.wait(60)
        assert generation.reason == "deleted"
        assert not e.cancel("this one")


def test_a_late_cancel_changes_nothing() -> None:
    with engine() as e:
        generation = e.submit(ids(5), max_tokens=3)
        text = generation.result(60).text
        assert not generation.cancel("too late")
        assert generation.finish_reason in ("length", "stop")
        assert generation.result().text == text
        assert generation.cause is None
        assert generation.cancel_latency is None


def test_leaving_a_with_statement_cancels_what_is_unfinished() -> None:
    with engine() as e:
        with e.submit(ids(5), sampler=endless()) as generation:
            next(generation)
        assert generation.finish_reason == "cancelled"
        assert idle_slots(e) == 2
        with e.submit(ids(5), max_tokens=2) as generation:
            generation.result(60)
        assert generation.finish_reason == "length"


def test_a_long_step_is_stopped_for_a_cancel_and_run_again_without_it() -> None:
    prompt, plans = ids(300, 1), []
    with engine(n_ubatch=8, step_seconds=None) as e:
        e._core.scheduler.pace.row_seconds = 1.0  # every step counts as long
        with Gate(e):
            victim = e.submit(ids(600, 2), max_tokens=1)
            other = e.submit(prompt, max_tokens=3, sampler=greedy(), logprobs=2)

            def look(number: int, plan: Plan) -> None:
                plans.append((plan.abort_when, [(rows.request.id, rows.start) for rows in plan.rows]))
                if number == 0:
                    victim.cancel()

            before_step(e, look)
        other.result(60)
        assert victim.wait(60)
    assert same_answer("llama", other, answer("llama", prompt, 3))
    assert any(abort_when == "any" for abort_when, _ in plans)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_random_cancels_change_no_survivors_answer_and_leave_every_slot_free(arch: str) -> None:
    stem = ids(200, 99)
    prompts = [stem[: 20 * (i % 7)] + ids(5 + 11 * (i % 5), i % 9) for i in range(40)]
    with engine(arch, slots=4, queue_limit=100, n_batch=128, n_ubatch=32) as e:
        generations = []
        for i, prompt in enumerate(prompts):
            generation = e.submit(prompt, max_tokens=4 + i % 13, sampler=greedy(), logprobs=2)
            generations.append(generation)
            if i % 3 == 0:
                when_pieces(generation, i % 5, generation.cancel)
            elif i % 7 == 0:
                threading.Timer(0.003 * i, generation.cancel).start()
        for i, generation in enumerate(generations):
            assert generation.wait(120)
            whole = generation.finish_reason in ("stop", "length")
            assert whole or generation.finish_reason == "cancelled"
            assert same_answer(arch, generation, answer(arch, prompts[i], 4 + i % 13), part=not whole), i
        assert sum(g.finish_reason == "cancelled" for g in generations) >= 8
        assert idle_slots(e) == 4
        assert e.snapshot().active == ()

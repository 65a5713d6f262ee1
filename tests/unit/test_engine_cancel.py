"""A cancel ends its own request, wherever that is, frees the slot, and leaves the neighbours their answers."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.engine.scheduler import Plan
from tests.laws.clock import in_the_middle
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
    stalled,
    together,
)


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
        running = stalled(e, timeout=1)
        queued = e.submit(ids(5), timeout=0.05)
        assert queued.wait(60)
        assert running.wait(60)
        assert queued.view().started_at is None, "it ended in the queue"
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
        with stalled(e) as generation:
            next(generation)
        assert generation.finish_reason == "cancelled"
        assert idle_slots(e) == 2
        with e.submit(ids(5), max_tokens=2) as generation:
            generation.result(60)
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_step_stops_for_a_cancel_and_who_waits_for_the_slot_joins_those_who_stay(arch: str) -> None:
    prompt, plans = ids(300, 1), []
    with engine(arch, slots=2, n_ubatch=8, step_seconds=None) as e:

        def look(number: int, plan: Plan) -> None:
            plans.append([(rows.request.id, rows.start) for rows in plan.rows])
            if number == 0:
                assert victim.cancel()

        before_step(e, look)
        with together(e):
            victim = e.submit(ids(600, 2), max_tokens=1)
            other = e.submit(prompt, max_tokens=3, sampler=greedy(), logprobs=2)
            waiting = e.submit(ids(20, 3), max_tokens=3, sampler=greedy(), logprobs=2)
        for each in (other, waiting):
            each.result(60)
        assert victim.wait(60)
        assert not e._thread.runner.stop.cancelled
    assert same_answer(arch, other, answer(arch, prompt, 3))
    assert same_answer(arch, waiting, answer(arch, ids(20, 3), 3))
    assert victim.finish_reason == "cancelled"
    assert plans[0] == [(victim.id, 0), (other.id, 0)]
    assert sorted(plans[1]) == sorted([(other.id, 0), (waiting.id, 0)]), "it was stopped before its first row"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_what_others_want_of_a_ubatch_is_computed_before_the_step_stops_for_a_cancel(arch: str) -> None:
    prompt, starts = ids(300, 1), []
    with engine(arch, slots=2, n_ubatch=8, step_seconds=None) as e:
        runner = e._thread.runner
        compute = runner._compute

        def look(*args: Any, **how: Any) -> Any:
            flight = e._thread.scheduler.in_flight
            assert flight is not None
            starts.append({rows.request.id: rows.start for rows in flight.plan.rows})
            if len(starts) > 1:
                return compute(*args, **how)
            with in_the_middle(victim.cancel, at=60) as clock:
                try:
                    return compute(*args, **how)
                finally:
                    assert clock.stopped

        runner._compute = look  # type: ignore[method-assign]
        with together(e):
            other = e.submit(prompt, max_tokens=3, sampler=greedy(), logprobs=2, timeout=1000)
            victim = e.submit(ids(40, 2), max_tokens=1, timeout=1000)
        other.result(60)
        assert victim.wait(60)
        assert not runner.stop.cancelled
    assert same_answer(arch, other, answer(arch, prompt, 3))
    assert (victim.finish_reason, victim.tokens) == ("cancelled", ())
    assert starts[0] == {other.id: 0, victim.id: 0}
    assert starts[1].keys() == {other.id}
    assert 0 < starts[1][other.id] <= 8


@pytest.mark.parametrize("patience", [1.0, 0.0])
def test_a_long_ubatch_that_others_want_is_stopped_in_its_middle_while_there_is_patience(patience: float) -> None:
    prompt, stops = ids(300, 1), []
    with engine() as e:

        def look(number: int, plan: Plan) -> None:
            if any(rows.request.id == other.id and rows.count > 1 for rows in plan.rows):
                flight = e._thread.scheduler.in_flight
                assert flight is not None
                flight.pace.row_seconds, flight.pace.patience = 1.0, patience
                victim.cancel()
                stops.append(e._thread.runner.stop)

        with Gate(e, at=3) as gate:
            victim = e.submit(ids(20, 2), sampler=endless())
            gate.wait()
            other = e.submit(prompt, max_tokens=3, sampler=greedy(), logprobs=2)
            before_step(e, look)
        other.result(60)
        assert victim.wait(60)
        assert stops[0].cancelled is (patience > 0)
        assert (e._thread.runner.stop is not stops[0]) is (patience > 0), "the next step listens to another one"
    assert same_answer("llama", other, answer("llama", prompt, 3))
    assert victim.finish_reason == "cancelled"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_who_was_through_before_a_step_was_stopped_has_its_token(arch: str) -> None:
    prompt = ids(12, 1)
    with engine(arch, n_ubatch=8, step_seconds=None) as e:
        runner, steps = e._thread.runner, []
        compute = runner._compute

        def stopping(*args: Any, **how: Any) -> Any:
            steps.append([(rows.request.id, rows.start) for rows in e._thread.scheduler.in_flight.plan.rows])
            if len(steps) > 1:
                return compute(*args, **how)
            result = compute(*args, **how)
            runner.stop.cancel()  # as if it came when only others had rows left
            told = {seq: dataclasses.replace(one, cancelled=True) for seq, one in result.sequences.items()}
            return types.SimpleNamespace(rows_done=result.rows_done, sequences=told)

        runner._compute = stopping  # type: ignore[method-assign]
        other = e.submit(prompt, max_tokens=3, sampler=greedy(), logprobs=2)
        other.result(60)
    assert steps[:2] == [[(other.id, 0)], [(other.id, len(prompt))]]
    assert same_answer(arch, other, answer(arch, prompt, 3))

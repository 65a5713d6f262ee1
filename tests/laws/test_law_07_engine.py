"""Law 7 in an engine: who shares slots, steps and the queue with the cancelled says what it says alone."""

from __future__ import annotations

import threading

import pytest

import llamacancel as lc
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
    when_pieces,
)


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

"""A request goes on from what others that began alike have left in memory, and says what it says alone."""

from __future__ import annotations

import pytest

import llamacancel as lc
from llamacancel.engine.scheduler import Copy
from tests.unit.engines import (
    GENERATIVE,
    WHOLE_ONLY,
    Gate,
    answer,
    before_step,
    endless,
    engine,
    greedy,
    ids,
    same_answer,
)


def run(e: lc.Engine, prompt: list[int], max_tokens: int = 6, **arguments: object) -> lc.Generation:
    generation = e.submit(prompt, max_tokens=max_tokens, sampler=greedy(), logprobs=2, **arguments)  # type: ignore[arg-type]
    generation.result(60)
    return generation


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_same_prompt_again_computes_its_last_token_alone(arch: str) -> None:
    prompt = ids(200)
    with engine(arch) as e:
        first, second, third = (run(e, prompt) for _ in range(3))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == third.usage.cached_tokens == 199
    for generation in (first, second, third):
        assert same_answer(arch, generation, answer(arch, prompt, 6))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_conversation_goes_on_from_where_it_was(arch: str) -> None:
    prompt = ids(120)
    with engine(arch) as e:
        first = run(e, prompt)
        longer = [*prompt, *(token.id for token in first.tokens), *ids(30, 5)]
        second = run(e, longer)
    assert second.usage.cached_tokens >= 125
    assert same_answer(arch, second, answer(arch, longer, 6))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_conversation_that_went_on_differently_begins_at_its_prompt(arch: str) -> None:
    prompt = ids(120)
    longer = [*prompt, *ids(40, 7)]
    with engine(arch) as e:
        run(e, prompt, 20)
        second = run(e, longer)
    assert second.usage.cached_tokens >= 119
    assert same_answer(arch, second, answer(arch, longer, 6))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancelled_prompt_goes_on_where_it_stopped(arch: str) -> None:
    prompt = ids(600)
    with engine(arch, n_batch=64, slots=1) as e:
        with Gate(e):
            victim = e.submit(prompt, max_tokens=5)
            before_step(e, lambda number, plan: victim.cancel() if number == 4 else None)
        assert victim.wait(60)
        done = victim.view().prompt_done
        assert 100 < done < 600
        other = run(e, prompt[:50] + ids(10, 3)) if arch in ("llama", "moe") else None
        retry = run(e, prompt)
    assert retry.usage.cached_tokens == (done if other is None else 50)
    assert same_answer(arch, retry, answer(arch, prompt, 6))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_requests_with_a_common_beginning_share_it_from_the_third_on_at_the_latest(arch: str) -> None:
    stem = ids(200)
    prompts = [stem + ids(30, seed) for seed in (1, 2, 3)]
    with engine(arch, slots=2) as e:
        generations = [run(e, prompt) for prompt in prompts]
    cached = [generation.usage.cached_tokens for generation in generations]
    assert cached == ([0, 0, 200] if arch in WHOLE_ONLY else [0, 200, 200])
    for generation, prompt in zip(generations, prompts, strict=True):
        assert same_answer(arch, generation, answer(arch, prompt, 6))


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("arch", ["llama", "moe"])
def test_a_prefix_is_taken_from_a_request_that_still_runs(arch: str, kv_unified: bool) -> None:
    stem = ids(150)
    with engine(arch, kv_unified=kv_unified) as e:
        with Gate(e, at=6) as gate:
            running = e.submit(stem + ids(20, 1), sampler=endless(), max_tokens=40, logprobs=2)
            gate.wait()
            second = e.submit(stem + ids(20, 2), max_tokens=6, sampler=greedy(), logprobs=2)
        second.result(60)
        running.result(60)
    ended, joined = running.view().finished_at, second.view().started_at
    assert ended is not None
    assert joined is not None
    assert joined < ended
    assert second.usage.cached_tokens == 150
    assert same_answer(arch, second, answer(arch, stem + ids(20, 2), 6))
    assert same_answer(arch, running, _endless_answer(arch, stem + ids(20, 1), 40))


def test_a_copied_prefix_takes_no_cells() -> None:
    stem = ids(200)
    with engine(slots=4, n_ctx=512) as e:
        for seed in range(4):
            run(e, stem + ids(10, seed))
        shot = e.snapshot()
    assert [slot.n_past for slot in shot.slots] == [215] * 4
    assert shot.cells_used == 200 + 4 * 15


def test_a_short_common_beginning_does_not_cost_another_its_long_one() -> None:
    long, short = ids(300), ids(300)[:10] + ids(20, 9)
    with engine(slots=2) as e:
        run(e, long)
        second = run(e, short)
        assert second.usage.cached_tokens == 10
        assert run(e, long).usage.cached_tokens == 299


def test_between_caches_of_their_own_a_short_beginning_is_not_worth_a_copy() -> None:
    long, other = ids(300), ids(300)[:10] + ids(20, 9)
    copies: list[object] = []
    with engine(slots=2, kv_unified=False) as e:
        before_step(e, lambda number, plan: copies.extend(a for a in plan.actions if isinstance(a, Copy)))
        run(e, long)
        second = run(e, other)
        assert second.usage.cached_tokens == 0
        assert same_answer("llama", second, answer("llama", other, 6))
        assert run(e, long).usage.cached_tokens == 299, "nor worth giving up the rest for"
    assert copies == []


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    copies: list[object] = []
    with engine("hybrid", prefix_cache=False) as e:
        before_step(e, lambda number, plan: copies.extend(a for a in plan.actions if isinstance(a, Copy)))
        generations = [run(e, ids(100)) for _ in range(2)]
    assert [generation.usage.cached_tokens for generation in generations] == [0, 0]
    assert copies == []
    assert all(slot.n_past == 0 for slot in e.snapshot().slots)
    assert e._thread.runner.context.closed


@pytest.mark.parametrize("arch", ["llama", "swa", "hybrid"])
def test_idle_sequences_make_room_for_those_that_run(arch: str) -> None:
    prompts = [ids(220, seed) for seed in range(5)]
    with engine(arch, slots=4, n_ctx=512) as e:
        generations = [run(e, prompt, 20) for prompt in prompts]
        shot = e.snapshot()
    for generation, prompt in zip(generations, prompts, strict=True):
        assert same_answer(arch, generation, answer(arch, prompt, 20))
    assert shot.cells is not None
    assert shot.cells_used is not None
    assert shot.cells_used <= shot.cells


@pytest.mark.parametrize("arch", ["llama", "swa", "hybrid"])
def test_running_requests_that_outgrow_the_memory_take_turns_and_say_what_they_say_alone(arch: str) -> None:
    prompts = [ids(60, seed) for seed in range(4)]
    states: list[tuple[str, str]] = []
    with engine(arch, slots=4, n_ctx=256) as e:
        e.add_listener(lambda view: states.append((view.id, view.state)))
        generations = [
            e.submit(prompt, max_tokens=120, sampler=endless(), logprobs=2, request_id=str(i))
            for i, prompt in enumerate(prompts)
        ]
        for i, generation in enumerate(generations):
            generation.result(120)
            assert same_answer(arch, generation, _endless_answer(arch, prompts[i], 120))
    assert len([state for state in states if state[1] == "queued"]) > 4, "somebody went back to the queue"
    assert [state for name, state in states if name == "0"] == ["queued", "prefill", "decode", "finished"]


def _endless_answer(arch: str, prompt: list[int], n: int) -> list[tuple[int, float]]:
    expected = answer(arch, prompt, n)
    assert len(expected) == n, "choose another prompt: this answer ends by itself"
    return expected


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_sequences_with_caches_of_their_own_go_on_in_place(arch: str) -> None:
    prompt = ids(100)
    with engine(arch, kv_unified=False, slots=2) as e:
        first = run(e, prompt)
        longer = [*prompt, *(token.id for token in first.tokens), *ids(5, 5)]
        second = run(e, longer)
        both = [e.submit(ids(60, i), max_tokens=5, sampler=greedy(), logprobs=2) for i in range(2)]
        for i, generation in enumerate(both):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, ids(60, i), 5))
    assert second.usage.cached_tokens >= 105
    assert same_answer(arch, second, answer(arch, longer, 6))

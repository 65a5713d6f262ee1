"""When a step fails, those concerned end with an error, the others go on, and no slot is stuck."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.llama import choose_tokens
from tests.unit.engines import (
    GENERATIVE,
    Gate,
    answer,
    endless,
    engine,
    greedy,
    idle_slots,
    ids,
    model,
    same_answer,
)
from tests.unit.grammars import ambiguous

Decide = Callable[[list[int], int], Exception | None]
"""Of the sequences in a batch and the number of the call: what the call raises, if it fails."""


@pytest.fixture(name="failing")
def _failing() -> Callable[..., lc.Engine]:
    """Makes an engine whose native calls fail as `decide` says, before anything is done."""

    def make(arch: str, decide: Decide, **params: Any) -> lc.Engine:
        e = engine(arch, **params)
        numbers = itertools.count()
        for computing in (e._thread.runner, e._thread.embedder):
            _fail(computing, decide, numbers)
        return e

    return make


def _fail(computing: Any, decide: Decide, numbers: Iterator[int]) -> None:
    compute = computing._compute

    def failing(context: lc.Context, batch: lc.Batch, tokens: Any, **how: Any) -> lc.DecodeResult:
        seqs = sorted({seq for row in range(len(batch)) for seq in batch.seq_ids(row)})
        error = decide(seqs, next(numbers))
        if error is not None:
            raise error
        return compute(context, batch, tokens, **how)

    computing._compute = failing


def failed(text: str = "llama.cpp returned -3") -> lc.DecodeFailedError:
    return lc.DecodeFailedError(text)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_request_with_which_every_step_fails_ends_alone(arch: str, failing: Callable[..., lc.Engine]) -> None:
    prompts = [ids(40, seed) for seed in range(3)]
    with failing(arch, lambda seqs, number: failed() if 1 in seqs else None, slots=3) as e:
        with Gate(e):
            generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        with pytest.raises(lc.DecodeFailedError, match="-3"):
            generations[1].result(60)
        for i in (0, 2):
            generations[i].result(60)
            assert same_answer(arch, generations[i], answer(arch, prompts[i], 8))
        assert generations[1].finish_reason == "error"
        assert generations[1].cause is None
        assert idle_slots(e) == 3


def test_an_engine_whose_model_has_lost_its_server_fails_as_a_whole_and_says_why(
    failing: Callable[..., lc.Engine],
) -> None:
    lost = failed("the connection to the RPC server 127.0.0.1:50052 was lost: close it")
    with failing("llama", lambda seqs, number: lost if number == 4 else None, slots=2) as e:
        with Gate(e):
            generations = [e.submit(ids(40, seed), max_tokens=8, sampler=greedy()) for seed in range(3)]
        for generation in generations:
            with pytest.raises(lc.ClosedError, match=r"the engine failed: .*50052 was lost"):
                generation.result(60)
        with pytest.raises(lc.ClosedError, match="50052 was lost"):
            e.submit(ids(4))


def test_an_engine_fails_as_a_whole_when_a_text_to_embed_finds_that_the_server_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*args: Any) -> lc.DecodeResult:
        raise failed("the connection to the RPC server 127.0.0.1:50052 was lost: close it")

    with engine(slots=2) as e:
        monkeypatch.setattr(e._thread.embedder, "_compute", lost)
        generation = e.submit(ids(40), sampler=endless())
        next(generation)
        for each in (*(e.embed(ids(5)) for _ in range(2)), generation):
            with pytest.raises(lc.ClosedError, match=r"the engine failed: .*50052 was lost"):
                each.result(60)
        with pytest.raises(lc.ClosedError, match="50052 was lost"):
            e.embed(ids(4))


def test_a_step_that_fails_once_is_done_again(failing: Callable[..., lc.Engine]) -> None:
    prompts = [ids(40, seed) for seed in range(3)]
    with failing("llama", lambda seqs, number: failed() if number == 4 else None, slots=3) as e:
        with Gate(e):
            generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            generation.result(60)
            assert same_answer("llama", generation, answer("llama", prompt, 8))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_context_that_broke_is_replaced_and_the_requests_begin_again(
    arch: str, failing: Callable[..., lc.Engine]
) -> None:
    unusable = "the context is unusable since an assertion failed in it: GGML_ASSERT"
    broken: list[int] = []

    def decide(seqs: list[int], number: int) -> Exception | None:
        if number in (6, 9):
            broken.append(number)
            return failed(unusable)
        return None

    prompts = [ids(40, seed) for seed in range(4)]
    with failing(arch, decide, slots=2) as e:
        before = e._thread.runner.context
        generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, prompt, 8))
        assert before.closed
        assert not e._thread.runner.context.closed
    assert broken == [6, 9]


def test_the_one_that_breaks_the_context_ends_and_the_others_go_on(failing: Callable[..., lc.Engine]) -> None:
    state = {"broken": False}

    def decide(seqs: list[int], number: int) -> Exception | None:
        if state["broken"]:
            state["broken"] = False  # the next context is whole
            return failed("the context is unusable since an assertion failed in it: it broke")
        if 0 in seqs:
            state["broken"] = True
            return failed("it broke")
        return None

    prompts = [ids(40, seed) for seed in range(3)]
    with failing("llama", decide, slots=3) as e:
        with Gate(e):
            generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        with pytest.raises(lc.DecodeFailedError, match="it broke"):
            generations[0].result(60)
        for i in (1, 2):
            generations[i].result(60)
            assert same_answer("llama", generations[i], answer("llama", prompts[i], 8))


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_memory_that_is_full_when_it_should_not_be_takes_fewer_at_a_time(
    arch: str, failing: Callable[..., lc.Engine]
) -> None:
    prompts = [ids(40, seed) for seed in range(4)]
    full = lc.MemoryFullError("no room")
    with failing(arch, lambda seqs, number: full if len(seqs) > 1 else None, slots=3) as e:
        generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, prompt, 8))


def test_a_request_for_which_there_is_no_room_ends_with_an_error(failing: Callable[..., lc.Engine]) -> None:
    with failing("llama", lambda seqs, number: lc.MemoryFullError("no room") if number < 1 else None, slots=1) as e:
        with Gate(e):
            generations = [e.submit(ids(40, seed), max_tokens=3) for seed in range(2)]
        with pytest.raises(lc.MemoryFullError):
            generations[0].result(60)
        assert len(generations[1].result(60).tokens) == 3


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_dirty_sequence_is_computed_again(arch: str, failing: Callable[..., lc.Engine]) -> None:
    dirty = lc.DirtySequenceError("sequence 0 could not be repaired", [0])
    prompts = [ids(40, seed) for seed in range(2)]
    with failing(arch, lambda seqs, number: dirty if number == 5 else None, slots=2) as e:
        with Gate(e):
            generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]
        for prompt, generation in zip(prompts, generations, strict=True):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, prompt, 8))


def test_a_failed_batch_of_embeddings_is_done_again_one_by_one(failing: Callable[..., lc.Engine]) -> None:
    batches: list[list[int]] = []

    def decide(seqs: list[int], number: int) -> Exception | None:
        batches.append(seqs)
        return failed() if number in (1, 2) else None

    with failing("llama", decide, slots=3) as e:
        with Gate(e, texts=True) as gate:
            first = e.embed(ids(3))
            gate.wait()
            embeddings = [e.embed(ids(n)) for n in (5, 7)]
        first.result(60)
        with pytest.raises(lc.DecodeFailedError):
            embeddings[0].result(60)
        assert embeddings[1].result(60).shape == (model("llama").n_embd,)
    assert batches == [[0], [0, 1], [0], [0]]


# ---- when the engine itself fails --------------------------------------------------------------------------------


def test_an_unexpected_error_with_every_step_ends_each_request_with_it_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine(slots=2) as e:
        with monkeypatch.context() as patch:
            patch.setattr(e._thread.runner, "run", lambda plan: 1 / 0)
            patch.setattr(e._thread.embedder, "_run", lambda texts, stop: 1 / 0)
            requests = [*(e.submit(ids(5, seed), max_tokens=100) for seed in range(3)), e.embed(ids(5))]
            for request in requests:
                with pytest.raises(ZeroDivisionError):
                    request.result(60)
                assert request.finish_reason == "error"
        generation = e.submit(ids(5), max_tokens=4, sampler=greedy(), logprobs=2)
        generation.result(60)
        assert same_answer("llama", generation, answer("llama", ids(5), 4))


def test_a_context_that_cannot_be_made_again_ends_the_engine_with_that_error(failing: Callable[..., lc.Engine]) -> None:
    submitted = threading.Event()
    e = failing(
        "llama",
        lambda seqs, number: failed("the context is unusable") if number == 2 and submitted.wait(60) else None,
    )

    def no_context(token: lc.CancelToken | None) -> lc.Context:
        raise lc.ContextError("no memory left on this machine")

    e._thread.runner._make_context = no_context
    requests = [e.submit(ids(5, seed), max_tokens=20) for seed in range(3)]
    submitted.set()
    for request in requests:
        with pytest.raises(lc.ClosedError, match="no memory left on this machine"):
            request.result(60)
        assert request.finish_reason == "error"
    with pytest.raises(lc.ClosedError, match="no memory left"):
        e.submit(ids(5))
    with pytest.raises(lc.ClosedError, match="failed"):
        e.__enter__()
    assert e.closed
    e.close()
    assert e._thread.stopped
    assert e._thread.runner.context.closed


def test_a_cancel_beside_a_failing_step_still_ends_as_a_cancel(failing: Callable[..., lc.Engine]) -> None:
    cancelled = threading.Event()
    held: list[lc.Generation] = []

    def decide(seqs: list[int], number: int) -> Exception | None:
        if number == 0:
            held[0].cancel("hung up")
            cancelled.set()
            return failed()
        return None

    with failing("llama", decide, slots=2) as e:
        with Gate(e):
            held.append(e.submit(ids(20), max_tokens=4))
            other = e.submit(ids(20, 1), max_tokens=4, sampler=greedy(), logprobs=2)
        other.result(60)
        assert held[0].wait(60)
    assert cancelled.is_set()
    assert held[0].finish_reason == "cancelled"
    assert same_answer("llama", other, answer("llama", ids(20, 1), 4))


def test_a_request_whose_grammar_becomes_too_ambiguous_ends_alone() -> None:
    prompts = [ids(40, seed) for seed in range(3)]
    grammar = 'root ::= "y" a0\n' + ambiguous(10).partition("\n")[2]
    samplers = [greedy(), lc.Sampler(grammar=grammar, temperature=0), greedy()]
    with engine("llama", slots=3) as e:
        with Gate(e):
            generations = [
                e.submit(each, max_tokens=8, sampler=sampler, logprobs=2)
                for each, sampler in zip(prompts, samplers, strict=True)
            ]
        with pytest.raises(ValueError, match="too ambiguous"):
            generations[1].result(60)
        for i in (0, 2):
            generations[i].result(60)
            assert same_answer("llama", generations[i], answer("llama", prompts[i], 8))
        assert generations[1].finish_reason == "error"
        assert idle_slots(e) == 3


def test_a_request_cancelled_while_its_token_is_chosen_ends_as_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ids(40, seed) for seed in range(2)]
    with engine("llama", slots=2) as e:
        with Gate(e):
            generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts]

            def cancelled_meanwhile(*args: Any) -> list[int | Exception]:
                generations[1].cancel("changed my mind")
                return choose_tokens(*args)

            monkeypatch.setattr("llamacancel.engine.runner.choose_tokens", cancelled_meanwhile)
        with pytest.raises(lc.DecodeCancelled, match="changed my mind"):
            generations[1].result(60)
        generations[0].result(60)
        assert same_answer("llama", generations[0], answer("llama", prompts[0], 8))
        assert generations[1].finish_reason == "cancelled"
        assert not generations[1].tokens
        assert idle_slots(e) == 2


def test_a_long_prompt_is_tokenized_under_the_requests_token() -> None:
    token = lc.CancelToken()
    token.cancel("gone")
    with engine("llama", slots=1) as e:
        with pytest.raises(lc.DecodeCancelled, match="gone"):
            e.submit("word " * 2000, token=token)
        with pytest.raises(lc.DeadlineExceeded):
            e.submit("word " * 1_000_000, timeout=1e-3)
        assert idle_slots(e) == 1

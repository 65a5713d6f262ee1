"""The engine: submits, results, texts, limits."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.unit.engines import (
    EXACT,
    GENERATIVE,
    Gate,
    answer,
    before_step,
    endless,
    engine,
    greedy,
    idle_slots,
    ids,
    model,
    same_answer,
)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_generation_says_what_the_model_alone_says(arch: str) -> None:
    prompt = ids(100)
    with engine(arch) as e:
        generation = e.submit(prompt, max_tokens=12, sampler=greedy(), logprobs=2)
        result = generation.result(60)
    assert same_answer(arch, generation, answer(arch, prompt, 12))
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == 100
    assert result.usage.completion_tokens == 12
    assert len(result.tokens) == 12


@pytest.mark.parametrize("arch", GENERATIVE)
def test_requests_that_share_steps_say_what_each_says_alone(arch: str) -> None:
    prompts = [ids(n, seed) for seed, n in enumerate((5, 90, 33, 150, 1, 60, 200, 17))]
    with engine(arch, slots=3, n_batch=64) as e:
        generations = [
            e.submit(each, max_tokens=10 + i, sampler=greedy(), logprobs=2) for i, each in enumerate(prompts)
        ]
        for i, generation in enumerate(generations):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, prompts[i], 10 + i))
        assert idle_slots(e) == 3


def test_pieces_come_one_by_one_and_make_up_the_text() -> None:
    with engine() as e:
        generation = e.submit(ids(20), max_tokens=15, sampler=greedy())
        pieces = list(generation)
        assert "".join(pieces) == generation.text == generation.result().text
        assert [token for piece in pieces for token in piece.tokens] == list(generation.tokens)
        assert all(isinstance(piece, lc.Piece) for piece in pieces)
        assert len(pieces) > 5
        assert list(generation) == [], "all was read"
        assert generation.finished
        assert generation.poll() is None


def test_the_text_is_what_the_tokens_spell() -> None:
    with engine() as e:
        result = e.submit("Wer A sagt, muss auch B sagen.", max_tokens=60, sampler=lc.Sampler(seed=3)).result(60)
    spelled = b"".join(token.piece for token in result.tokens if not model("llama").is_control(token.id))
    assert result.text == spelled.decode("utf-8", "replace")


def test_a_text_and_its_tokens_are_the_same_prompt() -> None:
    text = "Alles neu macht der Mai"
    with engine() as e:
        results = [
            e.submit(prompt, max_tokens=8, sampler=greedy()).result(60)
            for prompt in (text, model("llama").tokenize(text), model("llama").tokenize(text).tolist())
        ]
    assert results[0].text == results[1].text == results[2].text


def test_a_generation_moves_through_its_states_in_order() -> None:
    seen: list[tuple[str, str]] = []
    with engine(slots=1) as e:
        listening = e.add_listener(lambda view: seen.append((view.id, view.state)))
        held = [e.submit(ids(5), max_tokens=2, request_id=name) for name in ("a", "b")]
        e.close()
        assert all(generation.ended for generation in held)
        assert listening.remove()
        assert not listening.remove()
    assert [state for name, state in seen if name == "a"] == ["queued", "prefill", "decode", "finished"]
    assert [state for name, state in seen if name == "b"] == ["queued", "prefill", "decode", "finished"]
    assert seen.index(("a", "finished")) < seen.index(("b", "prefill"))


def test_the_snapshot_shows_slots_queue_and_the_last_requests() -> None:
    with engine(slots=1, history=2) as e:
        for name in ("x", "y", "z"):
            e.submit(ids(3), max_tokens=1, request_id=name).result(60)
        with Gate(e, at=1) as gate:  # the prompt is computed, the first token chosen
            running = e.submit(ids(7), max_tokens=3, request_id="a")
            gate.wait()
            queued = e.submit(ids(4), max_tokens=1, request_id="b", priority=2)
            shot = e.snapshot()
            (slot,) = shot.slots
            assert (slot.state, slot.request_id, slot.n_past) == ("decode", "a", 7)
            (active,) = shot.active
            assert (active.id, active.state, active.prompt_tokens, active.prompt_done) == ("a", "decode", 7, 7)
            assert (active.completion_tokens, active.slot) == (1, 0)
            assert active.first_token_at is not None
            (waiting,) = shot.queue
            assert (waiting.id, waiting.state, waiting.priority, waiting.slot) == ("b", "queued", 2, None)
            assert waiting.started_at is None
            assert [(view.id, view.slot) for view in shot.recent] == [("y", 0), ("z", 0)]
            assert not shot.closing
        queued.result(60)
        running.result(60)
    assert e.snapshot().closing


def test_stop_strings_end_the_text_before_them_wherever_tokens_end() -> None:
    prompt = ids(30)
    with engine() as e:
        full = e.submit(prompt, max_tokens=40, sampler=greedy()).result(60)
        text = full.text
        for start, length in ((3, 1), (10, 7), (17, 12)):
            stop = text[start : start + length]
            cut = text[: text.index(stop)]
            generation = e.submit(prompt, max_tokens=40, sampler=greedy(), stop=["never there", stop])
            pieces = list(generation)
            result = generation.result()
            assert "".join(pieces) == result.text == cut
            assert (result.finish_reason, result.stop_sequence) == ("stop", stop)
            assert [t.id for t in result.tokens] == [t.id for t in full.tokens[: len(result.tokens)]]
            assert result.usage.completion_tokens < 40
        miss = e.submit(prompt, max_tokens=40, sampler=greedy(), stop=text + "?").result(60)
        assert (miss.text, miss.finish_reason, miss.stop_sequence) == (text, "length", None)


def test_stop_tokens_end_the_text_and_are_not_in_it() -> None:
    prompt = ids(30)
    with engine() as e:
        full = e.submit(prompt, max_tokens=10, sampler=greedy()).result(60)
        stop = full.tokens[6].id
        first = next(i for i, token in enumerate(full.tokens) if token.id == stop)
        result = e.submit(prompt, max_tokens=10, sampler=greedy(), stop_tokens=[stop]).result(60)
    assert result.finish_reason == "stop"
    assert result.stop_sequence is None
    assert result.tokens == full.tokens[:first]


def test_the_end_of_text_token_ends_it() -> None:
    eos = model("llama").eos
    assert eos is not None
    with engine() as e:
        result = e.submit(ids(5), sampler=lc.Sampler(temperature=0, logit_bias={eos: 1000.0})).result(60)
    assert (result.text, result.tokens, result.finish_reason) == ("", (), "stop")
    assert result.usage.completion_tokens == 1


def test_a_full_context_ends_it() -> None:
    with engine(n_ctx=256, slots=1) as e:
        result = e.submit(ids(200), sampler=endless()).result(60)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens + result.usage.completion_tokens == 256


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_by_default_there_is_room_for_a_long_request_in_each_slot(arch: str) -> None:
    each = min(model(arch).n_ctx_train, 4096)
    with lc.Engine(model(arch), slots=3, n_threads=1) as e:
        assert e.snapshot().cells == (None if arch == "llama" else 3 * each)
        assert e.n_ctx == (each if arch == "llama" else model(arch).n_ctx_train)
        with pytest.raises(lc.InvalidBatchError, match=f"has room for {e.n_ctx}"):
            e.submit([400] * e.n_ctx)


def test_logprobs_are_those_of_the_model_whatever_the_sampler_does() -> None:
    prompt = ids(40)
    with engine() as e:
        plain = e.submit(prompt, max_tokens=5, sampler=greedy(), logprobs=20).result(60)
        biased = e.submit(prompt, max_tokens=1, sampler=lc.Sampler(temperature=0, logit_bias={77: 1000.0}), logprobs=0)
        (forced,) = biased.result(60).tokens
        assert e.submit(prompt, max_tokens=1, sampler=greedy()).result(60).tokens[0].logprob is None
    with model("llama").context(n_ctx=256, n_threads=1, type_k="f32", type_v="f32", flash_attn=False) as context:
        batch = lc.Batch(40)
        batch.add_sequence(prompt)
        context.decode(batch)
        logits = context.logits().astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    first = plain.tokens[0]
    assert first.logprob == pytest.approx(expected[first.id], abs=1e-3)
    assert [i for i, _, _ in first.top] == np.argsort(-expected, kind="stable")[:20].tolist()
    assert first.top[0][0] == first.id
    assert first.top[0][1] == first.piece
    assert forced.id == 77
    assert forced.logprob == pytest.approx(expected[77], abs=1e-3)
    assert forced.top == ()


def test_a_sampler_is_cloned_so_that_each_generation_begins_where_it_stood() -> None:
    sampler = lc.Sampler(temperature=1.5, seed=11)
    with engine() as e:
        texts = {e.submit(ids(10), max_tokens=20, sampler=sampler).result(60).text for _ in range(3)}
        both = [e.submit(ids(10), max_tokens=20, sampler=sampler) for _ in range(2)]
        texts |= {generation.result(60).text for generation in both}
    assert len(texts) == 1


def test_a_grammar_that_leaves_no_token_ends_its_generation_alone() -> None:
    bad = lc.Sampler(
        temperature=0, grammar='root ::= "a"', logit_bias={i: float("-inf") for i in range(model("llama").n_vocab)}
    )
    prompt = ids(30, 4)
    with engine() as e:
        other = e.submit(prompt, max_tokens=20, sampler=greedy(), logprobs=2)
        generation = e.submit(ids(9), max_tokens=5, sampler=bad)
        with pytest.raises(ValueError, match="left to choose"):
            generation.result(60)
        assert generation.finish_reason == "error"
        assert isinstance(generation.error, ValueError)
        other.result(60)
    assert same_answer("llama", other, answer("llama", prompt, 20))


def test_a_grammar_is_parsed_by_whoever_submits_it_and_not_by_the_engine() -> None:
    with engine() as e, Gate(e) as gate:
        generation = e.submit(ids(5), max_tokens=1)
        gate.wait()
        with pytest.raises(ValueError, match="nowhere"):
            e.submit(ids(5), sampler=lc.Sampler(grammar="root ::= nowhere"))
        gate.open()
        assert generation.result(60).finish_reason == "length"


def test_a_grammar_shapes_the_text() -> None:
    with engine() as e:
        result = e.submit(ids(9), max_tokens=30, sampler=lc.Sampler(seed=1, grammar='root ::= "yes" | "no"')).result(60)
    assert result.text in ("yes", "no")
    assert result.finish_reason == "stop"


# ---- limits ------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room() -> None:
    with engine(slots=1, queue_limit=2) as e:
        with Gate(e) as gate:
            first = e.submit(ids(3), max_tokens=1)
            gate.wait()
            waiting = [e.submit(ids(3), max_tokens=1) for _ in range(2)]
            with pytest.raises(lc.QueueFullError, match="queue_limit is 2"):
                e.submit(ids(3))
            waiting[0].cancel()
            assert waiting[0].wait(60)
            again = e.submit(ids(3), max_tokens=1)
        for each in (first, waiting[1], again):
            each.result(60)


def test_a_queue_of_none_takes_what_can_start_at_once() -> None:
    with engine(slots=2, queue_limit=0) as e:
        with Gate(e):
            running = [e.submit(ids(3), max_tokens=1) for _ in range(2)]
            with pytest.raises(lc.QueueFullError):
                e.submit(ids(3))
        for each in running:
            each.result(60)
        e.submit(ids(3), max_tokens=1).result(60)


def test_higher_priority_goes_first_and_equals_in_order() -> None:
    order: list[str] = []
    with engine(slots=1, aging=1e6) as e:
        e.add_listener(lambda view: order.append(view.id) if view.state == "prefill" else None)
        with Gate(e) as gate:
            held = [e.submit(ids(2), max_tokens=1, request_id="first")]
            gate.wait()
            for name, priority in (("low", -1), ("a", 0), ("high", 5), ("b", 0)):
                held.append(e.submit(ids(2), max_tokens=1, priority=priority, request_id=name))
    assert order == ["first", "high", "a", "b", "low"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": []}, lc.InvalidBatchError),
        ({"prompt": [1, 2, 10**7]}, lc.InvalidBatchError),
        ({"prompt": [-1]}, lc.InvalidBatchError),
        ({"prompt": list(range(2000))}, lc.InvalidBatchError),
        ({"prompt": [1.5]}, TypeError),
        ({"prompt": [[1]]}, TypeError),
        ({"prompt": [1], "max_tokens": 0}, ValueError),
        ({"prompt": [1], "max_tokens": "5"}, TypeError),
        ({"prompt": [1], "stop": ["a", ""]}, ValueError),
        ({"prompt": [1], "stop": [1]}, TypeError),
        ({"prompt": [1], "stop_tokens": ["a"]}, TypeError),
        ({"prompt": [1], "logprobs": 21}, ValueError),
        ({"prompt": [1], "sampler": "greedy"}, TypeError),
        ({"prompt": [1], "priority": 0.5}, TypeError),
        ({"prompt": [1], "timeout": "1"}, TypeError),
        ({"prompt": [1], "timeout": float("nan")}, ValueError),
        ({"prompt": [1], "token": 1}, TypeError),
        ({"prompt": [1], "request_id": ""}, TypeError),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_submitted(
    arguments: dict[str, object], error: type[Exception]
) -> None:
    steps = []
    with engine() as e:
        before_step(e, lambda number, plan: steps.append(number))
        with pytest.raises(error):
            e.submit(**arguments)  # type: ignore[arg-type]
    assert steps == []
    assert e.snapshot().recent == ()


@pytest.mark.parametrize(
    "parameters",
    [{"slots": 0}, {"queue_limit": -1}, {"step_seconds": 0}, {"aging": 0}, {"n_ctx": "many"}, {"no_such": 1}],
    ids=str,
)
def test_an_engine_that_cannot_be_is_refused(parameters: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        engine(**parameters)


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_batch_smaller_than_the_number_of_sequences_is_made_large_enough(arch: str) -> None:
    with engine(arch, slots=3, n_batch=1) as e:
        generations = [e.submit(ids(20, i), max_tokens=4, sampler=greedy(), logprobs=2) for i in range(4)]
        for i, generation in enumerate(generations):
            generation.result(60)
            assert same_answer(arch, generation, answer(arch, ids(20, i), 4))


def test_two_unfinished_requests_do_not_share_a_name() -> None:
    with engine() as e:
        with Gate(e):
            first = e.submit(ids(3), max_tokens=1, request_id="name")
            with pytest.raises(ValueError, match="name"):
                e.submit(ids(3), request_id="name")
        first.result(60)
        e.submit(ids(3), max_tokens=1, request_id="name").result(60)


def test_a_result_that_is_late_leaves_the_generation_going() -> None:
    with engine() as e:
        with Gate(e):
            generation = e.submit(ids(3), max_tokens=4)
            with pytest.raises(TimeoutError):
                generation.result(timeout=0)
            assert not generation.wait(0)
        assert len(generation.result(60).tokens) == 4


def test_many_threads_submit_and_read_at_the_same_time() -> None:
    problems: list[object] = []
    with engine(slots=3) as e:

        def client(seed: int) -> None:
            for round in range(4):
                prompt = ids(10 + seed, seed * 10 + round)
                generation = e.submit(prompt, max_tokens=6, sampler=greedy(), logprobs=2)
                "".join(generation)
                if not same_answer("llama", generation, answer("llama", prompt, 6)):
                    problems.append((seed, round))

        for seed in range(6):
            for round in range(4):
                answer("llama", ids(10 + seed, seed * 10 + round), 6)
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert problems == []


def test_a_listener_that_raises_is_reported_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []

    def report(info: sys.UnraisableHookArgs) -> None:
        reported.append(info.exc_value)
        sys.__unraisablehook__(info)

    monkeypatch.setattr("sys.unraisablehook", report)
    with engine() as e:
        e.add_listener(lambda view: 1 / 0)
        e.submit(ids(3), max_tokens=2).result(60)
    assert len(reported) == 4
    assert all(isinstance(error, ZeroDivisionError) for error in reported)


# ---- embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*GENERATIVE, "embedding"])
def test_embeddings_are_those_that_each_text_has_alone(arch: str) -> None:
    texts = [ids(n, n) for n in (3, 30, 12, 1, 50)]
    pooling = None if arch == "embedding" else "mean"
    with model(arch).context(**EXACT, embeddings=True, pooling=pooling) as context:
        expected = []
        for text in texts:
            batch = lc.Batch(64)
            batch.add_sequence(text, logits="all")
            context.decode(batch)
            expected.append(context.pooled_embeddings(0))
            if arch != "embedding":
                context.memory.clear()
    with engine(arch, slots=3, n_batch=96) as e:
        embeddings = [e.embed(text) for text in texts]
        for embedding, vector in zip(embeddings, expected, strict=True):
            assert np.allclose(embedding.result(60), vector, atol=1e-2)
            assert embedding.finish_reason == "stop"
        assert embeddings[1].usage.prompt_tokens == 30


def test_generations_go_on_while_texts_are_embedded_and_texts_while_a_step_is_computed() -> None:
    with engine(slots=2) as e:
        with Gate(e, texts=True) as texts_gate:
            embedding = e.embed(ids(1000))
            texts_gate.wait()
            generation = e.submit(ids(20), max_tokens=12, sampler=greedy(), logprobs=2)
            generation.result(60)
            assert not embedding.wait(0)
            assert [view.id for view in e.snapshot().active] == [embedding.id]
        assert embedding.result(60).shape
        done = threading.Event()
        embedder = e._thread.embedder
        compute = embedder._compute

        def computed(*args: Any) -> Any:
            result = compute(*args)
            done.set()
            return result

        embedder._compute = computed  # type: ignore[method-assign]
        with Gate(e) as gate, Gate(e, texts=True) as texts_gate:
            embedding = e.embed(ids(1000))
            texts_gate.wait()
            generation_2 = e.submit(ids(20), max_tokens=12, sampler=greedy(), logprobs=2)
            gate.wait()
            texts_gate.open()
            assert done.wait(60)
        assert embedding.result(60).shape
        generation_2.result(60)
        snapshot = e.snapshot()
        assert 0 < snapshot.decode_seconds <= snapshot.run_seconds
    for each in (generation, generation_2):
        assert same_answer("llama", each, answer("llama", ids(20), 12))


def test_a_text_too_long_to_embed_is_refused() -> None:
    with engine(n_batch=64) as e, pytest.raises(lc.InvalidBatchError, match="64"):
        e.embed(ids(65))


def test_an_encoder_embeds_and_does_not_generate() -> None:
    with engine("embedding") as e:
        with pytest.raises(ValueError, match="does not generate"):
            e.submit(ids(3))
        assert e.embed(ids(3)).result(60).shape == (model("embedding").n_embd,)
        assert e.embed("some text").result(60).dtype == np.float32


def test_a_queued_embedding_is_cancelled_in_the_queue() -> None:
    with engine(slots=1) as e:
        with Gate(e, texts=True) as gate:
            first = e.embed(ids(5))
            gate.wait()
            second = e.embed(ids(5))
            assert e.cancel(second.id, "not needed")
            assert second.wait(60), "whatever is being embedded"
        first.result(60)
    assert (second.finish_reason, second.reason) == ("cancelled", "not needed")
    with pytest.raises(lc.DecodeCancelled, match="not needed"):
        second.result()

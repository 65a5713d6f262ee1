"""Whatever fails in a request's own work ends that request at most."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.engine.embedder import Embedder
from llamacancel.engine.generation import EmbeddingWork, GenerationWork
from llamacancel.engine.runner import Runner, _StepBatch
from tests.unit.engines import Gate, answer, engine, greedy, idle_slots, ids, same_answer


def methods(of: type) -> list[str]:
    return sorted(name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("__"))


# At the end; what is done when something else has failed; what hands a batch over.
NOT_A_STEPS = {"close", "upset", "_renew"}
NOT_A_BATCHS = {"begin", "close", "_main", "_drop"}
RUNNERS = methods(Runner)
EMBEDDERS = [f"embedder.{name}" for name in methods(Embedder) if name not in NOT_A_BATCHS]
OTHERS = [
    "batch.add_single_rows", "batch.add_sequence", "batch.clear", "memory.remove", "memory.copy", "memory.pos_max",
    "context.decode", "work.take", "work.token_until", "assembler.feed", "vocabulary", "choose_tokens",
    *EMBEDDERS, "embedder._make", "embedder.batch.add_sequence", "embedder.batch.clear", "embedder.context.decode",
    "embedder.context.pooled_embeddings", "embedder.context.memory.clear", "work.finish_text",
]  # fmt: skip


RARE = {"_failed", "_lose", "_cancelled"}  # called when something else has failed


class Once:
    """Fails the `at`th call of what it stands for, from when it is armed."""

    def __init__(self, fn: Callable[..., Any], error: BaseException, at: int) -> None:
        self.fn, self.error, self.left, self.armed, self.failed = fn, error, at, False, False

    def __call__(self, *args: Any, **how: Any) -> Any:
        if self.armed and not self.failed:
            self.left -= 1
            if self.left <= 0:
                self.failed = True
                raise self.error
        return self.fn(*args, **how)


class Stand:
    """An object of which one attribute is another."""

    def __init__(self, of: Any, **others: Any) -> None:
        self._of = of
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def test_the_list_is_whole() -> None:
    """Each method is failed, but those that are not part of a step or of a batch of texts, or that clean up."""
    assert set(RUNNERS) > NOT_A_STEPS
    assert set(methods(Embedder)) > NOT_A_BATCHS
    adds = {name for name, fn in inspect.getmembers(_StepBatch, inspect.isfunction) if name.startswith("add_")}
    assert {f"batch.{name}" for name in adds} <= set(OTHERS)


def put(e: lc.Engine, name: str, error: BaseException, at: int, patch: pytest.MonkeyPatch) -> Once:
    """Stands a `Once` in the place of a callable."""
    runner = e._thread.runner
    if name in RUNNERS:
        once = Once(getattr(runner, name), error, at)
        patch.setattr(runner, name, once)
    elif name == "choose_tokens":
        import llamacancel.engine.runner as module

        once = Once(module.choose_tokens, error, at)
        patch.setattr(module, "choose_tokens", once)
    elif name.startswith("batch."):
        once = Once(getattr(runner._batch, name[6:]), error, at)
        patch.setattr(runner, "_batch", Stand(runner._batch, **{name[6:]: once}))
        runner._compute = _unwrapped(runner._compute)  # type: ignore[method-assign]
    elif name.startswith("memory."):
        once = Once(getattr(runner._memory, name[7:]), error, at)
        patch.setattr(runner, "_memory", Stand(runner._memory, **{name[7:]: once}))
    elif name == "context.decode":
        once = Once(runner._compute, error, at)
        patch.setattr(runner, "_compute", once)
    elif name.startswith("embedder."):
        once = put_into_embedder(e._thread.embedder, name.partition(".")[2], error, at, patch)
    elif name == "vocabulary":
        once = Once(e._vocabulary.__class__.__getitem__, error, at)
        patch.setattr(e._vocabulary.__class__, "__getitem__", lambda self, token: once(self, token))
    elif name == "assembler.feed":
        from llamacancel.engine.text import TextAssembler

        once = Once(TextAssembler.feed, error, at)
        patch.setattr(TextAssembler, "feed", lambda *args: once(*args))
    elif name == "work.finish_text":
        from llamacancel.engine.text import TextAssembler

        once = Once(TextAssembler.finish, error, 1)
        patch.setattr(TextAssembler, "finish", lambda *args: once(*args))
    else:
        kind = GenerationWork if name == "work.take" else EmbeddingWork.__mro__[1]
        once = Once(getattr(kind, name[5:]), error, at)
        patch.setattr(kind, name[5:], lambda *args: once(*args))
    return once


def put_into_embedder(embedder: Embedder, name: str, error: BaseException, at: int, patch: pytest.MonkeyPatch) -> Once:
    of, _, method = name.rpartition(".")
    at = 2 if at > 1 else 1
    if not of:
        once = Once(getattr(embedder, name), error, at)
        patch.setattr(embedder, name, once)
        return once
    once = Once(lambda: None, error, at)

    def stand(what: Any) -> Any:
        once.fn = getattr(what, method)
        return Stand(what, **{method: once})

    if of == "batch":
        fill = embedder._fill
        embedder._batch = stand(lc.Batch(2048))
        patch.setattr(embedder, "_fill", lambda *args: fill(*args)._of)
    else:
        make = embedder._make

        def made(token: lc.CancelToken | None) -> Any:
            context = make(token)
            return stand(context) if of == "context" else Stand(context, memory=stand(context.memory))

        patch.setattr(embedder, "_make", made)
    return once


def _unwrapped(compute: Any) -> Any:
    return lambda context, batch, *args, **how: compute(context, getattr(batch, "_of", batch), *args, **how)


@pytest.mark.parametrize("error", [MemoryError("none left"), IndexError("out of range"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", [name for name in RUNNERS if name not in NOT_A_STEPS] + OTHERS)
def test_a_callable_that_fails_once_ends_one_request_at_most_and_the_others_say_what_they_say_alone(
    name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ids(40, seed) for seed in range(3)]
    prompts += [prompts[0] + ids(40, 3), ids(40, 4)]  # one is copied from another, and one clears what was there
    for at in (1, 5):
        with engine("llama", slots=4) as e, monkeypatch.context() as patch:
            once = put(e, name, error, at, patch)
            with Gate(e) as gate:
                generations = [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts[:3]]
                gate.wait()
                generations += [e.submit(each, max_tokens=8, sampler=greedy(), logprobs=2) for each in prompts[3:]]
                embeddings = [e.embed(ids(5, seed)) for seed in range(3)]
                once.armed = True
            works: list[Any] = [*generations, *embeddings]
            for each in works:
                assert each.wait(60)
            assert once.failed or at > 1 or name in RARE
            failed = [each for each in works if each.finish_reason == "error"]
            assert len(failed) <= 1, once.failed
            for each in failed:
                assert each.error is error or each.error.__cause__ is error
            for generation, prompt in zip(generations, prompts, strict=True):
                if generation not in failed:
                    assert same_answer("llama", generation, answer("llama", prompt, 8))
            for embedding in embeddings:
                if embedding not in failed:
                    assert embedding.result(0).shape
            assert not e.closed
            after = e.submit(prompts[1], max_tokens=4, sampler=greedy(), logprobs=2)
            after.result(60)
            assert same_answer("llama", after, answer("llama", prompts[1], 4))
            assert idle_slots(e) == 4

"""Grammars of strangers: those that people write work; those that would never end, or take all memory, are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import batch_of, prompt
from tests.unit.grammars import SCHEMAS, TEXTS, ambiguous

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]


@pytest.fixture
def ctx(model_of: LoadedModel, new_context: NewContext) -> lc.Context:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 12)))
    return context


@pytest.mark.parametrize("grammar", TEXTS.values(), ids=TEXTS)
def test_a_grammar_that_people_write_works(grammar: str, ctx: lc.Context) -> None:
    sampler = lc.Sampler(grammar=grammar, temperature=1.0, top_k=0, seed=1, model=ctx.model)
    for _ in range(40):
        if ctx.model.is_eog(sampler.sample(ctx)):
            break


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_servers_get_works(schema: object, ctx: lc.Context) -> None:
    sampler = lc.Sampler(json_schema=schema, temperature=1.0, top_k=0, seed=1, model=ctx.model)
    for _ in range(40):
        if ctx.model.is_eog(sampler.sample(ctx)):
            break


@pytest.mark.parametrize(("rule", "grammar"), [
    ("root", 'root ::= root "x" | "y"'),
    ("root", 'root ::= e root "x" | "y"\ne ::= ""'),
    ("root", 'root ::= e root "x" | "y"\ne ::= f\nf ::= ""'),
    ("root", 'f ::= ""\ne ::= f\nroot ::= e root "x" | "y"'),
    ("root", 'root ::= e f root "x" | "y"\ne ::= f f\nf ::= g\ng ::= h*\nh ::= "z"'),
    ("b", 'root ::= "b" a\na ::= e b\nb ::= e a "x" | "y"\ne ::= f\nf ::= ""'),
    ("root", 'root ::= e root e | "y"\ne ::= f\nf ::= ""'),
])  # fmt: skip
def test_a_rule_that_begins_with_itself_is_named(rule: str, grammar: str, model_of: LoadedModel) -> None:
    with pytest.raises(ValueError, match=f"the rule '{rule}' begins with itself"):
        lc.Sampler(grammar=grammar, model=model_of("llama"))


def test_a_grammar_that_can_be_read_in_too_many_ways_is_refused(ctx: lc.Context) -> None:
    for grammar in (ambiguous(8), ambiguous(16), 'root ::= "y" a0\n' + ambiguous(9).partition("\n")[2]):
        with pytest.raises(ValueError, match="too ambiguous"):  # noqa: PT012
            sampler = lc.Sampler(grammar=grammar, temperature=0, model=ctx.model)
            for _ in range(3):
                sampler.sample(ctx)
    assert lc.Sampler(temperature=0).sample(ctx) == int(np.argmax(ctx.logits()))


def test_a_refused_grammar_leaves_other_threads_their_time(model_of: LoadedModel) -> None:
    """The grammar is compiled without the GIL."""
    model, stop, steps = model_of("llama"), threading.Event(), [0]

    def count() -> None:
        while not stop.wait(0.001):
            steps[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(ValueError, match="too ambiguous"):
            lc.Sampler(grammar=ambiguous(16), model=model)
    finally:
        stop.set()
        thread.join()
    assert steps[0] > 3


def test_a_sample_under_a_cancelled_token_chooses_nothing(ctx: lc.Context) -> None:
    token = lc.CancelToken()
    token.cancel("enough")
    sampler = lc.Sampler(temperature=1.5, top_k=0, seed=3, repeat_penalty=1.3)
    first = sampler.clone()
    with pytest.raises(lc.DecodeCancelled, match="enough"):
        sampler.sample(ctx, token=token)
    assert [sampler.sample(ctx, -1, lc.CancelToken()) for _ in range(10)] == [first.sample(ctx) for _ in range(10)]


def test_a_token_must_be_one(ctx: lc.Context) -> None:
    with pytest.raises(TypeError):
        lc.Sampler().sample(ctx, token=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ctx.model.tokenize("a", token=3)  # type: ignore[arg-type]


def test_a_schema_within_itself_is_refused() -> None:
    ring: list[object] = []
    ring += [ring, ring]
    table: dict[str, object] = {"type": "object"}
    table["properties"] = {"a": table, "b": table}
    doubled: object = {"type": "string"}
    for _ in range(60):
        doubled = {"anyOf": [doubled, doubled]}
    for schema in ({"anyOf": ring}, table, doubled):
        with pytest.raises(ValueError, match=r"nested deeper|more than"):
            lc.Sampler(json_schema=schema)  # type: ignore[arg-type]


# -- one thread at a time


def test_a_sampler_that_another_thread_uses_says_so(model_of: LoadedModel, new_context: NewContext) -> None:
    """Two contexts, one sampler: the losers are told, and what was chosen is what one thread would have chosen."""
    model = model_of("llama")
    contexts = [new_context("llama") for _ in range(2)]
    for context in contexts:
        context.decode(batch_of(prompt(model, 12)))
    options = {"temperature": 1.5, "top_k": 0, "seed": 3, "grammar": TEXTS["json"]}
    sampler = lc.Sampler(**options, model=model)  # type: ignore[arg-type]
    chosen: list[int] = []
    busy: list[lc.ContextBusyError] = []
    barrier = threading.Barrier(2)

    def use(context: lc.Context) -> None:
        barrier.wait()
        for _ in range(150):
            try:
                chosen.append(sampler.sample(context))
                sampler.clone()
            except lc.ContextBusyError as error:
                busy.append(error)

    threads = [threading.Thread(target=use, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = lc.Sampler(**options)  # type: ignore[arg-type]
    expected = [alone.sample(contexts[0]) for _ in chosen]
    assert sorted(chosen) == sorted(expected)
    assert busy
    assert all("sampler" in str(error) for error in busy)
    sampler.reset()
    assert sampler.sample(contexts[0]) == expected[0]


def test_a_context_whose_model_was_closed_is_sampled_from(model_of: LoadedModel) -> None:
    model = lc.Model.load(model_of("llama").path)
    with model.context(n_ctx=64, n_threads=1) as context:
        context.decode(batch_of(prompt(model, 8)))
        model.close()
        assert lc.Sampler(temperature=0).sample(context) == int(np.argmax(context.logits()))
        assert lc.Sampler(temperature=0, grammar='root ::= "a"').sample(context) >= 0

"""Grammars of strangers: those that people write work; those that would never end, or take all memory, are refused."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import batch_of, prompt
from tests.laws.clock import FAR, deadline_at, readings_of
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
    for grammar in (ambiguous(10), ambiguous(16), 'root ::= "y" a0\n' + ambiguous(10).partition("\n")[2]):
        with pytest.raises(ValueError, match="too ambiguous"):  # noqa: PT012
            sampler = lc.Sampler(grammar=grammar, temperature=0, model=ctx.model)
            for _ in range(3):
                sampler.sample(ctx)
    assert lc.Sampler(temperature=0).sample(ctx) == int(np.argmax(ctx.logits()))


KINDS: dict[str, Callable[[int], str]] = {
    "a long text": lambda n: f'root ::= "{"a" * n}"',
    "many rules": lambda n: "\n".join(["root ::= r0", *(f'r{i} ::= "a" r{i + 1}' for i in range(n)), f'r{n} ::= "b"']),
    "a chain of rules": lambda n: "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(n)), f'r{n} ::= ""']),
    "groups side by side": lambda n: "root ::= " + '("a" "b") ' * n,
    "groups in groups": lambda n: "root ::= " + "(" * n + '"a"' + ")" * n,
    "groups under a long name": lambda n: f"{'x' * n} ::= " + '("a") ' * n + f"\nroot ::= {'x' * n}",
    "a long name, often": lambda n: f"root ::= {' '.join(['y' * n] * 40)}\n{'y' * n} ::= [a]",
    "a repeated text": lambda n: f'root ::= "{"a" * n}"{{2000}}',
    "repeated texts": lambda n: "root ::= " + '"abcdefgh"{1000} ' * n,
    "an optional text": lambda n: f'root ::= "{"a" * n}"{{0,2000}}',
    "a repeated group": lambda n: f'root ::= ("{"a" * n}" | "b"){{500}}',
    "repetitions of repetitions": lambda n: "root ::= " + "(" * 6 + '"a"' + f"{{{n}}})" * 6,
    "signs behind each other": lambda n: 'root ::= "a"' + "+" * n,
    "a wide class": lambda n: f"root ::= [{'a-z' * n}]",
    "a comment": lambda n: 'root ::= "a" #' + "x" * n,
    "comments": lambda n: "#\n" * n + 'root ::= "a"',
    "braces": lambda n: 'root ::= "a"' + "{" * n,
    "a long number": lambda n: 'root ::= "a"{' + "9" * n + "}",
    "open texts": lambda n: 'root ::= "' * n,
    "names of tokens": lambda n: "root ::= " + "<s> " * (n // 100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_twice_as_long_takes_twice_the_steps_or_is_refused(kind: str, model_of: LoadedModel) -> None:
    """Each element is counted before it is made, so what steps bound memory is bound by, too."""
    taken = []
    for n in (4_000, 8_000, 16_000, 32_000):
        sampler = lc.Sampler(grammar=KINDS[kind](n))
        try:
            sampler.bind(model_of("llama"))
        except ValueError as error:
            assert len(str(error)) < 400, "what is told of a text is an excerpt"  # noqa: PT017
        taken.append(sampler._steps)  # type: ignore[attr-defined]
    assert all(after <= 2.3 * before + 5_000 for before, after in itertools.pairwise(taken)), taken


def test_copies_of_a_text_are_counted_before_they_are_made(model_of: LoadedModel) -> None:
    sampler = lc.Sampler(grammar=f'root ::= "{"a" * 100_000}"{{2000}}')  # 1.6 GB
    with pytest.raises(ValueError, match="more than 2000000 characters"):
        sampler.bind(model_of("llama"))
    with pytest.raises(ValueError, match="at least 5 and at most 2"):
        lc.Sampler(grammar='root ::= ("a"{5, # a comment between\n 2})', model=model_of("llama"))


def test_each_range_of_a_class_is_counted(ctx: lc.Context) -> None:
    def steps(n: int) -> int:
        sampler = lc.Sampler(grammar=f"root ::= [{'a-z' * n}]+", temperature=0, model=ctx.model)
        sampler.sample(ctx)
        return int(sampler._steps)  # type: ignore[attr-defined]

    one, many, twice = steps(1), steps(200), steps(400)
    assert many > 2 * one
    assert 1.8 * (many - one) < twice - one < 2.2 * (many - one)
    with pytest.raises(ValueError, match="too large"):
        steps(100_000)


def test_a_wide_class_is_left_by_a_cancelled_call(ctx: lc.Context) -> None:
    grammar = f"root ::= [{'a-z' * 400}]+"
    sampler = lc.Sampler(grammar=grammar, temperature=0, model=ctx.model)
    twin = sampler.clone()
    whole = readings_of(lambda: twin.clone().sample(ctx, token=lc.CancelToken(timeout=FAR)))
    assert whole > 500, "it is looked at while the class is compared with the vocabulary"
    for reading in (2, whole // 2, whole - 2):
        with deadline_at(reading), pytest.raises(lc.DeadlineExceeded):
            sampler.sample(ctx, token=lc.CancelToken(timeout=FAR))
    assert sampler.sample(ctx) == twin.sample(ctx)


def test_a_choice_of_many_allows_what_choices_of_few_allow(ctx: lc.Context) -> None:
    """With many stacks the vocabulary is compared by first characters, with few as llama.cpp does."""
    texts = ["apple", "apricot", "banana", "blueberry", "cherry", "date", "\u00e9", "\u65e5\u672c"]
    ways = [*(f'"{text}"' for text in texts), "[f-h]", "[^\\x01-\\x7E\\u0080-\\U0010FFFF]", '""']

    def allowed(ways: list[str]) -> set[int]:
        grammar = "root ::= " + " | ".join(ways)
        sampler = lc.Sampler(grammar=grammar, temperature=1e6, top_k=0, top_p=1, min_p=0, model=ctx.model)
        return {sampler.clone(seed=seed).sample(ctx) for seed in range(500)}

    few = set().union(*(allowed(ways[i : i + 2]) for i in range(0, len(ways), 2)))
    assert len(few) > 30
    assert allowed(ways) == few


def test_a_grammar_is_parsed_under_a_token(model_of: LoadedModel) -> None:
    token = lc.CancelToken()
    token.cancel("enough")
    sampler = lc.Sampler(grammar='root ::= "a"')
    with pytest.raises(lc.DecodeCancelled, match="enough"):
        sampler.bind(model_of("llama"), token)
    with pytest.raises(lc.DecodeCancelled, match="enough"):
        lc.Sampler(grammar='root ::= "a"', model=model_of("llama"), token=token)
    sampler.bind(model_of("llama"))
    text = KINDS["groups side by side"](20_000)
    whole = readings_of(lambda: lc.Sampler(grammar=text, model=model_of("llama"), token=lc.CancelToken(timeout=FAR)))
    assert whole > 50
    for reading in (3, whole // 2, whole - 1):
        with deadline_at(reading), pytest.raises(lc.DeadlineExceeded, match="parsing a grammar"):
            lc.Sampler(grammar=text, model=model_of("llama"), token=lc.CancelToken(timeout=FAR))


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

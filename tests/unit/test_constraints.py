"""Constraints by llguidance: JSON schemas, regular expressions and Lark grammars that an output follows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import batch_of, prompt

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace"]}, "born": {"type": "integer", "minimum": 1800, "maximum": 1999}},
    "required": ["name", "born"],
    "additionalProperties": False,
}
HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture
def ctx(model_of: LoadedModel, new_context: NewContext) -> lc.Context:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 12)))
    return context


def text_of(sampler: lc.Sampler, ctx: lc.Context, most: int = 200) -> str:
    """What is chosen again and again from the same logits, up to its end."""
    pieces = []
    for _ in range(most):
        token = sampler.sample(ctx)
        if ctx.model.is_eog(token):
            return b"".join(pieces).decode()
        pieces.append(ctx.model.token_to_piece(token, False))
    raise AssertionError(f"no end: {pieces}")


@pytest.mark.parametrize("seed", range(5))
def test_a_text_follows_its_schema(seed: int, ctx: lc.Context) -> None:
    person = json.loads(text_of(lc.Sampler(json_schema=PERSON, seed=seed, **HOT), ctx))
    assert person["name"] in ("Ada", "Grace")
    assert 1800 <= person["born"] <= 1999
    assert len(person) == 2


def test_a_schema_is_text_or_a_value(ctx: lc.Context) -> None:
    texts = {
        text_of(lc.Sampler(json_schema=schema, seed=3, **HOT), ctx)
        for schema in (PERSON, json.dumps(PERSON), json.dumps(PERSON).encode())
    }
    assert len(texts) == 1


def test_a_text_matches_its_regular_expression(ctx: lc.Context) -> None:
    text = text_of(lc.Sampler(regex=r"(ab|cd){3}[0-9]+x", seed=2, **HOT), ctx)
    assert re.fullmatch(r"(ab|cd){3}[0-9]+x", text)


def test_a_text_follows_its_lark_grammar(ctx: lc.Context) -> None:
    text = text_of(lc.Sampler(lark='start: "hello " NUMBER\nNUMBER: /[0-9]{2,3}/', seed=2, **HOT), ctx)
    assert re.fullmatch("hello [0-9]{2,3}", text)


def test_letters_outside_ascii_are_followed_byte_by_byte(ctx: lc.Context) -> None:
    assert text_of(lc.Sampler(json_schema={"const": "süß 甲乙 😀"}, seed=1, **HOT), ctx) == '"süß 甲乙 😀"'


@pytest.mark.parametrize("names", [("json_schema", "regex"), ("regex", "lark"), ("lark", "grammar"),
                                   ("json_schema", "grammar")])  # fmt: skip
def test_a_sampler_has_one_constraint(names: tuple[str, str]) -> None:
    values: dict[str, Any] = {"json_schema": {}, "regex": "a", "lark": 'start: "a"', "grammar": 'root ::= "a"'}
    with pytest.raises(ValueError, match=f"{names[0]} and {names[1]}"):
        lc.Sampler(**{name: values[name] for name in names})


def test_a_clone_goes_on_from_where_the_text_stands(ctx: lc.Context) -> None:
    sampler = lc.Sampler(json_schema=PERSON, seed=5, **HOT)
    begun = [sampler.sample(ctx) for _ in range(3)]
    clone = sampler.clone()
    rest = text_of(sampler, ctx)
    assert text_of(clone, ctx) == rest
    whole = b"".join(ctx.model.token_to_piece(token, False) for token in begun).decode() + rest
    assert json.loads(whole)["name"] in ("Ada", "Grace")


def test_after_a_reset_the_text_begins_again(ctx: lc.Context) -> None:
    sampler = lc.Sampler(json_schema=PERSON, seed=5, **HOT)
    first = text_of(sampler, ctx)
    sampler.reset()
    assert text_of(sampler, ctx) == first


def test_a_token_that_the_constraint_does_not_allow_is_refused_and_changes_nothing(ctx: lc.Context) -> None:
    sampler = lc.Sampler(regex="abc", temperature=0, model=ctx.model)
    [a, *_] = ctx.model.tokenize("xyz", add_special=False)
    with pytest.raises(ValueError, match="the constraint does not allow"):
        sampler.accept(int(a))
    assert text_of(sampler, ctx) == "abc"


def test_after_the_end_only_the_end_may_be_chosen(ctx: lc.Context) -> None:
    sampler = lc.Sampler(regex="ab", temperature=0)
    assert text_of(sampler, ctx) == "ab"
    assert all(ctx.model.is_eog(sampler.sample(ctx)) for _ in range(3))


@pytest.mark.parametrize("options", [
    {"json_schema": {"not": {"type": "string"}}},
    {"json_schema": False},
    {"json_schema": {"type": "nothing"}},
    {"regex": "(a"},
    {"lark": "start: nothing"},
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_in_words(options: dict[str, Any], model_of: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"the JSON schema|the schema|the regular expression|the Lark grammar"):
        lc.Sampler(**options, model=model_of("llama"))


def test_a_constraint_that_is_no_text_is_refused(model_of: LoadedModel) -> None:
    wrong: list[dict[str, Any]] = [{"regex": 3}, {"lark": b"a"}, {"json_schema": 3}, {"json_schema": []}]
    for options in wrong:
        with pytest.raises(TypeError, match="must be"):
            lc.Sampler(**options)


def test_a_bias_and_a_constraint_that_leave_nothing_say_so(ctx: lc.Context) -> None:
    tokens = {int(token): -float("inf") for token in range(ctx.model.n_vocab) if not ctx.model.is_eog(token)}
    with pytest.raises(ValueError, match="no token of the vocabulary is left"):
        lc.Sampler(regex="a", logit_bias=tokens).sample(ctx)


def test_requests_of_an_engine_follow_constraints_of_their_own(model_of: LoadedModel) -> None:
    with lc.Engine(model_of("llama"), slots=3, n_threads=1) as engine:
        person = engine.submit("Hello", max_tokens=200, sampler=lc.Sampler(json_schema=PERSON, seed=1, **HOT))
        letters = engine.submit("Hello", max_tokens=200, sampler=lc.Sampler(regex="[abc]{20}", seed=1, **HOT))
        free = engine.submit("Hello", max_tokens=20, sampler=lc.Sampler(temperature=0))
        assert json.loads(person.result().text)["born"] >= 1800
        assert re.fullmatch("[abc]{20}", letters.result().text)
        assert free.result().finish_reason in ("stop", "length")


def test_a_constraint_that_fails_ends_its_own_request(model_of: LoadedModel) -> None:
    with lc.Engine(model_of("llama"), slots=2, n_threads=1) as engine:
        with pytest.raises(ValueError, match="the JSON schema cannot be used"):
            engine.submit("Hello", sampler=lc.Sampler(json_schema={"not": {}}))
        right = engine.submit("Hello", max_tokens=100, sampler=lc.Sampler(regex="[abc]{20}"))
        assert re.fullmatch("[abc]{20}", right.result().text)


def test_a_context_whose_model_was_closed_takes_constraints(model_of: LoadedModel) -> None:
    model = lc.Model.load(model_of("llama").path)
    with model.context(n_ctx=64, n_threads=1) as context:
        context.decode(batch_of(prompt(model, 8)))
        bound = lc.Sampler(regex="a", temperature=0, model=model)
        model.close()
        assert bound.sample(context) == lc.Sampler(regex="a", temperature=0).sample(context)

"""A constraint accepts what its author said: schemas that converters get wrong, many choices, large vocabularies."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.commands.make_model import find_vocab
from llamacancel.constraint import Matcher, Vocabulary, source, source_of
from tests.unit.engines import engine, ids
from tests.unit.schema_suite import bytes_alone


@functools.cache
def vocabulary() -> Vocabulary:
    return bytes_alone()


def follows(matcher: Matcher, text: str) -> bool:
    """Whether a text is one of the constraint's, each mask on the way asked for as well."""
    mask = (257 + 31) // 32 * 4
    for byte in text.encode():
        allowed = matcher.native.compute_bitmask()
        assert len(allowed) == mask
        if not allowed[byte // 8] >> byte % 8 & 1:
            return False
        matcher.take(byte)
    return bool(matcher.native.is_accepting())


@pytest.fixture(scope="module")
def large() -> Iterator[lc.Model]:
    """A vocabulary of 128,000 tokens, without weights."""
    with lc.Model.load(find_vocab("llama-bpe"), vocab_only=True) as loaded:
        assert loaded.n_vocab > 128_000
        yield loaded


def follow(of: lc.Model, sampler: lc.Sampler, instance: Any) -> None:
    """Has a sampler accept an instance's text, and make each mask on the way."""
    follow_text(of, sampler, json.dumps(instance))


def follow_text(of: lc.Model, sampler: lc.Sampler, text: str) -> None:
    for token in of.tokenize(text, add_special=False):
        sampler._make_mask()
        sampler.accept(int(token))
    sampler._make_mask()


MEANINGS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "references whose names differ only in signs": (
        {
            "$defs": {"甲": {"enum": ["x"]}, "乙": {"enum": ["y"]}},
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/甲"}, "b": {"$ref": "#/$defs/乙"}},
            "required": ["a", "b"],
        },
        [{"a": "x", "b": "y"}],
        [{"a": "y", "b": "y"}, {"a": "x", "b": "x"}, {"a": "x"}],
    ),
    "a name with a slash": ({"$defs": {"a/b": {"type": "string"}}, "$ref": "#/$defs/a~1b"}, ["x"], [1, None]),
    "a maximum of 64 bits": ({"type": "integer", "minimum": 0, "maximum": 18446744073709551615}, [0, 7, 2**63], [-1]),
    "a maximum beyond 64 bits": ({"type": "integer", "maximum": 1e19}, [0, 7], [0.5]),
    "the largest whole number": ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, [0, 2**62], [-1, 2**63]),
    "a longest text of 32 bits": ({"type": "string", "maxLength": 2**32}, ["", "abc"], [1]),
    "a longest text of 31 bits": ({"type": "string", "maxLength": 2**31}, ["", "abc"], [1]),
    "a shortest text": ({"type": "string", "minLength": 2001}, ["a" * 2001], ["a" * 2000, ""]),
    "properties beside anyOf": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "additionalProperties": False,
        },
        [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{}, {"a": "x"}, {"b": None}, {"c": 1}],
    ),
    "allOf of a reference": ({"allOf": [{"$ref": "#/$defs/S"}], "$defs": {"S": {"type": "string"}}}, ["x"], [1, {}]),
    "names by a pattern": (
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"x": 1}, {"xy": 2}],
        [{"x": "1"}, {"y": 1}],
    ),
    "names of signs": (
        {
            "type": "object",
            "properties": {"ids[]": {"const": 1}, "a\\b": {"const": 2}, 'x"y': {"const": 3}, "^z": {}, "-": {}},
            "additionalProperties": False,
        },
        [{"ids[]": 1, "a\\b": 2, 'x"y': 3}, {"^z": [], "-": None}],
        [{"ids[]": 2}, {"a\\b": 3}, {'x"y': 1}, {"z": 1}],
    ),
    "a property of any kind": ({"type": "object", "properties": {"extra": True}}, [{}, {"extra": [1]}], [[], 1]),
    "items and no more": (
        {"type": "array", "prefixItems": [{"type": "string"}], "items": False},
        [["x"]],
        [[1], ["x", 1]],
    ),
    "itself": (
        {
            "type": "object",
            "properties": {"k": {"type": "array", "items": {"$ref": "#"}}},
            "additionalProperties": False,
        },
        [{}, {"k": []}, {"k": [{"k": [{}]}]}],
        [{"k": [1]}, {"k": {}}],
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_a_schema_means_what_json_schema_says_or_is_refused_in_words(name: str) -> None:
    schema, valid, invalid = MEANINGS[name]
    try:
        found = source_of(json_schema=schema)
        assert found is not None
        matcher = found.matcher(vocabulary())
    except ValueError as error:
        assert "schema" in str(error) or " at #" in str(error)  # noqa: PT017
        return
    for instance in valid:
        assert follows(matcher.copy(), json.dumps(instance, ensure_ascii=False)), instance
    for instance in invalid:
        assert not follows(matcher.copy(), json.dumps(instance, ensure_ascii=False)), instance


@pytest.mark.parametrize("value", [{}, {"type": "integer"}, {"type": "string"}, {"type": ["object", "null"]}])
def test_the_most_optional_properties_are_followed_to_their_end(value: dict[str, Any], large: lc.Model) -> None:
    said: Any = {"integer": 12, "string": "ab"}.get(str(value.get("type")), {"a": 1})
    schema = {"type": "object", "properties": {f"p{i}": value for i in range(500)}, "additionalProperties": False}
    follow(large, lc.Sampler(json_schema=schema, model=large), {f"p{i}": said for i in (3, 14, 300, 499)})


def test_three_thousand_choices_are_followed(large: lc.Model) -> None:
    choices = [f"the {i % 61} th of {i} towns, {'north' if i % 2 else 'south'}" for i in range(3000)]
    first = lc.Sampler(json_schema={"enum": choices}, model=large)
    for choice in choices[::599]:
        sampler = first.clone()
        follow(large, sampler, choice)
        with pytest.raises(ValueError, match="does not allow"):
            sampler.accept(int(large.tokenize("x", add_special=False)[0]))


NOTHING: list[dict[str, Any]] = [
    {"regex": "^[z-a]$"}, {"regex": r"[^\s\S]"}, {"regex": r"a[^\s\S]b"}, {"regex": r"\b"}, {"regex": "(?=a)b"},
    *({"json_schema": {"type": "string", "pattern": pattern}} for pattern in ("^[z-a]$", r"^[^\s\S]$", r"^[^\d\D]+")),
    {"json_schema": {"enum": []}}, {"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}},
    {"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, {"lark": "start: /[z-a]/"},
]  # fmt: skip


@pytest.mark.parametrize("options", NOTHING)
def test_what_allows_nothing_says_so_and_ends_its_own_request(options: dict[str, Any]) -> None:
    with engine() as e:
        with pytest.raises(ValueError, match=r"regular expression|JSON schema|schema|Lark grammar|no token"):
            e.submit(ids(5), sampler=lc.Sampler(**options), max_tokens=10).result()
        assert e.submit(ids(5), sampler=lc.Sampler(regex="ab")).result().text == "ab"


def test_a_pattern_of_any_character_allows_all() -> None:
    found = source_of(json_schema={"type": "string", "pattern": r"^[\s\S]{2}$"})
    assert found is not None
    assert follows(found.matcher(vocabulary()), '"ab"')
    assert not follows(found.matcher(vocabulary()), '"abc"')


def test_submit_compiles_on_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    compiled = source.compiled

    def noted(*args: Any) -> Matcher:
        threads.append(threading.current_thread())
        return compiled(*args)

    monkeypatch.setattr(source, "compiled", noted)
    with engine() as e:
        assert e.submit(ids(5), sampler=lc.Sampler(regex="ab|ac")).result().text in ("ab", "ac")
    assert threads == [threading.current_thread()]


def test_submit_compiles_nothing_for_a_token_that_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "compiled", lambda *args: pytest.fail("it was compiled"))
    token = lc.CancelToken()
    token.cancel("long ago")
    with engine() as e:
        generation = e.submit(ids(5), sampler=lc.Sampler(regex="ab|ac"), token=token)
        with pytest.raises(lc.DecodeCancelled, match="long ago"):
            generation.result()


def test_a_grammar_that_can_be_read_in_too_many_ways_ends_in_words(large: lc.Model) -> None:
    rules = "\n".join(f'r{i}: "a"* "c"?' for i in range(100))
    lark = "start: e*\ne: " + " | ".join(f'("a"+ "b"? r{i})' for i in range(100)) + "\n" + rules
    sampler = lc.Sampler(lark=lark, model=large)
    with pytest.raises(ValueError, match="the Lark grammar cannot be followed any further"):
        follow_text(large, sampler, "a" * 64)
    with pytest.raises(ValueError, match="the Lark grammar cannot be followed any further"):
        sampler._make_mask()

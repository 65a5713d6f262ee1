"""Schemas, expressions and grammars of strangers: what is out of bounds is refused in words, and the process lives."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.constraint.schema import checked_schema

CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(50_000)}
REFUSED: dict[str, tuple[Any, str]] = {
    "a chain of references": ({"$defs": CHAIN, "$ref": "#/$defs/d0"}, "entries at"),
    "many properties": ({"properties": {f"p{i}": {} for i in range(15_000)}}, "entries at #/properties"),
    "many optional properties": (
        {"properties": {f"p{i}": {} for i in range(501)}},
        "501 properties of one object that may be left out",
    ),
    "many optional properties that are merged": (
        {"allOf": [{"properties": {f"{part}{i}": {} for i in range(300)}} for part in "ab"]},
        "600 properties of one object that may be left out",
    ),
    "a long text": ({"type": "string", "maxLength": 2**32}, "'maxLength' at #"),
    "a large number": ({"properties": {"a": {"maximum": 2**64}}}, "'maximum' at #/properties/a"),
    "a number of 5,000 digits": ({"minimum": 10**5000}, "'minimum' at #"),
    "a long repetition": ({"pattern": "a{999999}"}, "repeats more than"),
    "texts that are long together": ({"title": "a" * 1_000_001}, "texts of more than"),
    "a long name": ({"properties": {"a" * 4_001: {}}}, "a name at #/properties has 4001"),
    "a long value": ({"enum": ["a" * 4_001]}, "a text at #/enum has 4001"),
    "a value that is rounded": ({"enum": [2**70]}, "the number 1180591620717411303424 at #/enum"),
    "no number": ('{"const": NaN}', "no number of JSON"),
    "a reference beside $id": (
        {"allOf": [{"$id": "http://x/", "$ref": "a"}], "$defs": {"a": {}}},
        "stands beside '\\$id'",
    ),
    "a reference into values": ({"const": {"minLength": 10**9}, "items": {"$ref": "#/const"}}, "leads into 'const'"),
    "patterns that hold at once": ({"allOf": [{"pattern": f"a{i}"} for i in range(30)]}, "30 patterns for one text"),
    "values that are compared": ({"allOf": [{"enum": [*range(n, n + 200)]} for n in (0, 1)]}, "40000 pairs of values"),
    "properties in each alternative": (
        {"properties": {f"p{i}": {} for i in range(100)}, "anyOf": [{"required": [f"p{i}"]} for i in range(100)]},
        "100 properties in each of 100 alternatives",
    ),
    "alternatives that are multiplied": (
        {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(30)]},
        "alternatives at one place",
    ),
    "doubling": (
        {
            "$defs": {
                f"d{i}": {
                    "allOf": [
                        {"properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in names}} for names in ("a", "ab")
                    ]
                }
                for i in range(16)
            }
            | {"d16": {}},
            "$ref": "#/$defs/d0",
        },
        "properties that are merged",
    ),
    "a large multiple": ({"multipleOf": 1_000_003}, "'multipleOf' of 1000003"),
    "multiples that hold at once": ({"allOf": [{"multipleOf": n} for n in (199, 211, 1.01)]}, "'multipleOf' of 4240"),
    "types without end": ({"type": ["object"] * 1000}, "'type' at # has 1000 entries"),
    "limits of numbers": ({"items": [{"minimum": i} for i in range(501)]}, "more than 500 limits of numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_out_of_bounds_is_refused_with_its_place(name: str) -> None:
    schema, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        lc.Sampler(json_schema=schema)


def test_a_schema_within_itself_is_refused() -> None:
    ring: dict[str, Any] = {}
    ring["items"] = ring
    with pytest.raises(ValueError, match="nested deeper"):
        lc.Sampler(json_schema=ring)


def test_text_that_is_nested_deep_is_refused() -> None:
    with pytest.raises(ValueError, match="nested deeper"):
        lc.Sampler(json_schema='{"items":' * 100_000 + "{}" + "}" * 100_000)


def test_a_name_with_letters_outside_ascii_is_written_as_uris_are() -> None:
    assert checked_schema({"$ref": "#/$defs/甲"}) == {"$ref": "#/$defs/%E7%94%B2"}


@pytest.mark.parametrize("options", [
    {"regex": "a" * 10_001}, {"regex": "a{100000}"}, {"lark": 'start: "a" ~ 1..20000'},
    {"lark": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'},
    {"lark": "start: " + "(" * 1001}, {"lark": 'start: %json {"type": "string"}'},
])  # fmt: skip
def test_an_expression_or_grammar_out_of_bounds_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the regular expression|the Lark grammar"):
        lc.Sampler(**options)


@pytest.mark.parametrize("schema", [
    {"properties": {"minLength": {"type": "string"}, "pattern": {"maxLength": 3}, "$ref": {"type": "null"}}},
    {"const": {"$ref": "ä", "maxLength": 2**40, "pattern": "a{99999}"}},
    {"default": {"$ref": "ä"}, "examples": [{"minimum": 2.0**70}], "enum": [{"$id": "a", "$ref": "ä"}]},
    {"$defs": {"const": {"type": "string"}}, "$ref": "#/$defs/const"},
    {"$id": "http://a/b", "$ref": "#/$defs/a", "$defs": {"a": {}}},
])  # fmt: skip
def test_a_keyword_is_one_in_a_schema_alone(schema: dict[str, Any]) -> None:
    assert checked_schema(schema) == schema


def test_the_walk_is_as_long_as_the_schema() -> None:
    def calls(n: int) -> int:
        """Calls of Python functions that checking takes, for n definitions that refer to each other."""
        schema = {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{(i * 7) % n}"}} for i in range(n)}}
        counted = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            checked_schema(schema)
        finally:
            sys.setprofile(None)
        return counted

    assert calls(80) < 2.5 * calls(40) < 6.25 * calls(20)


LIVES = r"""
import sys
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
model = lc.Model.load(cached_model("llama", "tiny"))
ref = lambda name: {"$ref": "#/$defs/" + name}

def chain(n, k, wrap):
    def nested(x):
        for _ in range(k):
            x = wrap(x)
        return x

    return {"$defs": {**{f"d{i}": nested(ref(f"d{i + 1}")) for i in range(n)}, f"d{n}": {}}, **ref("d0")}

for schema in (
    {"$defs": {"A": ref("A")}, "allOf": [ref("A")]},
    {"$defs": {"A": ref("B"), "B": ref("A")}, "allOf": [ref("A")]},
    {"$defs": {"A": {"anyOf": [ref("A")]}}, **ref("A")},
    {"$defs": {**{f"d{i}": ref(f"d{i + 1}") for i in range(390)}, "d390": {"type": "string"}}, **ref("d0")},
    chain(900, 0, lambda x: x),
    *(chain(n, k, wrap) for n, k in ((19, 19), (195, 1), (60, 5), (300, 25)) for wrap in (
        lambda x: {"prefixItems": [x]}, lambda x: {"patternProperties": {"^a": x}}, lambda x: {"properties": {"a": x}},
        lambda x: {"anyOf": [x, {"type": "null"}]}, lambda x: {"allOf": [x]}, lambda x: {"items": x},
    )),
    {"allOf": [{"type": "string", "pattern": f"a{{{i},}}b"} for i in range(30)]},
    {"$defs": {"A": {"allOf": [{"properties": {"a": ref("A")}}, {"properties": {"a": ref("A"), "b": ref("A")}}]}},
     **ref("A")},
    {"$defs": {**{f"d{i}": {"allOf": [ref(f"d{i + 1}")] * 2} for i in range(60)}, "d60": {}}, **ref("d0")},
    {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}},
    {"type": ["object"] * 1000, "properties": {f"p{i}": {} for i in range(1000)}},
    {"type": "object", "properties": {"a" * 200000: {}}, "additionalProperties": {"type": "string"}},
):
    try:
        lc.Sampler(json_schema=schema, model=model)
        print("taken")
    except ValueError as error:
        print("refused", str(error)[:80])
rules = "".join(f'r{i}: (r{i + 1})? "x"\n' for i in range(490))
for options in (
    {"lark": "start: r0\n" + rules + 'r490: "a"'}, {"regex": "(" * 5000 + ")" * 5000}, {"regex": "^[z-a]$"},
    {"json_schema": {"type": "string", "pattern": "^[z-a]$"}}, {"regex": r"[^\s\S]"},
):
    try:
        lc.Sampler(**options, model=model)
        print("taken")
    except ValueError as error:
        print("refused", str(error)[:80])
print("alive")
"""


def test_no_schema_ends_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", LIVES], capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.splitlines()[-1] == "alive"

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
    "a long text": ({"type": "string", "maxLength": 2**32}, "'maxLength' at #"),
    "a large number": ({"properties": {"a": {"maximum": 2**64}}}, "'maximum' at #/properties/a"),
    "a number of 5,000 digits": ({"minimum": 10**5000}, "'minimum' at #"),
    "a deep pattern": ({"pattern": "(" * 200 + "a" + ")" * 200}, "'pattern' at #: the regular expression is nested"),
    "a long repetition": ({"pattern": "a{999999}"}, "repeats more than"),
    "texts that are long together": ({"properties": {"a" * 1_000_001: {}}}, "texts of more than"),
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
    {"regex": "a" * 10_001}, {"regex": "(" * 100 + ")" * 100}, {"regex": "a{100000}"},
    {"lark": "start: " + "(" * 100 + '"a"' + ")" * 100}, {"lark": 'start: %json {"type": "string"}'},
])  # fmt: skip
def test_an_expression_or_grammar_out_of_bounds_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the regular expression|the Lark grammar"):
        lc.Sampler(**options)


LIVES = """
import sys
import llamacancel as lc
from llamacancel.make_model import cached_model
model = lc.Model.load(cached_model("llama", "tiny"))
ref = lambda name: {"$ref": "#/$defs/" + name}
for schema in (
    {"$defs": {"A": ref("A")}, "allOf": [ref("A")]},
    {"$defs": {"A": ref("B"), "B": ref("A")}, "allOf": [ref("A")]},
    {"$defs": {"A": {"anyOf": [ref("A")]}}, **ref("A")},
    {"$defs": {**{f"d{i}": ref(f"d{i + 1}") for i in range(900)}, "d900": {"type": "string"}}, **ref("d0")},
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
print("alive")
"""


def test_no_schema_ends_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", LIVES], capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.splitlines()[-1] == "alive"

"""JSON schemas from strangers: bounded before llguidance sees them, in one walk and without recursion.

The walk knows where a schema stands and where a value does: a keyword is one in a schema alone, not as a property's
name, in `enum`, `const`, `default` or `examples`. What stands under a keyword that JSON Schema does not know may be
what `$ref` names, and counts as a schema. Bounds: see the constants; each stands beside what it costs at most.
"""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import quote, unquote

from .pattern import check_regex
from .reach import Part, check_reach

__all__ = ["checked_schema"]

DEEPEST = 64
MOST_VALUES = 20_000
MOST_REFERENCES = 1_000
MOST_MEMBERS = 2_000  # of any object
MOST_PROPERTIES = 2_000  # of all objects together
MOST_NAME_PATTERNS = 100  # of one object: each is compared with each, 0.9 s for 200
MOST_RANGES = 500  # numbers that have limits, 0.7 ms each
MOST_ITEMS = 1_000  # in prefixItems
LONGEST = 1_000_000  # characters of all texts
LONGEST_VALUE = 4_000  # characters of a text that an answer may have to hold: 10,000 take 90 ms a step
LARGEST_COUNT = 10_000
COUNTS = {f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties", "Contains")}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}

NAMES = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
"""Keywords whose members have names of their own, and schemas."""
VALUES = {"enum", "const", "default", "examples", "example", "required", "dependentRequired", "type", "$vocabulary"}
"""Keywords that hold values, in which no keyword is one."""

SCHEMA, MEMBERS, VALUE = range(3)  # what stands at a place


def checked_schema(schema: Any) -> dict[str, Any]:
    """A schema that is within the bounds, as `json.loads` gives it; what `$ref` names is written as URIs are.

    Args:
        schema: JSON text, or what `json.loads` makes of it.

    Raises:
        TypeError, ValueError: If it is no schema, or out of bounds; names the keyword and the place.
    """
    if isinstance(schema, (str, bytes, bytearray)):
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise ValueError(f"the schema is nested deeper than {DEEPEST} levels") from None
    if schema is False:
        raise ValueError("the schema is false, which allows nothing")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise TypeError(f"a JSON schema must be an object, true or false, not {type(schema).__name__}")
    walk = _Walk(schema)
    checked = walk.copy()
    check_reach(walk.parts, walk.references, walk.one_base)
    return checked


class _Walk:
    """One walk over a schema, which copies it; counts what it meets, and remembers its parts and references."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self.n_values = self.n_letters = self.n_properties = self.n_ranges = 0
        self.parts: list[Part] = []
        self.references: list[tuple[int, str]] = []  # with the number of the part that each is in
        self.one_base = True  # no schema within says that its references begin at itself
        # A value, what it is, its part, keyword, level and place, and where its copy is to be put.
        self._values: list[tuple[Any, int, int, str, int, str, Any, Any]] = []

    def copy(self) -> dict[str, Any]:
        root: list[Any] = [None]
        self._values.append((self._schema, SCHEMA, -1, "", 0, "#", root, 0))
        while self._values:
            value, kind, within, keyword, level, place, into, key = self._values.pop()
            self.n_values += 1
            if level > DEEPEST:
                raise ValueError(f"the schema is nested deeper than {DEEPEST} levels at {place}")
            if self.n_values > MOST_VALUES:
                raise ValueError(f"the schema has more than {MOST_VALUES} values")
            if isinstance(value, dict):
                if kind == SCHEMA:
                    self.parts.append(Part(value, within, keyword))
                    within = len(self.parts) - 1
                into[key] = self._object(value, kind, within, keyword, level, place)
            elif isinstance(value, (list, tuple)):
                into[key] = copy = list(value)
                # A list of schemas (anyOf, items) or, of names, a member of `dependencies`.
                self._values.extend(
                    (part, kind, within, keyword, level + 1, place, copy, i) for i, part in enumerate(value)
                )
            else:
                if isinstance(value, str):
                    self._letters(value)
                    if keyword in ("enum", "const") and len(value) > LONGEST_VALUE:
                        raise ValueError(f"a text at {place} has {len(value)} characters; at most {LONGEST_VALUE}")
                elif isinstance(value, (int, float)):
                    _check_number(value, place)
                into[key] = value
        checked: dict[str, Any] = root[0]
        return checked

    def _object(
        self, value: dict[str, Any], kind: int, within: int, keyword: str, level: int, place: str
    ) -> dict[str, Any]:
        most = MOST_MEMBERS
        if kind == MEMBERS and keyword in ("properties", "patternProperties"):
            most = MOST_MEMBERS if keyword == "properties" else MOST_NAME_PATTERNS
            self.n_properties += len(value)
        if len(value) > most:
            raise ValueError(f"the schema has {len(value)} entries at {place}; at most {most}")
        if self.n_properties > MOST_PROPERTIES:
            raise ValueError(f"the schema has more than {MOST_PROPERTIES} properties")
        copy: dict[str, Any] = {}
        for name, part in value.items():
            if not isinstance(name, str):
                raise TypeError(f"the schema has a key that is no text at {place}: {name!r}")
            self._letters(name)
            if keyword in ("enum", "const", "properties") and kind != SCHEMA and len(name) > LONGEST_VALUE:
                raise ValueError(f"a name at {place} has {len(name)} characters; at most {LONGEST_VALUE}")
            below = VALUE
            if kind == MEMBERS:
                below = SCHEMA
                if place.endswith("/patternProperties"):
                    _check_pattern(name, f"a pattern at {place}")
            elif kind == SCHEMA:
                part = self._keyword(name, part, place, value, within)
                below = VALUE if name in VALUES else MEMBERS if name in NAMES and isinstance(part, dict) else SCHEMA
            copy[name] = part
            made_by = name if kind == SCHEMA else keyword
            self._values.append((part, below, within, made_by, level + 1, f"{place[:200]}/{name[:60]}", copy, name))
        return copy

    def _keyword(self, keyword: str, value: Any, place: str, schema: dict[str, Any], number: int) -> Any:
        """The value of a keyword, if it is within the bounds."""
        at = f"{keyword!r} at {place}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if keyword in COUNTS and not value <= LARGEST_COUNT:
                raise ValueError(f"{at} is {_short(value)}; at most {LARGEST_COUNT} can be followed")
            if keyword in NUMBERS and not -(2**63) <= value < 2**63:
                raise ValueError(f"{at} is {_short(value)}, which 64 bits do not hold")
            self.n_ranges += keyword in NUMBERS
            if self.n_ranges > MOST_RANGES:
                raise ValueError(f"the schema has more than {MOST_RANGES} limits of numbers")
        elif isinstance(value, (list, tuple)):
            if keyword == "type" and len(value) > len(TYPES):
                raise ValueError(f"{at} has {len(value)} entries; there are {len(TYPES)} types")
            if keyword in ("items", "prefixItems") and len(value) > MOST_ITEMS:
                raise ValueError(f"{at} has {len(value)} entries; at most {MOST_ITEMS} can be followed")
        elif isinstance(value, str) and keyword == "pattern":
            _check_pattern(value, at)
        elif isinstance(value, str) and keyword in REFERENCES:
            if "$id" in schema and (number or not value.startswith("#")):
                # From draft 2019-09 on "$id" says what the reference starts from; before, it counts for nothing there.
                raise ValueError(f"{at} stands beside '$id', which drafts of JSON Schema read differently")
            _check_reference(value, at)
            self.references.append((number, value))
            if len(self.references) > MOST_REFERENCES:
                raise ValueError(f"the schema has more than {MOST_REFERENCES} references ($ref)")
            return quote(value, safe="%#/:?&=+$,;@!*'()~[]")
        elif keyword in ("$id", "id") and number:
            self.one_base = False
        return value

    def _letters(self, text: str) -> None:
        self.n_letters += len(text)
        if self.n_letters > LONGEST:
            raise ValueError(f"the schema has texts of more than {LONGEST} characters together")


def _check_pattern(pattern: str, at: str) -> None:
    try:
        check_regex(pattern)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _check_reference(reference: str, at: str) -> None:
    """Raises ValueError if a reference leads into a value, which the walk does not check as a schema."""
    kind = SCHEMA
    for part in unquote(reference.partition("#")[2]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if kind == MEMBERS:
            kind = SCHEMA
        elif name in VALUES:
            raise ValueError(f"{at} leads into {name!r}, which holds values, not schemas")
        elif name in NAMES:
            kind = MEMBERS


def _check_number(value: int | float, place: str) -> None:
    """Raises ValueError if it is no number of JSON, or one that is not told from its neighbours."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the schema has {value} at {place}, which is no number of JSON")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"the schema has the number {_short(value)} at {place}, which 64 bits do not hold")


def _short(value: int | float) -> str:
    """A number in words that are not long: one of 5,000 digits cannot be written as text at all."""
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else "larger than 10**30"

"""JSON schemas from strangers: bounded before llguidance sees them, in one walk and without recursion."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from .pattern import check_regex

__all__ = ["checked_schema"]

DEEPEST = 64
MOST_VALUES = 20_000
MOST_REFERENCES = 1_000  # llguidance follows a chain of them with its stack: 2,000 fit, 50,000 end the process
MOST_PROPERTIES = 2_000  # of an object: their cost grows with the square, 0.17 s for these
LONGEST = 1_000_000  # characters of all texts
LARGEST_COUNT = 10_000
COUNTS = {f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties", "Contains")}
NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}


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
    root: list[Any] = [None]
    values: list[tuple[Any, int, str, Any, Any]] = [(schema, 0, "#", root, 0)]  # with where its copy is to be put
    n = n_references = n_letters = 0
    while values:
        value, level, place, into, key = values.pop()
        n += 1
        if level > DEEPEST:
            raise ValueError(f"the schema is nested deeper than {DEEPEST} levels at {place[:200]}")
        if n > MOST_VALUES:
            raise ValueError(f"the schema has more than {MOST_VALUES} values")
        texts = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        n_letters += sum(len(text) for text in texts if isinstance(text, str))
        if n_letters > LONGEST:
            raise ValueError(f"the schema has texts of more than {LONGEST} characters together")
        if isinstance(value, dict):
            copy: Any = {}
            if len(value) > MOST_PROPERTIES:
                raise ValueError(f"the schema has {len(value)} entries at {place[:200]}; at most {MOST_PROPERTIES}")
            for name, part in value.items():
                if not isinstance(name, str):
                    raise TypeError(f"the schema has a key that is no text at {place[:200]}: {name!r}")
                copy[name] = _checked(name, part, place)
                n_references += name in ("$ref", "$dynamicRef", "$recursiveRef")
                values.append((copy[name], level + 1, f"{place[:200]}/{name[:60]}", copy, name))
            into[key] = copy
            continue
        elif isinstance(value, (list, tuple)):
            copy = list(value)
            values.extend((part, level + 1, place, copy, i) for i, part in enumerate(value))
            into[key] = copy
            continue
        into[key] = value
    if n_references > MOST_REFERENCES:
        raise ValueError(f"the schema has {n_references} references ($ref); at most {MOST_REFERENCES} are followed")
    checked: dict[str, Any] = root[0]
    return checked


def _checked(keyword: str, value: Any, place: str) -> Any:
    """The value of what may be a keyword, if it is within the bounds."""
    at = f"{keyword!r} at {place[:200]}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if keyword in COUNTS and value > LARGEST_COUNT:
            raise ValueError(f"{at} is {_short(value)}; at most {LARGEST_COUNT} can be followed")
        if keyword in NUMBERS and not -(2**63) <= value < 2**63:
            raise ValueError(f"{at} is {_short(value)}, which 64 bits do not hold")
    elif isinstance(value, str) and keyword == "pattern":
        try:
            check_regex(value)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
    elif isinstance(value, str) and keyword == "$ref":
        return quote(value, safe="%#/:?&=+$,;@!*'()~[]")
    return value


def _short(value: int | float) -> str:
    """A number in words that are not long: one of 5,000 digits cannot be written as text at all."""
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else "larger than 10**30"

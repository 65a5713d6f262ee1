"""JSON schemas from strangers: bounded before llguidance sees them."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["checked_schema"]

_DEEPEST = 64
_MOST_VALUES = 20_000


def checked_schema(schema: Any) -> dict[str, Any]:
    """A schema that is within the bounds, as `json.loads` gives it.

    Args:
        schema: JSON text, or what `json.loads` makes of it.

    Raises:
        TypeError, ValueError: If it is no schema, or out of bounds; names the keyword and the place.
    """
    if isinstance(schema, (str, bytes, bytearray)):
        schema = json.loads(schema)
    values = [(schema, 0)]
    n = 0
    while values:
        value, level = values.pop()
        n += 1
        if level > _DEEPEST:
            raise ValueError(f"the schema is nested deeper than {_DEEPEST} levels")
        if n > _MOST_VALUES:
            raise ValueError(f"the schema has more than {_MOST_VALUES} values")
        if isinstance(value, dict):
            values.extend([(part, level + 1) for part in value.values()])
        elif isinstance(value, (list, tuple)):
            values.extend([(part, level + 1) for part in value])
    if schema is False:
        raise ValueError("the schema is false, which allows nothing")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise TypeError(f"a JSON schema must be an object, true or false, not {type(schema).__name__}")
    return schema

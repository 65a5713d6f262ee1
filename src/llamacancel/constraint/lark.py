"""Lark grammars from strangers: bounded before llguidance sees them."""

from __future__ import annotations

from .pattern import depth_of

__all__ = ["check_lark"]

_DEEPEST = 64

_LONGEST = 100_000


def check_lark(lark: object) -> str:
    """A Lark grammar that is within the bounds.

    Raises:
        TypeError, ValueError: If it is no text, or out of bounds.
    """
    if not isinstance(lark, str):
        raise TypeError(f"lark must be text, not {type(lark).__name__}")
    if len(lark) > _LONGEST:
        raise ValueError(f"the Lark grammar has {len(lark)} characters; at most {_LONGEST} are allowed")
    if depth_of(lark) > _DEEPEST:
        raise ValueError(f"the Lark grammar is nested deeper than {_DEEPEST}")
    if "%json" in lark:
        raise ValueError("the Lark grammar has a schema within it (%json): give json_schema instead")
    return lark

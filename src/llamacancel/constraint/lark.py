"""Lark grammars from strangers: bounded before llguidance sees them."""

from __future__ import annotations

__all__ = ["check_lark"]

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
    return lark

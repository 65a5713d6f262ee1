"""Regular expressions from strangers: bounded before llguidance sees them."""

from __future__ import annotations

__all__ = ["check_regex"]

_LONGEST = 10_000


def check_regex(regex: object) -> str:
    """A regular expression that is within the bounds.

    Raises:
        TypeError, ValueError: If it is no text, or out of bounds.
    """
    if not isinstance(regex, str):
        raise TypeError(f"regex must be text, not {type(regex).__name__}")
    if len(regex) > _LONGEST:
        raise ValueError(f"the regular expression has {len(regex)} characters; at most {_LONGEST} are allowed")
    return regex

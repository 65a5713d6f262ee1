"""Regular expressions from strangers: bounded before llguidance sees them."""

from __future__ import annotations

import re

__all__ = ["check_regex", "depth_of"]

LONGEST = 10_000
DEEPEST = 64
LARGEST_COUNT = 10_000


def check_regex(regex: object) -> str:
    """A regular expression that is within the bounds.

    Raises:
        TypeError, ValueError: If it is no text, or out of bounds.
    """
    if not isinstance(regex, str):
        raise TypeError(f"regex must be text, not {type(regex).__name__}")
    if len(regex) > LONGEST:
        raise ValueError(f"the regular expression has {len(regex)} characters; at most {LONGEST} are allowed")
    if depth_of(regex) > DEEPEST:
        raise ValueError(f"the regular expression is nested deeper than {DEEPEST}")
    for count in re.findall(r"[{,]\s*([0-9]+)", regex):
        if len(count) > 9 or int(count) > LARGEST_COUNT:
            raise ValueError(f"the regular expression repeats more than {LARGEST_COUNT} times: {{{count[:20]}}}")
    return regex


def depth_of(text: str) -> int:
    """How deep a text's brackets may be nested at most; those in texts and classes count, too."""
    deepest = depth = 0
    for c in text:
        if c in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in ")]}":
            depth = max(depth - 1, 0)
    return deepest

"""Regular expressions from strangers: bounded before llguidance sees them, which refuses deep ones by itself."""

from __future__ import annotations

import re

__all__ = ["check_counts", "check_regex"]

LONGEST = 10_000
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
    check_counts(regex, "the regular expression")
    return regex


def check_counts(text: str, what: str) -> None:
    """Raises ValueError if something is repeated too often (`{n}`, `{n,m}`, in Lark `~ n..m`), be it within a text."""
    counts = re.findall(r"\{\s*([0-9]*)\s*(?:,\s*([0-9]*)\s*)?\}|~\s*([0-9]+)(?:\s*\.\.\s*([0-9]+))?", text)
    for count in (count for group in counts for count in group if count):
        if len(count) > 9 or int(count) > LARGEST_COUNT:
            raise ValueError(f"{what} repeats more than {LARGEST_COUNT} times: {count[:20]}")

"""Lark grammars from strangers: bounded before llguidance sees them, which refuses deep rules by itself."""

from __future__ import annotations

from .pattern import check_counts

__all__ = ["check_lark"]

LONGEST = 20_000  # a text that is forced takes 6 us a letter, all of it for one mask
MOST_PARTS = 1_000
"""Rules and brackets: llguidance follows a chain of rules with its stack; of 8 MiB 2,500 take all."""


def check_lark(lark: object) -> str:
    """A Lark grammar that is within the bounds.

    Raises:
        TypeError, ValueError: If it is no text, or out of bounds.
    """
    if not isinstance(lark, str):
        raise TypeError(f"lark must be text, not {type(lark).__name__}")
    if len(lark) > LONGEST:
        raise ValueError(f"the Lark grammar has {len(lark)} characters; at most {LONGEST} are allowed")
    # A rule's name and its colon stand on one line; what only looks like a rule or a bracket, in a text, counts, too.
    n = sum(":" in line for line in lark.split("\n")) + sum(map(lark.count, "([{"))
    if n > MOST_PARTS:
        raise ValueError(f"the Lark grammar has {n} rules and brackets; at most {MOST_PARTS} are allowed")
    if "%json" in lark:
        raise ValueError("the Lark grammar has a schema within it (%json): give json_schema instead")
    check_counts(lark, "the Lark grammar")
    return lark

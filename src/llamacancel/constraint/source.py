"""What a constraint is made from: checked when it is given, compiled once per vocabulary."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from .lark import check_lark
from .matcher import FREE, LIMITS, Matcher, Vocabulary, compiled
from .pattern import check_regex
from .schema import checked_schema

__all__ = ["JSON_OPTIONS", "Source", "source_of"]


class Source:
    """A constraint whose size and shape are within the bounds.

    Args:
        what: How errors name it.
        grammar: What llguidance is given.
        limits: What following it may take.
    """

    def __init__(self, what: str, grammar: str, limits: dict[str, Any] = LIMITS) -> None:
        self._what = what
        self._grammar = grammar
        self._limits = limits
        self._lock = threading.Lock()
        self._compiled: tuple[Vocabulary, Matcher] | None = None

    def matcher(self, vocabulary: Vocabulary) -> Matcher:
        """A matcher at its beginning; compiles the first one for a vocabulary, and copies it for the next.

        Raises:
            ValueError: If llguidance cannot use it, or it takes more than the limits; says why.
        """
        with self._lock:
            if self._compiled is None or self._compiled[0] is not vocabulary:
                self._compiled = vocabulary, compiled(self._what, self._grammar, vocabulary, self._limits)
            return self._compiled[1].copy()


def source_of(*, json_schema: Any = None, regex: Any = None, lark: Any = None, grammar: Any = None) -> Source | None:
    """The constraint among a sampler's arguments, checked; None if there is none, or GBNF, which is llama.cpp's.

    Raises:
        TypeError, ValueError: If there is more than one, or it is out of bounds; says what is wrong, and where.
    """
    given = {"json_schema": json_schema, "regex": regex, "lark": lark, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"a sampler takes one of json_schema, regex, lark and grammar, not {' and '.join(names)}")
    if not names or names == ["grammar"]:
        return None
    value = given[names[0]]
    if isinstance(value, Source):
        return value
    make: Callable[[Any], Source] = {"json_schema": _of_schema, "regex": _of_regex, "lark": _of_lark}[names[0]]
    return make(value)


JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,20})"}
"""As llama.cpp's grammars of JSON: white space without end is what small models love."""


def _of_schema(schema: Any) -> Source:
    given = {**checked_schema(schema), "x-guidance": JSON_OPTIONS}
    return Source("the JSON schema", json.dumps({"grammars": [{"json_schema": given}]}))


def _of_regex(regex: Any) -> Source:
    check_regex(regex)
    from llguidance import LLMatcher

    return Source("the regular expression", LLMatcher.grammar_from_regex(regex))


def _of_lark(lark: Any) -> Source:
    check_lark(lark)
    return Source("the Lark grammar", json.dumps({"grammars": [{"lark_grammar": lark}]}), FREE)

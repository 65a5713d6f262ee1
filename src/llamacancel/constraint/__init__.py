"""Constraints: what a text has to be, as a JSON schema, a regular expression or a Lark grammar, by llguidance.

What a stranger writes is bounded before llguidance sees it (`schema`, `pattern`, `lark`), and llguidance has limits of
its own (`matcher.LIMITS`): it cannot be interrupted, so that each of its steps has to be short.
"""

from .matcher import Matcher, Vocabulary
from .schema import checked_schema
from .source import JSON_OPTIONS, Source, source_of

__all__ = ["JSON_OPTIONS", "Matcher", "Source", "Vocabulary", "checked_schema", "source_of"]

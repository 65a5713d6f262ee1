"""Constraints: what a text has to be, as a JSON schema, a regular expression or a Lark grammar, by llguidance.

What a stranger writes is bounded before llguidance sees it (`schema`, `pattern`, `lark`), and llguidance has limits of
its own (`matcher.LIMITS`): it cannot be interrupted, so that each of its steps has to be short.
"""

from .matcher import Matcher, Vocabulary
from .source import Source, calls_of, source_of

__all__ = ["Matcher", "Source", "Vocabulary", "calls_of", "source_of"]

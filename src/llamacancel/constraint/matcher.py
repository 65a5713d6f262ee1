"""llguidance's matcher over a model's vocabulary, with its errors in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Facts = tuple[list[bytes], list[int], list[int], Callable[[str], list[int]]]

__all__ = ["FREE", "LIMITS", "Matcher", "Vocabulary", "compiled"]

LIMITS: dict[str, Any] = {
    "verbose_errors": False,
    "max_items_in_row": 5_000,  # an object takes 4 for each optional property; each item is compared with each
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,  # of these, 500 optional properties take 40,000 behind a value of any kind, 24 ms
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
}
"""What a constraint may take of llguidance: the making of its lexer, a step's lexer (200,000 took 0.6 s in merged
`multipleOf`, 20,000 ended `a.{60}b`), a step's items, states of the lexer (1 to 2 kB each), symbols of the grammar."""


class Vocabulary:
    """A model's tokens as llguidance needs them; made on first use, once for a model.

    Args:
        read: Gives the bytes that each token adds to a text, the tokens that add none, those that end a text, and a
            function for the tokens of a text. Called once.
    """

    def __init__(self, read: Callable[[], Facts]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    @property
    def end(self) -> int:
        """A token that ends a text."""
        return self.tokenizer.eos_token

    @property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer. The first call takes about a second for each 100,000 tokens."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(*self._read())
            return self._tokenizer


class _Tokens:
    """The attributes that `LLTokenizer` asks for."""

    is_tokenizer_wrapper = True
    _MARK = "\x02"  # a text that no word begins with

    def __init__(
        self, pieces: Sequence[bytes], special: Sequence[int], end: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = pieces
        self.special_token_ids = special
        self.eos_token_id = end
        self.bos_token_id = None
        self._encode = encode
        try:
            self._mark = encode(self._MARK)
        except ValueError:
            self._mark = []

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are the text's, which llguidance relies on.

        Some vocabularies put a space before a text: then what follows a mark is taken, which no space is put before.
        Others change the text (capitals, accents): for those there are no tokens, and nothing that is forced is known.
        """
        data = text.encode("utf-8", "replace")
        n = len(self._mark)
        try:
            for tokens in (self._encode(text), self._encode(self._MARK + text)[n:]):
                if b"".join(self.tokens[token] for token in tokens) == data:
                    return tokens
        except ValueError:  # the vocabulary cannot express it
            pass
        return []


def _tokenizer(
    pieces: list[bytes], special: list[int], ends: list[int], encode: Callable[[str], list[int]]
) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer
    except ModuleNotFoundError as error:
        raise ImportError("json_schema, regex and lark need llguidance: pip install 'llguidance>=1.9,<2'") from error
    if not ends:
        raise ValueError("the vocabulary has no token that ends a text, so that nothing can follow a constraint")
    wrapper: Any = _Tokens(pieces, special, ends[0], encode)
    return LLTokenizer(wrapper, n_vocab=len(pieces), eos_token=ends)


class Matcher:
    """Where a text stands in its constraint. One thread uses it at a time."""

    __slots__ = ("_native", "_what", "vocabulary")

    def __init__(self, what: str, native: LLMatcher, vocabulary: Vocabulary) -> None:
        self._what = what
        self._native = native
        self.vocabulary = vocabulary

    @property
    def native(self) -> LLMatcher:
        """For `LLExecutor`."""
        return self._native

    def check(self) -> None:
        """Raises ValueError if the constraint has failed, with the reason."""
        if self._native.is_error():
            raise ValueError(f"{self._what} cannot be followed any further: {_first_line(self._native.get_error())}")

    def fill(self, address: int, size: int) -> None:
        """Writes the mask of the tokens that may come next to memory, a bit for each; without the interpreter lock."""
        self.check()
        self._native.unsafe_compute_mask_ptr(address, size)
        self.check()

    @property
    def stopped(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._native.is_stopped()

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        return self._native.validate_tokens([token]) == 1

    def take(self, token: int) -> None:
        """Goes on behind a token.

        Raises:
            ValueError: If the token may not come here, or the constraint takes more than the limits.
        """
        if not self._native.consume_token(token):
            self.check()

    def forced(self) -> list[int]:
        """The tokens that have to come next; often none."""
        return self._native.compute_ff_tokens()

    def copy(self) -> Matcher:
        return Matcher(self._what, self._native.deep_copy(), self.vocabulary)


FREE = {**LIMITS, "step_max_items": 20_000}
"""For grammars that a stranger wrote himself: ambiguous ones take 30 ms for so many items, and 130 ms for 50,000."""


def compiled(what: str, grammar: str, vocabulary: Vocabulary, limits: dict[str, Any] = LIMITS) -> Matcher:
    """A matcher at its beginning.

    Raises:
        ValueError: If llguidance cannot use the constraint, or it takes more than the limits.
    """
    tokenizer = vocabulary.tokenizer
    from llguidance import LLMatcher, LLParserLimits

    native = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    if native.is_error():
        raise ValueError(f"{what} cannot be used: {_first_line(native.get_error())}")
    return Matcher(what, native, vocabulary)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]

"""A generation: the text and tokens of a request as they come, and an embedding, which comes at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cancel import CancelToken
from ..llama import Model, Sampler
from .faults import for_a_reader
from .handle import Handle
from .masks import Mask
from .scheduler import FinishReason, Request
from .text import TextAssembler
from .usage import Usage
from .work import Work

__all__ = [
    "Embedding",
    "EmbeddingWork",
    "Generation",
    "GenerationResult",
    "GenerationWork",
    "Piece",
    "TokenInfo",
    "Vocabulary",
]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token that was generated.

    Attributes:
        id: Its id.
        piece: Its bytes, which may be part of a character.
        logprob: Natural logarithm of the probability that the model gave it, before the sampler changed anything;
            None if `logprobs` was not asked for.
        top: The likeliest tokens in its place: id, bytes and logprob, the first one first.
    """

    id: int
    piece: bytes
    logprob: float | None = None
    top: tuple[tuple[int, bytes, float], ...] = ()


class Piece(str):
    """Text that became final.

    Attributes:
        tokens: The tokens that it completes. Together the pieces of a generation have each of its tokens once.
    """

    __slots__ = ("tokens",)
    tokens: tuple[TokenInfo, ...]

    def __new__(cls, text: str, tokens: Iterable[TokenInfo] = ()) -> Piece:
        piece = super().__new__(cls, text)
        piece.tokens = tuple(tokens)
        return piece


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A generation that came to its end.

    Attributes:
        text: The text, without the stop string.
        tokens: The tokens of that text.
        finish_reason: "stop" or "length".
        stop_sequence: The stop string that ended it, if one did.
        usage: Tokens and seconds.
    """

    text: str
    tokens: tuple[TokenInfo, ...]
    finish_reason: FinishReason
    stop_sequence: str | None
    usage: Usage


class Vocabulary:
    """The bytes of a model's tokens, looked up once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[int, tuple[bytes, bytes, bool]] = {}

    def __getitem__(self, token: int) -> tuple[bytes, bytes, bool]:
        """What a token adds to the text, its bytes with the names of control tokens, and whether it ends the text."""
        known = self._known.get(token)
        if known is None:
            model = self._model
            known = (model.token_to_piece(token, False), model.token_to_piece(token), model.is_eog(token))
            self._known[token] = known
        return known


class GenerationWork(Work):
    """The engine's half of a generation: chooses what to say, and makes text of it."""

    def __init__(
        self,
        request: Request,
        token: CancelToken,
        *,
        vocabulary: Vocabulary,
        sampler: Sampler,
        stop: tuple[str, ...] = (),
        stop_tokens: frozenset[int] = frozenset(),
        logprobs: int | None = None,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(request, token)
        self.vocabulary: Vocabulary | None = vocabulary
        self.sampler: Sampler | None = sampler
        self.assembler: TextAssembler[TokenInfo] = TextAssembler(stop)
        self.pieces: list[Piece] = []
        self.unread: deque[Piece] = deque()
        self._stop_tokens = stop_tokens
        self._shown_tokens = shown_tokens
        self.logprobs = logprobs
        self.mask: Mask | None = None  # what is being computed of what its constraint allows next

    @property
    def readable(self) -> bool:
        return bool(self.unread)

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> bool:
        """Adds a token that was chosen, with what was told of its probability; tells whether it ends the text."""
        assert self.vocabulary is not None
        vocabulary = self.vocabulary
        text, name, is_end = vocabulary[token]
        if is_end or token in self._stop_tokens:
            return True
        if token in self._shown_tokens:
            text = name
        likeliest = tuple((each, vocabulary[each][1], value) for each, value in top)
        self._give(*self.assembler.feed(text, TokenInfo(token, name, logprob, likeliest)))
        return self.assembler.stopped is not None

    def finish(self, reason: FinishReason, now: float, error: Exception | None = None) -> None:
        if reason in ("stop", "length") and not self.ended:
            try:
                self._give(*self.assembler.finish())
            except BaseException as problem:
                reason, error = "error", for_a_reader(problem)
        super().finish(reason, now, error)

    def let_go(self) -> None:
        """Its sampler and its vocabulary hold the model."""
        super().let_go()
        self.sampler = self.vocabulary = None

    def _give(self, text: str, tokens: list[TokenInfo]) -> None:
        if text or tokens:
            piece = Piece(text, tokens)
            self.pieces.append(piece)
            self.unread.append(piece)


class Generation(Handle[GenerationWork]):
    """Text that is being generated. Made by `Engine.submit`.

    Iterate over it for the pieces of text as they become final, or ask for its `result()`. It goes on by itself,
    whether somebody reads or not, until it is finished or cancelled, or nobody holds it any more.
    """

    _what = "generation"

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(tuple(self._work.pieces))

    @property
    def tokens(self) -> tuple[TokenInfo, ...]:
        """The tokens of the text so far."""
        return tuple(token for piece in tuple(self._work.pieces) for token in piece.tokens)

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._work.assembler.stopped

    @property
    def finished(self) -> bool:
        """True once it has ended and all pieces were read."""
        return self._work.ended and not self._work.unread

    def poll(self) -> Piece | None:
        """The next piece if there is one now; None if not, see `finished`."""
        try:
            return self._work.unread.popleft()
        except IndexError:
            return None

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The next piece; waits for it.

        Raises:
            DecodeCancelled: At the end, if it was cancelled; `DeadlineExceeded` if a deadline was the cause.
            LlamaCancelError: At the end, if it failed.
        """
        while True:
            self._await_or_stop(lambda: self._work.readable or self._work.ended)
            piece = self.poll()
            if piece is not None:
                return piece
            if self.finished:  # and not that another reader was faster
                self.raise_if_failed()
                raise StopIteration

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end, and tell all of it.

        Raises:
            TimeoutError: If it was not finished in time. It goes on.
            DecodeCancelled: If it was cancelled.
            LlamaCancelError: If it failed.
        """
        if not self._await_or_stop(lambda: self._work.ended, timeout):
            raise TimeoutError(f"generation {self.id} was not finished within {timeout} s; it goes on")
        self.raise_if_failed()
        reason = self.finish_reason
        assert reason is not None
        return GenerationResult(self.text, self.tokens, reason, self.stop_sequence, self.usage)


class EmbeddingWork(Work):
    """The engine's half of an embedding."""

    vector: NDArray[np.float32] | None = None


class Embedding(Handle[EmbeddingWork]):
    """The embedding of a text. Made by `Engine.embed`."""

    _what = "embedding"

    def result(self, timeout: float | None = None) -> NDArray[np.float32]:
        """Wait for it: float32 of shape (n_embd,).

        Raises:
            TimeoutError: If it was not there in time. It goes on.
            DecodeCancelled: If it was cancelled.
            LlamaCancelError: If it failed.
        """
        if not self._await_or_stop(lambda: self._work.ended, timeout):
            raise TimeoutError(f"embedding {self.id} was not finished within {timeout} s; it goes on")
        self.raise_if_failed()
        vector = self._work.vector
        assert vector is not None
        return vector

"""A conversation that is being answered: thinking, content and tool calls as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType

from ..chat import ChatDelta, ChatMessage, ChatReader
from .generation import Generation, Piece

__all__ = ["Conversation"]


class Conversation:
    """An answer that is being written. Made by `Engine.chat`.

    Iterate over it for its deltas as they become certain, or ask for its `result()`. What is read is read on the thread
    that asks, under the request's token.

    Attributes:
        generation: The text below it, which is cancelled and timed as any other.
    """

    def __init__(self, generation: Generation, reader: ChatReader) -> None:
        self.generation = generation
        self._reader = reader
        self._deltas: deque[ChatDelta] = deque()
        self._ended = False

    @property
    def id(self) -> str:
        """The request's name."""
        return self.generation.id

    @property
    def finish_reason(self) -> str | None:
        """As the generation's, but "tool_calls" where it has stopped after calls and was read to its end."""
        reason = self.generation.finish_reason
        return "tool_calls" if reason == "stop" and self._ended and self.message.tool_calls else reason

    @property
    def message(self) -> ChatMessage:
        """The message as far as it was read."""
        return self._reader.message

    def cancel(self, reason: str = "") -> bool:
        """Stop it. True for the first cancel of an unfinished one."""
        return self.generation.cancel(reason)

    def take(self, piece: Piece) -> list[ChatDelta]:
        """The deltas of a piece of the generation, for whoever reads that himself."""
        return self._reader.feed(str(piece), self.generation._token)

    def end(self) -> list[ChatDelta]:
        """The last deltas, once all pieces were taken."""
        self._ended = True
        return self._reader.end()

    def __iter__(self) -> Iterator[ChatDelta]:
        return self

    def __next__(self) -> ChatDelta:
        """The next delta; waits for it.

        Raises:
            DecodeCancelled: At the end, if it was cancelled; `DeadlineExceeded` if a deadline was the cause.
            ChatError: If the answer cannot be read: it is nested too deep.
            LlamaCancelError: At the end, if it failed.
        """
        while not self._deltas:
            if self._ended:
                raise StopIteration
            try:
                self._deltas += self.take(next(self.generation))
            except StopIteration:
                self._deltas += self.end()
        return self._deltas.popleft()

    def result(self, timeout: float | None = None) -> ChatMessage:
        """Wait for the end, and give the message. Deltas that were not iterated over are read, too.

        Raises:
            TimeoutError: If it was not finished in time. It goes on.
            DecodeCancelled: If it was cancelled.
            ChatError, LlamaCancelError: As for iterating.
        """
        self.generation.result(timeout)
        while (piece := self.generation.poll()) is not None:
            self.take(piece)
        if not self._ended:
            self.end()
        self._deltas.clear()
        return self.message

    def __enter__(self) -> Conversation:
        self.generation.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.generation.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<Conversation {self.id} {self.generation.finish_reason or self.generation.state}>"

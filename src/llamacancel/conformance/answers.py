"""Comparing an answer with its reference: to the letter where the server repeats itself, by length otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from .call import Call

__all__ = ["Answer", "flaw", "shortfall"]


@dataclass(frozen=True)
class Answer:
    """What a request gave when nothing disturbed it.

    Args:
        text: The text.
        n_tokens: How many tokens were generated.
        counted: Whether the server counted them; otherwise they are pieces of text.
        n_pieces: How many pieces of text a stream brought.
        finish_reason: What the server gave as such.
        seconds: From sending to the end.
        time_to_first_token: Of a stream; None otherwise.
    """

    text: str
    n_tokens: int
    counted: bool
    n_pieces: int
    finish_reason: str | None
    seconds: float
    time_to_first_token: float | None

    @classmethod
    def of(cls, call: Call) -> Answer:
        """Take a call's answer.

        Raises:
            ValueError: The call has no whole answer.
        """
        if not call.answered or call.seconds is None:
            raise ValueError(f"{call.name} has no whole answer: {call.error}")
        return cls(
            call.text,
            call.n_tokens,
            call.counts_tokens,
            len(call.pieces),
            call.finish_reason,
            call.seconds,
            call.time_to_first_token,
        )


def shortfall(call: Call, reference: Answer) -> str | None:
    """Say what is missing in an answer that must at least be whole; None if nothing is."""
    if call.ended is None:
        return f"{call.name!r} was not answered: {_so_far(call)}, then nothing more came"
    if not call.answered:
        return f"{call.name!r} got no whole answer: {call.error or 'it was cut off'}, after {_so_far(call)}"
    enough = reference.n_tokens if reference.counted and call.counts_tokens else int(0.8 * reference.n_tokens)
    if reference.finish_reason == "stop" and call.finish_reason == "stop" and call.text:
        return None
    if not call.request.stream and not call.counts_tokens:
        enough = 1  # the whole answer is one piece, and the server does not count
    if call.n_tokens < enough:
        return f"{call.name!r} was cut short: {call.n_tokens} of {reference.n_tokens} tokens, as {call.finish_reason!r}"
    return None


def flaw(call: Call, reference: Answer) -> str | None:
    """Say where a whole answer differs from the reference; None if nowhere."""
    if call.text != reference.text:
        same = next(
            (i for i, (a, b) in enumerate(zip(call.text, reference.text, strict=False)) if a != b),
            min(len(call.text), len(reference.text)),
        )
        return (
            f"the answer of {call.name!r} differs from its reference from character {same} on: "
            f"{call.text[same : same + 24]!r} instead of {reference.text[same : same + 24]!r}"
        )
    if call.finish_reason != reference.finish_reason:
        return f"{call.name!r} ended as {call.finish_reason!r} instead of {reference.finish_reason!r}"
    return None


def _so_far(call: Call) -> str:
    if not call.pieces:
        return "no text"
    return f"{len(call.pieces)} pieces of text"

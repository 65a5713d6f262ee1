"""What a request took."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and seconds of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: How many of them were in memory already.
        completion_tokens: Tokens that were generated, those of a stop string and of the end included.
        queue_seconds: From `submit()` to its slot.
        prompt_seconds: From there to its first token.
        decode_seconds: From there to its end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    prompt_seconds: float
    decode_seconds: float

"""Log probabilities in the two forms that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...engine import TokenInfo

__all__ = ["chat_logprobs", "completion_logprobs"]

LEAST = -9999.0
"""What JSON has in place of minus infinity; OpenAI's number."""


def _finite(value: float | None) -> float:
    return value if value is not None and value >= LEAST else LEAST  # NaN is not


def _label(piece: bytes) -> str:
    """A token's text; of one that is part of a character, its bytes, as OpenAI writes them."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _entry(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def chat_logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """As `choices[].logprobs` of chat completions."""
    content = [
        {
            **_entry(token.piece, token.logprob),
            "top_logprobs": [_entry(piece, logprob) for _, piece, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
    """As `choices[].logprobs` of completions.

    Args:
        tokens: Tokens of the answer.
        offset: Characters of the answer before them.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.piece.decode("utf-8", "ignore"))
    return {
        "tokens": [_label(token.piece) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{_label(piece): _finite(logprob) for _, piece, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }

"""What the memory holds under one sequence id."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence of the context: a slot that requests run in, or a place for a checkpoint.

    Attributes:
        id: The sequence id.
        tokens: Tokens, of which the memory holds the first `held`. A running request's own list.
        held: How many of them it holds.
        peak: The most that it has held since it was last empty: a sliding window has let go of what lies
            further back than its width from there.
        request: The request that runs in it, if one does.
        used_at: When it was last of use, in seconds.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    request: Request | None = None
    used_at: float = 0.0

    def hold(self, tokens: list[int], held: int, peak: int) -> None:
        self.tokens, self.held, self.peak = tokens, held, peak

    def forget(self) -> None:
        self.tokens, self.held, self.peak = [], 0, 0

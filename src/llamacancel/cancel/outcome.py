"""What a call tells that was cancelled."""

from __future__ import annotations

from ..errors import (
    DeadlineExceeded,
    DecodeCancelled,
    LoadCancelled,
    LoadDeadlineExceeded,
    SequenceOutcome,
)
from .token import Cause

__all__ = ["cancelled_error"]


def cancelled_error(
    what: str,
    cause: Cause,
    reason: str,
    latency: float,
    *,
    sequences: dict[int, SequenceOutcome] | None = None,
    survivors: list[int] | None = None,
    rows_done: int = 0,
    repair_seconds: float = 0.0,
    kind: type[DecodeCancelled] | None = None,
) -> DecodeCancelled:
    """The exception for a call that was cancelled; a `DeadlineExceeded` if a deadline was the cause."""
    if kind is None:
        kind = DeadlineExceeded if cause is Cause.DEADLINE else DecodeCancelled
    elif kind is LoadCancelled and cause is Cause.DEADLINE:
        kind = LoadDeadlineExceeded
    text = f"{what} cancelled: {cause.value}" + (f" {reason!r}" if reason else "")
    return kind(
        f"{text} (honoured in {latency * 1e3:.1f} ms)",
        cause=cause,
        reason=reason,
        latency=latency,
        sequences=sequences,
        survivors=survivors or [],
        rows_done=rows_done,
        repair_seconds=repair_seconds,
    )

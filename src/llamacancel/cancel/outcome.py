"""What a call tells that was cancelled."""

from __future__ import annotations

from ..errors import (
    DeadlineExceeded,
    DecodeCancelled,
    LlamaCancelError,
    LoadCancelled,
    LoadDeadlineExceeded,
    SequenceOutcome,
)
from .token import Cause

__all__ = ["cancelled_error", "for_a_reader", "is_lost"]

_LOST = "the connection to the RPC server"  # how the core says that a model is lost, and every context with it


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


def for_a_reader(error: BaseException) -> Exception:
    """What a reader is told. A `KeyboardInterrupt` or `SystemExit` that was raised here is none of his thread's."""
    if isinstance(error, Exception):
        return error
    told = LlamaCancelError(f"the request failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def is_lost(error: BaseException) -> bool:
    """Whether a call failed because its model is lost."""
    return str(error).startswith(_LOST)

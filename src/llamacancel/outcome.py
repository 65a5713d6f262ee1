"""What a decode tells: the result of one that ran, the exception of one that did not."""

from __future__ import annotations

from dataclasses import dataclass

from ._cancel import Cause
from .errors import DeadlineExceeded, DecodeCancelled, LoadCancelled, LoadDeadlineExceeded, SequenceOutcome

__all__ = ["DecodeResult", "cancelled_error"]

STATES = ("completed", "rolled_back", "kept", "dirty")  # in the order of the native SequenceState


@dataclass(slots=True)
class DecodeResult:
    """A decode that ran to its end, for every sequence or for those that were not cancelled.

    Attributes:
        rows_done: Rows of the batch that the context now holds.
        n_ubatches: Pieces in which they were computed.
        seconds: Time that the native call took.
        repair_seconds: Part of it spent on rolling back cancelled sequences.
        snapshot_bytes: What was saved so that the call could have been rolled back.
        sequences: For each sequence id of the batch, what the context now holds of it.
        survivors: Sequence ids that were not cancelled.
    """

    rows_done: int
    n_ubatches: int
    seconds: float
    repair_seconds: float
    snapshot_bytes: int
    sequences: dict[int, SequenceOutcome]
    survivors: list[int]


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

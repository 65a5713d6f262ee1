"""The exceptions of llamacancel, all under `LlamaCancelError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .cancel import Cause

__all__ = [
    "ChatError",
    "ClosedError",
    "ContextBusyError",
    "ContextError",
    "DeadlineExceeded",
    "DecodeCancelled",
    "DecodeFailedError",
    "DirtySequenceError",
    "InvalidBatchError",
    "LlamaCancelError",
    "LoadCancelled",
    "LoadDeadlineExceeded",
    "MemoryFullError",
    "ModelLoadError",
    "QueueFullError",
    "SequenceOutcome",
    "StateError",
]


@dataclass(slots=True)
class SequenceOutcome:
    """What a call left of one sequence.

    Attributes:
        state: "completed" (every row was decoded), "rolled_back" (as before the call), "kept" (decoded
            up to `end`), or "dirty" (could not be repaired; clear it before its next use). Where the call went on
            for others, a rolled back sequence of a sliding window may have lost to them what no next token looks at,
            as it may to any call that needs room: `memory.pos_min` is larger then.
        start: Position of the sequence's first row in the batch.
        end: The position that follows the last one that the context now holds: the next row goes here.
        cancelled: True if the sequence's own token was cancelled.
    """

    state: Literal["completed", "rolled_back", "kept", "dirty"]
    start: int
    end: int
    cancelled: bool


class LlamaCancelError(Exception):
    """Base class of all exceptions of llamacancel."""


class ChatError(LlamaCancelError, ValueError):
    """A chat template, messages, tools or what is asked with them cannot be used; says why."""


class DecodeCancelled(LlamaCancelError):
    """A call was cancelled.

    Attributes:
        cause: Why: `Cause.CLIENT`, `DEADLINE`, `INTERRUPT` or `SHUTDOWN`.
        reason: The text given to `cancel()`, or "".
        latency: Seconds from `cancel()` (or the deadline, or the signal handler that raised) to the end of the
            native call, repair included.
        sequences: For each sequence id of the batch, what the context now holds of it.
        survivors: Sequence ids whose token was not cancelled; they were stopped with the others.
        rows_done: Rows of the batch that the context holds now: 0 after a rollback.
        repair_seconds: The part of the latency that the repair took.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: Cause,
        reason: str = "",
        latency: float = 0.0,
        sequences: Mapping[int, SequenceOutcome] | None = None,
        survivors: Sequence[int] = (),
        rows_done: int = 0,
        repair_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.reason = reason
        self.latency = latency
        self.sequences = dict(sequences or {})
        self.survivors = list(survivors)
        self.rows_done = rows_done
        self.repair_seconds = repair_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), str(self), self.__dict__)


def _restored(kind: type[DecodeCancelled], message: str, attributes: dict[str, Any]) -> DecodeCancelled:
    """The copy of an exception, as it comes out of another process."""
    error = kind(message, cause=attributes["cause"])
    error.__dict__.update(attributes)
    return error


class DeadlineExceeded(DecodeCancelled, TimeoutError):
    """A call's deadline passed; also a `TimeoutError`."""


class LoadCancelled(DecodeCancelled):
    """Loading a model was cancelled; nothing of it is left in memory."""


class LoadDeadlineExceeded(LoadCancelled, DeadlineExceeded):
    """Loading a model took longer than its deadline; also a `TimeoutError`."""


class ContextBusyError(LlamaCancelError):
    """The context is in use by another thread, and no token was given to wait under."""


class ClosedError(LlamaCancelError):
    """The object was closed, or belongs to the process that this one was forked from."""


class DirtySequenceError(LlamaCancelError):
    """The sequence's state could not be repaired; `memory.remove(seq)` or `memory.clear()` makes it usable.

    Attributes:
        seq_ids: The dirty sequences that the call named.
    """

    def __init__(self, message: str, seq_ids: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.seq_ids = list(seq_ids)


class MemoryFullError(LlamaCancelError):
    """The context's memory has no room for the batch (no KV slot); the context is as before the call."""


class InvalidBatchError(LlamaCancelError, ValueError):
    """The batch cannot be decoded in this context as it is; nothing was decoded."""


class ModelLoadError(LlamaCancelError):
    """The model or adapter file cannot be used."""


class DecodeFailedError(LlamaCancelError):
    """llama.cpp could not compute the batch; the context is as before the call unless the text says otherwise."""


class QueueFullError(LlamaCancelError):
    """The engine's queue is full; try again later."""


class ContextError(LlamaCancelError):
    """llama.cpp could not make a context with these arguments."""


class StateError(LlamaCancelError, ValueError):
    """The bytes are no saved state of this kind of context, or they were damaged; nothing was changed."""

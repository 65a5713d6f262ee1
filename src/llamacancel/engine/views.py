"""What an engine tells of itself: frozen pictures of one moment, for any thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .scheduler import FinishReason, RequestState

__all__ = ["EngineSnapshot", "RequestView", "SlotView"]


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request at one moment. Times are `time.monotonic()` seconds, or None if that has not happened.

    Attributes:
        id: Its name.
        kind: "generation" or "embedding".
        state: "queued", "prefill", "decode" or "finished".
        waits_for_memory: It could go on but for memory, which others hold: the first in line though a slot is idle, one
            that had to make room, or one whose prompt finds no cells.
        priority: Higher goes first.
        slot: The slot that it runs in, or ran in; None if it never had one.
        prompt_tokens: Tokens of its prompt.
        prompt_done: How many of them are computed.
        cached_tokens: How many of them were in memory when it started.
        completion_tokens: Tokens generated so far.
        finish_reason: "stop", "length", "cancelled", "deadline", "shutdown", "error"; None while unfinished.
        cause: Why it was cancelled, as the value of a `Cause`; None if it was not.
        reason: The text given to `cancel()`, or the error.
        cancel_latency: Seconds from the cancel (or the deadline) to its slot being free.
    """

    id: str
    kind: Literal["generation", "embedding"]
    state: RequestState
    waits_for_memory: bool
    priority: int
    slot: int | None
    prompt_tokens: int
    prompt_done: int
    cached_tokens: int
    completion_tokens: int
    submitted_at: float
    started_at: float | None
    first_token_at: float | None
    finished_at: float | None
    finish_reason: FinishReason | None
    cause: str | None
    reason: str
    cancel_latency: float | None


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot at one moment: what runs in it, and the positions that its sequence holds."""

    id: int
    state: Literal["idle", "prefill", "decode"]
    request_id: str | None
    n_past: int


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment.

    Attributes:
        slots: All slots.
        queue: Requests that wait, the first in line first.
        active: Requests that run.
        recent: The last ones that finished, oldest first.
        steps: Steps run so far.
        queue_limit: Requests that may wait.
        closing: True once `close()` was called.
        cells_used, cells: Cells of the context's memory in use, and all; None if they are not counted.
        schedule_seconds, run_seconds, commit_seconds: Time spent so far on planning steps, running them, and
            handing out what came of them. Batches of texts to embed run beside steps, and count as such.
        decode_seconds: The part of `run_seconds` that llama.cpp computed.
    """

    slots: tuple[SlotView, ...]
    queue: tuple[RequestView, ...]
    active: tuple[RequestView, ...]
    recent: tuple[RequestView, ...]
    steps: int
    queue_limit: int
    closing: bool
    cells_used: int | None
    cells: int | None
    schedule_seconds: float
    run_seconds: float
    commit_seconds: float
    decode_seconds: float

"""What the scheduler knows about a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FinishReason", "Request", "RequestState"]

RequestState = Literal["queued", "prefill", "decode", "finished"]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "shutdown", "error"]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt to be continued, or to be embedded, and how far it has come.

    Attributes:
        id: Its name, for people: a request is told from another by itself.
        tokens: The prompt, and after it what was generated.
        kind: "generation" or "embedding".
        max_tokens: Most tokens to generate; None for no limit but the context's.
        priority: Higher goes first.
        n_prompt: Tokens of the prompt.
        slot, last_slot: The slot that it runs in; the one that it ran in last.
        held: Tokens that the memory holds of it.
        cached_tokens: Tokens of the prompt that were there when it was first given a slot.
        place: Its place in the line for the next rows, as a time: earlier goes first.
        turn: Prompt rows that it may still have before it goes to the end of that line.
        checkpoints: Lengths at which its state is to be kept for others, the last one first.
        waits_for_memory: The last plan left it out because there were no cells for it.
        passed_over: Steps in a row that were stopped before they came to its rows.
        suspect: It was in a step that failed, and is run alone until that is cleared up.
        owner: Whose it is; nothing to the scheduler.
    """

    id: str
    tokens: list[int]
    kind: Literal["generation", "embedding"] = "generation"
    max_tokens: int | None = None
    priority: int = 0
    number: int = 0
    n_prompt: int = 0
    state: RequestState = "queued"
    slot: int | None = None
    last_slot: int | None = None
    held: int = 0
    cached_tokens: int = 0
    place: float = 0.0
    turn: int = 0
    checkpoints: list[int] = field(default_factory=list)
    waits_for_memory: bool = False
    passed_over: int = 0
    suspect: bool = False
    preemptions: int = 0
    owner: Any = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    submitted_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def rows_left(self) -> int:
        """Rows to compute before the next token can be chosen."""
        return len(self.tokens) - self.held

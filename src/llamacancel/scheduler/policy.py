"""Who goes first, and how many rows a step has. Functions of what they are given, and one running measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Limits", "Pace", "abort_when", "place_of", "prompt_budget", "share"]

_LEAST_ROWS = 32  # of a prompt in a step, however slow the machine is
_ALONE = 5  # steps may be so many times longer while nobody generates: only newcomers wait for their end
_GO_ON_SECONDS = 0.05  # a step this short is finished without the rows of those who were cancelled
_PATIENCE = 0.5  # seconds that stopped steps may cost the others at once
_PATIENCE_SHARE = 0.1  # and of the time in the long run


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler has to keep to.

    Attributes:
        slots: Requests that run at the same time.
        queue_limit: Requests that may wait beside those that can start at once.
        n_ctx: Most tokens of a request, prompt and answer.
        n_batch: Most rows of a step.
        n_ubatch: Rows that are computed at a time.
        step_seconds: What a step should take while requests generate; None: prompts take all of `n_batch`.
        quantum: Rows of one prompt before the next one in line has its turn.
        aging: Seconds of waiting that are worth one level of priority.
        embed_rows: Most rows of a batch of embeddings; 0 if there are none.
        embed_sequences: Most requests in such a batch.
        prefix_cache: Keep what finished requests have left in memory, for those that begin alike.
    """

    slots: int
    queue_limit: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    step_seconds: float | None = 0.1
    quantum: int = 512
    aging: float = 5.0
    embed_rows: int = 0
    embed_sequences: int = 1
    prefix_cache: bool = True


def place_of(limits: Limits, priority: int, now: float) -> float:
    """The place in a line of a request that joins it now.

    Each level of priority is worth `aging` seconds of waiting. So the order of two requests never changes while they
    wait, and nobody is overtaken for ever by those who come later.
    """
    return now - priority * limits.aging


class Pace:
    """A running measure of how long rows take.

    Attributes:
        row_seconds: Of one prompt row; None until one was seen.
        step_seconds: Of a step without prompt rows.
        patience: Seconds that steps stopped for somebody else's cancel may still cost.
    """

    __slots__ = ("patience", "row_seconds", "step_seconds")

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self.row_seconds: float | None = None
        self.step_seconds = 0.0
        self.patience = _PATIENCE

    def observe(self, prompt_rows: int, other_rows: int, seconds: float) -> None:
        """A step with so many rows took so long."""
        self.patience = min(self.patience + _PATIENCE_SHARE * seconds, _PATIENCE)
        if prompt_rows == 0:
            self.step_seconds += self._WEIGHT * (seconds - self.step_seconds) if self.step_seconds else seconds
        elif prompt_rows >= 8:
            base = min(self.step_seconds, seconds / 2) if other_rows else 0.0
            measured = (seconds - base) / prompt_rows
            if self.row_seconds is None:
                self.row_seconds = measured
            else:
                self.row_seconds += self._WEIGHT * (measured - self.row_seconds)

    def observe_stop(self, seconds: float) -> None:
        """A step was stopped, and so much of it was in vain."""
        self.patience -= seconds

    def expected(self, prompt_rows: int, other_rows: int) -> float:
        """Seconds that a step with so many rows is going to take."""
        return prompt_rows * (self.row_seconds or 0.0) + (self.step_seconds if other_rows else 0.0)


def prompt_budget(limits: Limits, pace: Pace, n_generating: int) -> int:
    """Most rows of prompts in the next step, next to `n_generating` rows of running generations.

    As many as `step_seconds` allow, so that together they fill whole ubatches where that is possible.
    """
    room = limits.n_batch - n_generating
    if limits.step_seconds is None or room <= 0:
        return max(room, 0)
    if pace.row_seconds is None:
        rows = limits.n_ubatch
    elif n_generating:
        rows = int((limits.step_seconds - pace.step_seconds) / pace.row_seconds)
    else:
        rows = int(limits.step_seconds * _ALONE / pace.row_seconds)
    whole = (rows + n_generating) // limits.n_ubatch * limits.n_ubatch - n_generating
    least = min(_LEAST_ROWS, limits.n_ubatch)
    return min(room, max(whole if whole >= least else rows, least))


def share(budget: int, wants: Sequence[tuple[int, int]]) -> list[int]:
    """Rows for each of those in line.

    Args:
        budget: Rows that there are.
        wants: In the order of the line: rows that one could use, and how many of them are its turn's.

    Returns:
        Rows for each. First each in turn gets what its turn allows, then what is left goes down the line again.
    """
    given = [0] * len(wants)
    for i, (want, turn) in enumerate(wants):
        given[i] = min(want, turn, budget)
        budget -= given[i]
    for i, (want, _) in enumerate(wants):
        if not budget:
            break
        more = min(want - given[i], budget)
        given[i] += more
        budget -= more
    return given


def abort_when(pace: Pace, prompt_rows: int, other_rows: int) -> Literal["all", "any"]:
    """What a cancel of some rows of a step is to do.

    A short step goes on without them, which costs the others nothing. A long one is stopped, so that the slot is free
    soon, and run again without them: that costs the others a part of a step. A flood of cancels must not keep them from
    getting on, so no more than a tenth of the time is spent in this way.
    """
    return "any" if pace.patience > 0 and pace.expected(prompt_rows, other_rows) > _GO_ON_SECONDS else "all"

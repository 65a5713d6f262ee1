"""Who goes first, and how many rows a step has. Functions of what they are given, and one running measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .request import Request

__all__ = [
    "Limits",
    "Pace",
    "Part",
    "ends_here",
    "is_short",
    "loss",
    "must_be_whole",
    "parts_of",
    "place_of",
    "prompt_budget",
    "share",
    "stops_inside",
    "whole_tiles",
]

_LEAST_ROWS = 64  # of a prompt in a step, however slow the machine is: fewer take nearly as long
_SHORT_ROWS = 64  # a ubatch with fewer rows takes nearly as long as one with so many: all weights are read for it
_TILE_ROWS = 64  # attention takes so many rows of a sequence at a time (ggml's GGML_FA_TILE_Q): fewer take as long
_SCRAP_SHARE = 0.1  # so much shorter a step may be for that
_ENOUGH = 1.25  # so much longer a step may be if all prompts are through with it
_FEW_ROWS = 32  # of a running generation in a step: more that its constraint forces are computed as a prompt is
_ALONE = 1.25  # steps may be so many times longer while nobody generates: only newcomers wait for their end
_CLEARLY = 2  # times as much must the first tokens gain that do not wait for a whole step as the others lose
_LONG_SECONDS = 0.25  # longer than that a cancelled request does not wait for the part of a step that others want
_PASSED_OVER = 2  # so often in a row a step may be stopped before it comes to somebody's rows
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
    step_seconds: float | None = 0.4
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
    _WEIGHT_DEARER = 0.5  # a guess: rows get dearer as a prompt gets longer, and neighbours wait for too long steps

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
            self.row_seconds = self._nearer(self.row_seconds, (seconds - base) / prompt_rows)

    def observe_stop(self, seconds: float) -> None:
        """A step was stopped, which costs the others so much."""
        self.patience -= seconds

    def copy(self) -> Pace:
        """As it is now."""
        copied = Pace()
        copied.row_seconds, copied.step_seconds, copied.patience = self.row_seconds, self.step_seconds, self.patience
        return copied

    def _nearer(self, known: float | None, measured: float) -> float:
        if known is None:
            return measured
        return known + (self._WEIGHT_DEARER if measured > known else self._WEIGHT) * (measured - known)


def is_short(limits: Limits, request: Request) -> bool:
    """Whether what a request waits for is in every step: a single row, or a few that its constraint has forced."""
    if request.rows_left == 1:
        return True
    return request.held >= request.n_prompt and request.rows_left <= min(_FEW_ROWS, limits.n_batch // limits.slots)


def prompt_budget(limits: Limits, pace: Pace, n_generating: int, wanted: int, by_sequence: bool = False) -> int:
    """Most rows of prompts in the next step, next to `n_generating` rows of running generations.

    As many as `step_seconds` allow. But a little more if then nothing is left of the `wanted` ones, which would take a
    step of its own; and where all rows are computed in their order, no last ubatch of so few rows that it would hardly
    be worth its time. (`by_sequence`: each prompt has ubatches of its own, and the single rows have another one.)
    """
    room = limits.n_batch - n_generating
    if limits.step_seconds is None or room <= 0:
        return max(room, 0)
    if pace.row_seconds is None:
        rows = min(limits.n_ubatch, _LEAST_ROWS) if n_generating else limits.n_ubatch
    elif n_generating:
        rows = int((limits.step_seconds - pace.step_seconds) / pace.row_seconds)
    else:
        rows = int(limits.step_seconds * _ALONE / pace.row_seconds)
    if wanted <= rows * _ENOUGH:
        rows = wanted
    if by_sequence:
        return min(room, max(rows, min(_LEAST_ROWS + (n_generating > 0), limits.n_ubatch)))
    last = (rows + n_generating) % limits.n_ubatch
    least = min(_LEAST_ROWS, max(limits.n_ubatch - n_generating, 1))
    if last < _SHORT_ROWS and rows - last >= least and (n_generating or rows < wanted):
        rows -= last
    return min(room, max(rows, least))


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


def whole_tiles(count: int, wanted: int, budget: int, spare: bool = False, shared: int = 0) -> int:
    """As many of `count` rows as are worth their time, if a prompt could use `wanted`.

    All, if these are the last ones. Otherwise those that would begin a tile and not fill it come with a later step, but
    not if they are much of the `budget` of this one. None, if they are too few for a ubatch of their own that the step
    can `spare`, since others' rows are in it. The first `shared` rows are in a ubatch with others' single rows: 64 rows
    with one shared were seen to take twice as long as 65.
    """
    scrap = (count - shared) % _TILE_ROWS
    if spare and count < min(wanted, _SHORT_ROWS):
        return 0
    if count in (wanted, scrap + shared) or scrap > budget * _SCRAP_SHARE:
        return count
    return count - scrap


def ends_here(limits: Limits, pace: Pace, n_complete: int, n_behind: int, rows_behind: int) -> bool:
    """Whether a step is to end with the prompts that are complete in it, and not to go on with those behind them.

    The first tokens of `n_complete`, of which part was computed in a step before, then need not wait for the
    `rows_behind` that would be in the step, too, while the `n_behind` prompts behind come later by what one more step
    costs in itself. It ends if that is clearly the smaller part: the sum of all waiting shrinks, and the last one's
    hardly grows. Prompts that were begun together are not parted: who generates later alone costs as much as several.
    """
    if limits.step_seconds is None:
        return False
    return n_complete * rows_behind * (pace.row_seconds or 0.0) > n_behind * pace.step_seconds * _CLEARLY


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step that is computed at a time: all of it is lost if the step is stopped in its middle.

    Attributes:
        seconds: How long it is expected to take.
        saved: How much of that the rows take that were cancelled by now.
    """

    seconds: float
    saved: float


def parts_of(pace: Pace, n_ubatch: int, rows: Sequence[tuple[int, bool]], by_sequence: bool = False) -> list[Part]:
    """The ubatches of a step.

    Args:
        pace: How long rows take.
        n_ubatch: Rows of a ubatch.
        rows: Of each request how many it has in the step, and whether it was cancelled. A single row takes no time of
            its own: what it costs is what a step without prompts costs, be it one row or twenty.
        by_sequence: The single rows are computed first, then each prompt by itself. False: all rows in their order.
    """
    each = pace.row_seconds or 0.0
    if by_sequence:
        parts = [Part(pace.step_seconds, 0.0)] if any(count == 1 for count, _ in rows) else []
        for count, cancelled in rows:
            for begin in range(0, count if count > 1 else 0, n_ubatch):
                seconds = min(n_ubatch, count - begin) * each
                parts.append(Part(seconds, seconds * cancelled))
        return parts
    n_parts = -(-sum(count for count, _ in rows) // n_ubatch)
    singles, prompts, saved = [0] * n_parts, [0] * n_parts, [0] * n_parts
    at = 0
    for count, cancelled in rows:
        end = at + count
        while at < end:
            i = at // n_ubatch
            n = min(end, (i + 1) * n_ubatch) - at
            if count == 1:
                singles[i] += 1
            else:
                prompts[i] += n
                saved[i] += n * cancelled
            at += n
    return [
        Part(prompts[i] * each + (pace.step_seconds if singles[i] else 0.0), saved[i] * each) for i in range(n_parts)
    ]


def loss(parts: Sequence[Part], elapsed: float) -> float:
    """Seconds that the others lose if a step is stopped now, and run again without the rows that were cancelled.

    The part that is being computed is begun anew, but the cancelled rows are not in it any more. Below 0 the others are
    done sooner than if the step went on.
    """
    part, inside = _part_at(parts, elapsed)
    return inside - part.saved


def stops_inside(pace: Pace, parts: Sequence[Part], elapsed: float) -> bool:
    """Whether a step is to be stopped in the middle of a part, now that some of its rows were cancelled.

    It stops at the end of the part in any case, which loses nothing that was computed. Before that, if the others are
    done sooner when the part is begun anew without the cancelled rows. Or if it takes long yet, so that the slot is
    free and its client need not wait: on that no more than a tenth of the time is spent. A part that nobody wants any
    more stops by itself.

    Args:
        pace: The patience that there is.
        parts: What is computed at a time, in order.
        elapsed: Seconds since the step began.
    """
    part, inside = _part_at(parts, elapsed)
    if inside <= part.saved < part.seconds:
        return True
    return part.seconds - inside > _LONG_SECONDS and pace.patience > 0


def must_be_whole(passed_over: int) -> bool:
    """Whether a step is to come to the rows of a request, whoever leaves: a flood of cancels must not hold it up."""
    return passed_over >= _PASSED_OVER


def _part_at(parts: Sequence[Part], elapsed: float) -> tuple[Part, float]:
    """The part that is being computed, and since when; the last one if all should be done."""
    for part in parts[:-1]:
        if elapsed <= part.seconds:
            return part, elapsed
        elapsed -= part.seconds
    return parts[-1], elapsed

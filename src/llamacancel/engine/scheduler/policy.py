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
    "rows_within",
    "share",
    "slack",
    "stops_inside",
    "whole_tiles",
    "whole_turn",
]

# What each of them buys is in docs/tuning.md; `python -m benchmarks.policy` measures it.
_TILE_ROWS = 64  # attention takes so many rows of a sequence at a time (ggml's GGML_FA_TILE_Q), and fewer one by one
_FEW_ROWS = 32  # of a running generation in a step: more that its constraint forces are computed as a prompt is
_LONG_SECONDS = 0.25  # longer than that a cancelled request does not wait for the part of a step that others want
_PATIENCE = 0.5  # seconds that stopped steps may cost the others at once
_PATIENCE_SHARE = 0.1  # and of the time in the long run
_PASSED_OVER = 2  # so often in a row a step may be stopped before it comes to somebody's rows
_NEWEST = 0.2  # what the newest step weighs in how long rows take
_NEWEST_LINE = 0.05  # and in how much longer they take the more is before them


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
        row_seconds: Of one prompt row that has nothing before it; None until one was seen.
        deeper: How much longer a row takes for each token before it, as a share of that.
        step_seconds: Of a step without prompt rows.
        patience: Seconds that steps stopped for somebody else's cancel may still cost.
    """

    __slots__ = ("_seen", "deeper", "patience", "row_seconds", "step_seconds")

    def __init__(self) -> None:
        self.row_seconds: float | None = None
        self.deeper = 0.0
        self._seen = [0.0] * 5  # sums over depths x and seconds y of a row, the newest weigh most: 1, x, y, xx, xy
        self.step_seconds = 0.0
        self.patience = _PATIENCE

    def row_at(self, depth: float) -> float:
        """Seconds of a prompt row that has so many tokens before it; 0 until one was seen."""
        return (self.row_seconds or 0.0) * (1 + self.deeper * depth)

    def observe(self, prompt_rows: int, other_rows: int, seconds: float, depth: float = 0.0) -> None:
        """A step with so many rows took so long. `depth`: how many tokens a prompt row had before it, on average."""
        self.patience = min(self.patience + _PATIENCE_SHARE * seconds, _PATIENCE)
        if prompt_rows == 0:
            self.step_seconds += _NEWEST * (seconds - self.step_seconds) if self.step_seconds else seconds
        elif prompt_rows >= 8:
            base = min(self.step_seconds, seconds / 2) if other_rows else 0.0
            each = (seconds - base) / prompt_rows
            self._learn(depth, each)
            each /= 1 + self.deeper * depth
            known = each if self.row_seconds is None else self.row_seconds
            self.row_seconds = known + _NEWEST * (each - known)

    def _learn(self, x: float, y: float) -> None:
        """The line through what was seen. It is level where all was seen at about the same depth."""
        new = 1.0, x, y, x * x, x * y
        self._seen = [old + _NEWEST_LINE * (each - old) for old, each in zip(self._seen, new, strict=True)]
        n, sx, sy, sxx, sxy = self._seen
        slope = max((n * sxy - sx * sy) / (n * sxx - sx * sx + (n * _TILE_ROWS) ** 2), 0.0)
        self.deeper = slope * n / max(sy - slope * sx, sy / 10) if sy else 0.0

    def observe_stop(self, seconds: float) -> None:
        """A step was stopped, which costs the others so much."""
        self.patience -= seconds

    def copy(self) -> Pace:
        """As it is now."""
        copied = Pace()
        copied.row_seconds, copied.deeper = self.row_seconds, self.deeper
        copied.step_seconds, copied.patience = self.step_seconds, self.patience
        return copied


def rows_within(pace: Pace, seconds: float, pieces: Sequence[tuple[int, int]]) -> int:
    """How many rows of prompts are computed in so many seconds.

    Args:
        pace: How long rows take: one has been seen.
        seconds: The time.
        pieces: In order: where a piece begins, and its rows.
    """
    rows = 0
    for start, count in pieces:
        for at in range(start, start + count, _TILE_ROWS):
            n = min(_TILE_ROWS, start + count - at)
            each = pace.row_at(at + n / 2)
            if seconds < n * each:
                return rows + int(seconds / each)
            seconds -= n * each
            rows += n
    return rows


def is_short(limits: Limits, request: Request) -> bool:
    """Whether what a request waits for is in every step: a single row, or a few that its constraint has forced."""
    if request.rows_left == 1:
        return True
    return request.held >= request.n_prompt and request.rows_left <= min(_FEW_ROWS, limits.n_batch // limits.slots)


def prompt_budget(
    limits: Limits, pace: Pace, n_generating: int, pieces: Sequence[tuple[int, int]], by_sequence: bool = False
) -> int:
    """Most rows of prompts in the next step, next to `n_generating` rows of running generations.

    `pieces` are what could be computed, in order: where each begins, and its rows.

    As many as `step_seconds` allow; but at least a tile of a prompt, however slow the machine is, and where all rows
    are computed in their order, no last ubatch that is less than a tile. (`by_sequence`: each prompt has ubatches of
    its own, and the single rows have another one.)
    """
    room = limits.n_batch - n_generating
    if limits.step_seconds is None or room <= 0:
        return max(room, 0)
    if pace.row_seconds is None:
        rows = min(limits.n_ubatch, _TILE_ROWS) if n_generating else limits.n_ubatch
    else:
        rows = rows_within(pace, limits.step_seconds - pace.step_seconds * (n_generating > 0), pieces)
    if by_sequence:
        return min(room, max(rows, min(_TILE_ROWS + (n_generating > 0), limits.n_ubatch)))
    least = min(_TILE_ROWS, max(limits.n_ubatch - n_generating, 1))
    last = (rows + n_generating) % limits.n_ubatch
    if last < _TILE_ROWS and rows - last >= least and (n_generating or rows < sum(count for _, count in pieces)):
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


def whole_turn(turn: int, shared: int = 0) -> int:
    """The rows that a prompt may have in its turn: the last of them fill a tile."""
    return max(turn, _TILE_ROWS + shared)


def slack(limits: Limits, room: int, by_sequence: bool) -> int:
    """By how many rows a step may be longer, of the `room` that there is, so that the end of a prompt fills a tile."""
    return max(min(room, _TILE_ROWS), 0) if by_sequence and limits.n_ubatch >= 2 * _TILE_ROWS else 0


def whole_tiles(count: int, wanted: int, spare: bool = False, shared: int = 0, slack: int = 0) -> int:
    """As many of `count` rows as are worth their time, if a prompt could use `wanted`.

    All, if these are the last ones. Otherwise whole tiles, and so many of them that those that are left fill one, too:
    attention takes fewer rows one by one, which was seen to take four times as long. Where that cannot be, none if the
    step can `spare` them, since others' rows are in it; or all that are wanted, if they are within `slack` of `count`.
    The first `shared` rows are in a ubatch with others' single rows.
    """
    if count == wanted:
        return count
    whole = (count - shared) // _TILE_ROWS * _TILE_ROWS
    if wanted - whole - shared < _TILE_ROWS + shared:
        whole -= _TILE_ROWS
    if whole > 0:
        return whole + shared
    if spare:
        return 0
    return wanted if wanted < 2 * (_TILE_ROWS + shared) and wanted <= count + slack else count


def ends_here(limits: Limits, pace: Pace, n_complete: int, n_behind: int, rows_behind: int) -> bool:
    """Whether a step is to end with the prompts that are complete in it, and not to go on with those behind them.

    The first tokens of `n_complete`, of which part was computed in a step before, then need not wait for the
    `rows_behind` that would be in the step, too, while the `n_behind` prompts behind come later by what one more step
    costs in itself. It ends if that is the smaller part: the sum of all waiting shrinks. Prompts that were begun
    together are not parted: who generates later alone costs as much as several.
    """
    if limits.step_seconds is None:
        return False
    return n_complete * rows_behind * pace.row_at(0) > n_behind * pace.step_seconds


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step that is computed at a time: all of it is lost if the step is stopped in its middle.

    Attributes:
        seconds: How long it is expected to take.
        saved: How much of that the rows take that were cancelled by now.
    """

    seconds: float
    saved: float


def parts_of(pace: Pace, n_ubatch: int, rows: Sequence[tuple[int, int, bool]], by_sequence: bool = False) -> list[Part]:
    """The ubatches of a step.

    Args:
        pace: How long rows take.
        n_ubatch: Rows of a ubatch.
        rows: Of each request where its rows in the step begin, how many it has, and whether it was cancelled. A single
            row takes no time of its own: what it costs is what a step without prompts costs, be it one row or twenty.
        by_sequence: The single rows are computed first, then each prompt by itself. False: all rows in their order.
    """
    if by_sequence:
        parts = [Part(pace.step_seconds, 0.0)] if any(count == 1 for _, count, _ in rows) else []
        for start, count, cancelled in rows:
            for begin in range(0, count if count > 1 else 0, n_ubatch):
                n = min(n_ubatch, count - begin)
                seconds = n * pace.row_at(start + begin + n / 2)
                parts.append(Part(seconds, seconds * cancelled))
        return parts
    n_parts = -(-sum(count for _, count, _ in rows) // n_ubatch)
    singles, prompts, saved = [0.0] * n_parts, [0.0] * n_parts, [0.0] * n_parts
    at = 0
    for start, count, cancelled in rows:
        first, end = at, at + count
        while at < end:
            i = at // n_ubatch
            n = min(end, (i + 1) * n_ubatch) - at
            if count == 1:
                singles[i] = pace.step_seconds
            else:
                seconds = n * pace.row_at(start + at - first + n / 2)
                prompts[i] += seconds
                saved[i] += seconds * cancelled
            at += n
    return [Part(prompts[i] + singles[i], saved[i]) for i in range(n_parts)]


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

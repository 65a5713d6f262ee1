"""What a run of the suite found."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from .bench import Act
from .call import Call
from .lanes import Lane

__all__ = ["FAILED", "PASSED", "UNJUDGED", "Report", "Result", "lanes_of"]

PASSED = "passed"
FAILED = "failed"
UNJUDGED = "could not be judged"


@dataclass(frozen=True)
class Result:
    """What became of one scenario.

    Args:
        name: The scenario's name.
        claim: What is true of a server that passes.
        outcome: PASSED, FAILED or UNJUDGED.
        why: The reason, unless it passed.
        figures: What was measured.
        seconds: How long it took.
        lanes: Its clients over time, in the performance that was judged.
    """

    name: str
    claim: str
    outcome: str
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    lanes: tuple[Lane, ...] = ()


@dataclass
class Report:
    """A whole run.

    Args:
        url: The server's address.
        settings: What was asked for, as far as it changes results.
        profile: What the server is like.
        repeats: Whether undisturbed answers were always the same.
        results: One for each scenario that was run.
        began: When it began, in seconds since 1970.
    """

    url: str
    settings: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    repeats: dict[str, bool] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def count(self, outcome: str) -> int:
        return sum(result.outcome == outcome for result in self.results)


def lanes_of(act: Act) -> tuple[Lane, ...]:
    """Draw the clients of a performance as lanes whose time begins with the first request."""
    sent = [call.sent for call in act.calls if call.sent is not None]
    begin = min(sent, default=0.0)
    return tuple(_lane(call, begin, call.name in act.waiting) for call in act.calls if call.sent is not None)


def _lane(call: Call, begin: float, queued: bool) -> Lane:
    now = max([time for time in (call.ended, call.sent, *call.pieces) if time is not None])
    sent = call.sent if call.sent is not None else begin
    end = call.ended if call.ended is not None else now
    first = call.first_token
    spans: list[tuple[str, float, float]] = []
    marks: list[tuple[str, float, str]] = []
    if not call.request.stream and not queued:
        spans.append(("whole", sent, end))
    else:
        spans.append(("queued" if queued else "prefill", sent, end if first is None else first))
    if first is not None:
        unread = call.stopped_reading
        spans.append(("streaming", first, end if unread is None else unread))
        if unread is not None:
            spans.append(("unread", unread, end))
            marks.append(("stopped", unread, ""))
    if call.half_closed is not None:
        marks.append(("half-close", call.half_closed, ""))
    if call.hung_up is not None:
        marks.append(("hang-up", call.hung_up, ""))
    elif call.ended is None:
        marks.append(("failed", end, "never"))
    elif call.answered and call.finish_reason in ("stop", "length", None):
        marks.append(("answered", end, ""))
    else:
        marks.append(("failed", end, call.finish_reason or ""))
    return Lane(
        call.name,
        [(kind, start - begin, stop - begin) for kind, start, stop in spans],
        [(kind, time - begin, label) for kind, time, label in marks],
    )

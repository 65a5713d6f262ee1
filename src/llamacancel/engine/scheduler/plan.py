"""A step, or a batch of texts to embed: what is to be done, and what came of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .request import Request

__all__ = ["Action", "Clear", "Copy", "Fault", "Outcome", "Plan", "Rows", "Sampled", "Trim"]


@dataclass(slots=True, frozen=True)
class Clear:
    """Forget a sequence."""

    seq: int


@dataclass(slots=True, frozen=True)
class Trim:
    """Forget what a sequence holds beyond `length`."""

    seq: int
    length: int


@dataclass(slots=True, frozen=True)
class Copy:
    """Give the empty sequence `dst` the first `length` of `src`; None: all of it."""

    src: int
    dst: int
    length: int | None = None


Action = Clear | Trim | Copy


@dataclass(slots=True)
class Rows:
    """Rows of one request: `count` tokens from `start` on. A token is chosen from the last one if `output`.

    Up to `room` tokens may be added to it then: more than one where a constraint leaves no choice.
    """

    request: Request
    slot: int
    start: int
    count: int
    output: bool
    room: int = 1


@dataclass(slots=True)
class Plan:
    """One step, or one batch of texts to embed, which is computed beside the steps.

    Attributes:
        actions: To be done first, in order.
        rows: What to decode then.
        texts: Requests to embed: a batch has these, and nothing else.
        n_prompt_rows: Rows that a prompt has more than one of in this step.
        n_other_rows: Of running generations, and the last one of a prompt. A generation has one, or several that its
            constraint left no choice about.
        n_before: Tokens that rows of prompts have before them, of all together.
        whole: It is not stopped for those who leave: somebody in it was passed over too often.
        began: When it was made, in seconds.
    """

    actions: list[Action] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    texts: list[Request] = field(default_factory=list)
    n_prompt_rows: int = 0
    n_other_rows: int = 0
    n_before: float = 0.0
    whole: bool = False
    began: float = 0.0

    @property
    def requests(self) -> list[Request]:
        """Those that it computes something for."""
        return [rows.request for rows in self.rows] + self.texts

    @property
    def depth(self) -> float:
        """How many tokens a row of a prompt has before it, on average."""
        return self.n_before / self.n_prompt_rows if self.n_prompt_rows else 0.0

    def __bool__(self) -> bool:
        return bool(self.actions or self.rows or self.texts)


class Fault(enum.Enum):
    """Why nothing was done."""

    FULL = "full"  # there was no room for it; the memory is as before
    FAILED = "failed"  # it could not be computed; the memory is as before
    BROKEN = "broken"  # by a step before: the memory is lost, and another one is in its place, empty
    UPSET = "upset"  # something unforeseen was raised: nobody knows what the memory held, and now it is empty


@dataclass(slots=True)
class Sampled:
    """A token that was chosen, those behind it that its constraint left no choice about, and whether the last of them
    ends the generation: the end of the text, or a stop.
    """

    token: int
    stops: bool = False
    forced: Sequence[int] = ()


@dataclass(slots=True)
class Outcome:
    """What came of a plan.

    Attributes:
        held: Slot to the number of tokens that the memory holds there now, for the rows of the plan.
        sampled: Slot to the token that was chosen.
        embedded: Requests that were embedded.
        cancelled: Requests that were found cancelled on the way, and how they end.
        failed: Requests that failed by themselves, and why.
        lost: Sequences that hold nothing any more, because an action or a repair failed.
        fault: Why the step did nothing, if it did not.
        error: What it raised then.
        aborted: The step was stopped in the middle of what others wanted, for those that were cancelled.
        rows_done: Rows that were computed.
        seconds: How long that took.
    """

    held: dict[int, int] = field(default_factory=dict)
    sampled: dict[int, Sampled] = field(default_factory=dict)
    embedded: list[Request] = field(default_factory=list)
    cancelled: dict[Request, Literal["cancelled", "deadline", "shutdown"]] = field(default_factory=dict)
    failed: dict[Request, Exception] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    fault: Fault | None = None
    error: Exception | None = None
    aborted: bool = False
    rows_done: int = 0
    seconds: float = 0.0

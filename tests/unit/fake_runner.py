"""A memory and a model for the scheduler's tests: exact, and wrong at once if a plan is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llamacancel.engine.scheduler import Clear, Fault, MemoryRules, Outcome, Plan, Request, Sampled, Trim
from llamacancel.engine.scheduler.plan import Action
from llamacancel.errors import DecodeFailedError, MemoryFullError

END = 0  # the token that ends a text


def next_token(content: Sequence[int]) -> int:
    """What follows on a text: depends on each of its tokens, so that a single wrong one shows."""
    value = 17
    for token in content:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
    return value % 50


def answer(prompt: Sequence[int], max_tokens: int | None, n_ctx: int) -> list[int]:
    """What a request gives that is alone in the world."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == END or len(tokens) - len(prompt) == max_tokens or len(tokens) >= n_ctx:
            return tokens[len(prompt) :]


@dataclass
class Chances:
    """How often something goes wrong, from 0 to 1."""

    stopped: float = 0.0  # a step is stopped early for those that are cancelled
    full: float = 0.0
    failed: float = 0.0
    broken: float = 0.0
    upset: float = 0.0
    lost: float = 0.0  # a sequence that was computed cannot be repaired
    sampler: float = 0.0


@dataclass
class FakeRunner:
    """Does plans in a memory of cells that keeps every token, and checks that each plan fits what is there.

    A sequence is a list of cells, each with a token; a copy shares the cells.
    """

    rules: MemoryRules
    n_batch: int
    random: random.Random = field(default_factory=lambda: random.Random(0))
    chances: Chances = field(default_factory=Chances)
    poison: set[str] = field(default_factory=set)  # requests with which every step fails
    cancelled: dict[str, Any] = field(default_factory=dict)  # tokens cancelled by now, and how the requests end
    steps: int = 0

    def __post_init__(self) -> None:
        self.cells: dict[int, list[tuple[int, int]]] = {}
        self.peaks: dict[int, int] = {}  # the most that a sequence has held: a window has let go of what lies far back
        self._next = itertools.count()

    def content(self, seq: int) -> list[int]:
        return [token for _, token in self.cells.get(seq, [])]

    @property
    def used(self) -> int:
        return len({cell for cells in self.cells.values() for cell, _ in cells})

    def run(self, plan: Plan) -> Outcome:
        self.steps += 1
        outcome = Outcome(seconds=0.01)
        for action in plan.actions:
            self._act(action, outcome)
        assert not plan.texts
        if plan.rows:
            self._decode(plan, outcome)
        return outcome

    def embed(self, plan: Plan) -> Outcome:
        """Does a batch of texts."""
        assert plan == Plan(texts=plan.texts, began=plan.began)
        assert plan.texts
        outcome = Outcome(seconds=0.01)
        if any(each.id in self.poison for each in plan.texts) or self._chance(self.chances.failed):
            outcome.fault, outcome.error = Fault.FAILED, DecodeFailedError("it failed")
            outcome.cancelled = self._cancelled(plan.texts)
            return outcome
        outcome.aborted = self._chance(self.chances.stopped)
        for request in plan.texts:
            if request.id in self.cancelled:
                outcome.cancelled[request] = self.cancelled[request.id]
            elif self._chance(self.chances.sampler):
                outcome.failed[request] = ValueError("no vector")
            elif not outcome.aborted:
                outcome.embedded.append(request)
        return outcome

    def _chance(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    def _act(self, action: Action, outcome: Outcome) -> None:
        if isinstance(action, Clear):
            self.cells.pop(action.seq, None)
            self.peaks[action.seq] = 0
        elif isinstance(action, Trim):
            held = self.cells[action.seq]
            assert action.length < len(held)
            assert self.rules.cut or self.peaks[action.seq] <= self.rules.window
            del held[action.length :]
        else:
            held = self.cells[action.src]
            assert not self.cells.get(action.dst), "copied over something"
            assert self.rules.copy != "nothing"
            part = action.length is not None
            assert not part or self.rules.copy == "part"
            assert not part or self.rules.cut or self.peaks[action.src] <= self.rules.window
            self.peaks[action.dst] = self.peaks[action.src]
            self.cells[action.dst] = held[: action.length]
            if self._chance(self.chances.lost):
                del self.cells[action.dst]
                outcome.lost.append(action.dst)

    def _fault(self, plan: Plan, outcome: Outcome) -> bool:
        requests = plan.requests
        if any(request.id in self.poison for request in requests) or self._chance(self.chances.failed):
            outcome.fault, outcome.error = Fault.FAILED, DecodeFailedError("it failed")
        elif self._chance(self.chances.broken):
            outcome.fault, outcome.error = Fault.BROKEN, DecodeFailedError("it broke")
            self.cells.clear()
        elif self._chance(self.chances.upset):
            outcome.fault, outcome.error = Fault.UPSET, DecodeFailedError("nobody has foreseen it")
            self.cells.clear()
        elif self._chance(self.chances.full):
            outcome.fault, outcome.error = Fault.FULL, MemoryFullError("it was full")
        if outcome.fault is not None:
            outcome.cancelled = self._cancelled(requests)
        return outcome.fault is not None

    def _cancelled(self, requests: Sequence[Request]) -> dict[Request, Any]:
        return {each: self.cancelled[each.id] for each in requests if each.id in self.cancelled}

    def _decode(self, plan: Plan, outcome: Outcome) -> None:
        planned = [rows for rows in plan.rows if rows.slot not in outcome.lost]
        assert sum(rows.count for rows in planned) <= self.n_batch
        assert len({rows.slot for rows in planned}) == len(planned)
        if not planned:
            return
        if self._fault(plan, outcome):
            return
        free = None if self.rules.cells is None else self.rules.cells - self.used
        if free is not None and free < sum(rows.count for rows in planned):
            outcome.fault, outcome.error = Fault.FULL, MemoryFullError("there is no room")
            outcome.cancelled = self._cancelled(plan.requests)
            return
        stopped = not plan.whole and self._chance(self.chances.stopped)
        stop_at = self.random.randrange(len(planned)) if stopped else None
        outcome.aborted = stop_at is not None
        for i, rows in enumerate(planned):
            held = self.cells.setdefault(rows.slot, [])
            assert len(held) == rows.start, "the rows do not follow on what is there"
            assert rows.request.slot == rows.slot
            count = rows.count
            if rows.request.id in self.cancelled:
                outcome.cancelled[rows.request] = self.cancelled[rows.request.id]
                count = self.random.randint(0, count)
            if stop_at is not None and i >= stop_at:
                count = self.random.randint(0, count) if i == stop_at else 0
            for token in rows.request.tokens[rows.start : rows.start + count]:
                held.append((next(self._next), token))
            self.peaks[rows.slot] = max(len(held), self.peaks.get(rows.slot, 0))
            outcome.rows_done += count
            outcome.held[rows.slot] = len(held)
            if self._chance(self.chances.lost):
                del self.cells[rows.slot]
                del outcome.held[rows.slot]
                outcome.lost.append(rows.slot)
                continue
            if not rows.output or count < rows.count or rows.request.id in self.cancelled:
                continue
            assert self.content(rows.slot) == rows.request.tokens, "an output of something else"
            if self._chance(self.chances.sampler):
                outcome.failed[rows.request] = ValueError("no token is left to choose")
                continue
            token = next_token(self.content(rows.slot))
            outcome.sampled[rows.slot] = Sampled(token, token == END)


def request(name: str, prompt: Sequence[int], **attributes: Any) -> Request:
    """A request of that name."""
    return Request(name, list(prompt), **attributes)

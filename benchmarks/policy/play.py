"""A load played through the scheduler: time is computed from a table of costs, and nothing else is."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from llamacancel.engine.scheduler import Flight, Limits, MemoryRules, Outcome, Plan, Request, Sampled, Scheduler

from .costs import Costs

__all__ = ["Client", "Load", "Played", "play"]

RULES = MemoryRules(cut=True, least_copy=32, in_order=True, by_sequence=True)


@dataclass(frozen=True)
class Client:
    """Sends one request after another.

    Attributes:
        prompt: Least and most tokens of a prompt.
        answer: Tokens of an answer; None: it never ends.
        leaves: Draws the seconds after which it hangs up, or None.
        requests: How many it sends; None: until the load is over.
        begins: When it sends the first one.
        counts: Whether what it is given counts: a stranger's does not.
    """

    prompt: tuple[int, int]
    answer: int | None
    leaves: Callable[[random.Random], float | None] = lambda _: None
    requests: int | None = None
    begins: float = 0.0
    counts: bool = True


@dataclass(frozen=True)
class Load:
    """Clients at the same time, in so many slots; with `seconds` it ends then, else when all are answered."""

    name: str
    clients: tuple[Client, ...]
    slots: int
    seconds: float | None = None


@dataclass
class Played:
    """What came of it.

    Attributes:
        seconds: From its begin to its end.
        tokens: That were told to those who count.
        first: Seconds to each first token.
        gaps: The longest time between two tokens, of each request that had two.
        freed: Seconds from each cancel of what was computed to its slot being free.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    freed: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Asked:
    client: Client
    left: int | None
    sent: float = 0.0
    told: list[float] = field(default_factory=list)
    cancelled: bool = False


@dataclass
class _Ubatch:
    seconds: float
    rows: dict[int, int]  # of each slot


class _World:
    def __init__(self, load: Load, costs: Costs, seed: int, step_seconds: float | None) -> None:
        self.load, self.costs, self.random = load, costs, random.Random(seed)
        self.limits = Limits(load.slots, 1000, 4096, 2048, 512, step_seconds)
        self.scheduler = Scheduler(self.limits, RULES)
        self.now = 0.0
        self.events: list[tuple[float, int, str, _Asked, Request | None]] = []
        self.count = itertools.count()
        self.played = Played()
        for client in load.clients:
            self._at(client.begins, "send", _Asked(client, client.requests))

    def _at(self, time: float, what: str, asked: _Asked, request: Request | None = None) -> None:
        heapq.heappush(self.events, (time, next(self.count), what, asked, request))

    def run(self) -> Played:
        end = self.load.seconds
        while end is None or self.now < end:
            self._let_come()
            plan = self.scheduler.plan(self.now)
            if not plan:
                if not self.events:
                    break
                self.now = max(self.now, self.events[0][0])
                continue
            flight = self.scheduler.in_flight
            assert flight is not None
            self.scheduler.commit(self._compute(plan, flight), self.now)
            self._tell()
        self.played.seconds = self.now
        for request in self.scheduler.active.values():
            self._take(request.owner)
        return self.played

    def _let_come(self) -> None:
        while self.events and self.events[0][0] <= self.now:
            _, _, what, asked, request = heapq.heappop(self.events)
            if what == "send":
                self._send(asked)
            else:
                assert request is not None
                self.scheduler.cancel(request, "cancelled", self.now)
        self._tell()

    def _send(self, asked: _Asked) -> None:
        client, n = asked.client, self.random.randint(*asked.client.prompt)
        asked.sent = self.now
        request = Request("", [self.random.getrandbits(30)] * n, max_tokens=client.answer, owner=asked)
        self.scheduler.submit(request, self.now)
        leaves = client.leaves(self.random)
        if leaves is not None:
            self._at(self.now + leaves, "cancel", asked, request)

    def _tell(self) -> None:
        for request in self.scheduler.changes:
            asked = request.owner
            if request.state != "finished" or asked.left == 0:
                continue
            self._take(asked)
            left = None if asked.left is None else asked.left - 1
            if left != 0:
                self._at(self.now, "send", _Asked(asked.client, left))
        self.scheduler.changes = []

    def _take(self, asked: _Asked) -> None:
        if asked.client.counts and asked.told:
            self.played.tokens += len(asked.told)
            self.played.first.append(asked.told[0] - asked.sent)
            if len(asked.told) > 1:
                self.played.gaps.append(max(b - a for a, b in itertools.pairwise(asked.told)))

    # -- a step

    def _ubatches(self, plan: Plan) -> list[_Ubatch]:
        """As a cache for each sequence is computed: a row of each, if some have one; then the rest of each prompt."""
        singles = [rows for rows in plan.rows if rows.count == 1]
        shared = plan.rows if singles else []
        found = []
        if shared:
            seconds = self.costs.singles([rows.start for rows in shared])
            found.append(_Ubatch(seconds, {rows.slot: 1 for rows in shared}))
        for rows in plan.rows:
            at, end = rows.start + bool(shared), rows.start + rows.count
            while at < end:
                n = min(end - at, self.limits.n_ubatch)
                found.append(_Ubatch(self.costs.prompt(at, n), {rows.slot: n}))
                at += n
        return found

    def _compute(self, plan: Plan, flight: Flight) -> Outcome:
        began, outcome = self.now, Outcome()
        self.now += self.costs.step
        done = {rows.slot: 0 for rows in plan.rows}
        by_slot = {rows.slot: rows.request for rows in plan.rows}
        requests = set(by_slot.values())
        gone: dict[Request, float] = {}
        leaving = sorted(
            ((time, request) for time, _, _, _, request in self.events if request in requests), key=lambda each: each[0]
        )
        for ubatch in self._ubatches(plan):
            if gone and not plan.whole:
                break
            end = self.now + ubatch.seconds
            while leaving and leaving[0][0] <= end:
                time, request = leaving.pop(0)
                assert request is not None
                gone[request] = time
                outcome.aborted = flight.stops_inside([each in gone for each in plan.requests], time)
                if outcome.aborted or all(by_slot[slot] in gone for slot in ubatch.rows):
                    self.now = max(time, self.now)
                    break
            else:
                self.now = end
                for slot, n in ubatch.rows.items():
                    done[slot] += n
            if outcome.aborted:
                break
        self.played.freed += [self.now - time for time in gone.values()]
        for rows in plan.rows:
            request = rows.request
            outcome.held[rows.slot] = rows.start + done[rows.slot]
            if request in gone:
                outcome.cancelled[request] = "cancelled"
            elif rows.output and done[rows.slot] == rows.count:
                outcome.sampled[rows.slot] = Sampled(1)
                request.owner.told.append(self.now)
        outcome.rows_done = sum(done.values())
        outcome.seconds = self.now - began
        return outcome


def play(load: Load, costs: Costs, seed: int, step_seconds: float | None = 0.4) -> Played:
    """Play a load from its begin to its end; the same seed gives the same."""
    return _World(load, costs, seed, step_seconds).run()

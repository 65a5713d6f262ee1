"""The state of all requests and sequences, from one step to the next."""

from __future__ import annotations

import heapq
from typing import Literal

from ...errors import DecodeFailedError, MemoryFullError
from . import policy
from .cells import Cells
from .flight import Flight
from .plan import Action, Clear, Copy, Fault, Outcome, Plan, Rows, Trim
from .policy import Limits, Pace
from .prefix import MemoryRules, Reuse, common_prefix, find_reuse
from .request import FinishReason, Request
from .sequence import Sequence

__all__ = ["Scheduler"]

_LEAST_CHECKPOINT = 16  # tokens that a checkpoint must save to be worth its place, or a prefix to be waited for
_HEADROOM = 32  # cells that each running request should find free when another one joins


class Scheduler:
    """Gives requests their slots, and plans one step after the other.

    `submit()` and `cancel()` bring and take requests, `plan()` says what is to be done, somebody does it, `commit()` is
    told what came of it, and so on. Beside that `plan_texts()` and `commit_texts()` do the same for texts to embed, one
    batch at a time. It computes nothing, sleeps never, and reads no clock: times are passed in.

    Args:
        limits: What it has to keep to.
        rules: What the memory can do.

    Attributes:
        queue: Requests that wait.
        active: Requests that have a slot, by slot.
        sequences: What the memory holds: the slots, then the checkpoints.
        changes: Requests that changed their state, in order, once for each change; whoever reads empties it.
        in_flight: The step that was planned, until it is committed.
        texts_in_flight: The batch of texts that was planned, until it is committed.
        pace, texts_pace: How long rows of steps take, and rows of texts.
    """

    def __init__(self, limits: Limits, rules: MemoryRules) -> None:
        self.limits = limits
        self.rules = rules
        self.pace, self.texts_pace = Pace(), Pace()
        self.queue: dict[Request, None] = {}
        self.active: dict[int, Request] = {}
        self.sequences = [Sequence(i) for i in range(limits.slots + rules.checkpoints)]
        self.cells = Cells(rules.cells)
        self.changes: list[Request] = []
        self.in_flight: Flight | None = None
        self.texts_in_flight: Flight | None = None
        self._line: list[tuple[float, int, Request]] = []  # a heap; who left the queue lies in it until it comes up
        self._behind: dict[Request, list[tuple[float, int, Request]]] = {}  # who waits for the prompt of whom
        self._line_of_texts: list[tuple[float, int, Request]] = []
        self._count = 0
        self._actions: list[Action] = []
        self._crowded = False  # the memory was full; nobody joins until somebody leaves
        self._without_memory: list[Request] = []

    # -- requests come and go

    @property
    def idle_slots(self) -> int:
        """Slots in which no request runs."""
        return self.limits.slots - len(self.active)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.queue or self.active or self.texts_in_flight)

    @property
    def embedding(self) -> list[Request]:
        """Requests that are being embedded."""
        return [] if self.texts_in_flight is None else self.texts_in_flight.plan.texts

    def submit(self, request: Request, now: float) -> None:
        """Queue a request."""
        self._count += 1
        request.number = self._count
        request.submitted_at = now
        self._enqueue(request)

    def cancel(self, request: Request, ending: Literal["cancelled", "deadline", "shutdown"], now: float) -> bool:
        """End a request between two steps. One that is cancelled while it is computed is found out by whoever does.

        Returns:
            False if it has ended before, or is a text that is being computed.
        """
        assert self.in_flight is None, "a step is being computed"
        if request.state == "finished" or request in self.embedding:
            return False
        self._finish(request, ending, now)
        return True

    def _enqueue(self, request: Request) -> None:
        request.state = "queued"
        place = policy.place_of(self.limits, request.priority, request.submitted_at)
        line = self._line if request.kind == "generation" else self._line_of_texts
        heapq.heappush(line, (place, request.number, request))
        self.queue[request] = None
        self.changes.append(request)

    def _first(self, line: list[tuple[float, int, Request]]) -> Request | None:
        while line:
            request = line[0][2]
            if request in self.queue:
                return request
            heapq.heappop(line)
        return None

    def _shorten(self) -> None:
        """Takes those out of the lines who have left the queue, once they are the most."""
        for line in (self._line, self._line_of_texts, *self._behind.values()):
            if len(line) > 2 * len(self.queue) + 64:
                line[:] = [entry for entry in line if entry[2] in self.queue]
                heapq.heapify(line)

    def _finish(self, request: Request, reason: FinishReason, now: float, error: Exception | None = None) -> None:
        request.state = "finished"
        request.finish_reason = reason
        request.error = error if reason == "error" else None
        request.finished_at = now
        request.waits_for_memory = False
        self._crowded = False
        if request in self.queue:
            del self.queue[request]
            self._shorten()
        self._free_slot(request, now)
        self.changes.append(request)

    def _free_slot(self, request: Request, now: float) -> None:
        if request.slot is None:
            return
        seq = self.sequences[request.slot]
        del self.active[request.slot]
        seq.request = None
        seq.used_at = now
        seq.hold(request.tokens[: request.held], request.held, max(seq.peak, request.held))
        request.slot = None
        if not self.limits.prefix_cache:
            self._clear(seq)

    # -- the next step

    def plan(self, now: float) -> Plan:
        """The next step; empty if there is nothing to do. `commit()` must be told of one that is not."""
        assert self.in_flight is None, "the plan before was not committed"
        plan = Plan(began=now)
        for request in self._without_memory:
            request.waits_for_memory = False
        self._without_memory.clear()
        while not plan.rows:
            self._admit(now)
            if not self.active:
                break
            self._plan_rows(plan, now)
        plan.actions, self._actions = self._actions, []
        plan.whole = any(policy.must_be_whole(rows.request.passed_over) for rows in plan.rows)
        if plan:
            self.in_flight = Flight(plan, self.pace.copy(), self.limits, self.rules)
        return plan

    def _plan_rows(self, plan: Plan, now: float) -> None:
        suspect = next((request for request in self.active.values() if request.suspect), None)
        running = [suspect] if suspect is not None else list(self.active.values())
        prompts = [request for request in running if not policy.is_short(self.limits, request)]
        prompts.sort(key=lambda request: (request.place, request.number))
        budget, n_others = 0, _rows_of(running) - _rows_of(prompts)
        if prompts:
            turns = [(request.held, min(request.rows_left, request.turn)) for request in prompts]
            pieces = turns + [(at + n, request.rows_left - n) for request, (at, n) in zip(prompts, turns, strict=True)]
            budget = policy.prompt_budget(self.limits, self.pace, n_others, pieces, self.rules.by_sequence)
        allowed = budget
        if self.rules.cells is not None:
            running, prompts, budget = self._make_room(running, prompts, budget, now)
        for request in running:
            if policy.is_short(self.limits, request):
                count = request.rows_left
                plan.rows.append(Rows(request, _slot_of(request), request.held, count, True, self._room(request)))
                plan.n_other_rows += count
        if prompts:
            self._plan_prompts(plan, prompts, budget, budget < allowed)
        if self.rules.in_order:
            plan.rows.sort(key=lambda rows: rows.slot)

    def _plan_prompts(self, plan: Plan, prompts: list[Request], budget: int, short_of_memory: bool) -> None:
        by_sequence = self.rules.by_sequence
        shared = int(by_sequence and plan.n_other_rows > 0)
        wants = [(self._rows_to_stop(request), policy.whole_turn(request.turn, shared)) for request in prompts]
        shares = policy.share(budget, wants)
        if short_of_memory:
            for request, given in zip(prompts, shares, strict=True):
                if not given:
                    self._wait_for_memory(request)
        room = self.limits.n_batch if self.cells.free is None else min(self.limits.n_batch, self.cells.free)
        slack = policy.slack(self.limits, room - plan.n_other_rows - budget, by_sequence)
        n_complete, n_behind, rows_behind = 0, len(prompts), sum(shares)
        for request, (want, _), given in zip(prompts, wants, shares, strict=True):
            if policy.ends_here(self.limits, self.pace, n_complete, n_behind, rows_behind):
                break
            rows_behind -= given
            count = policy.whole_tiles(given, want, by_sequence and plan.n_prompt_rows > 0, shared, slack)
            if not count:
                continue
            slack -= max(count - given, 0)
            last = count == request.rows_left
            plan.rows.append(Rows(request, _slot_of(request), request.held, count, last, self._room(request)))
            plan.n_prompt_rows += count
            plan.n_before += count * (request.held + count / 2)
            complete = request.rows_left - count <= 1  # the very last row, behind a checkpoint, is no matter of time
            n_complete += complete and request.held > request.cached_tokens  # those that had to wait for a step before
            n_behind -= complete

    def _room(self, request: Request) -> int:
        """Tokens that may yet be added to it."""
        room = self.limits.n_ctx - len(request.tokens)
        return room if request.max_tokens is None else min(room, request.max_tokens - request.n_generated)

    def _rows_to_stop(self, request: Request) -> int:
        """Rows up to the next checkpoint, or to the end of the prompt."""
        while request.checkpoints and request.checkpoints[-1] <= request.held:
            request.checkpoints.pop()
        end = request.checkpoints[-1] if request.checkpoints else len(request.tokens)
        return end - request.held

    # -- slots

    def _admit(self, now: float) -> None:
        """Give slots to the first in line.

        Who waits for a prefix leaves the slot to those behind, and has its place in the line back once it is there.
        """
        for ready in [each for each in self._behind if each.slot is None or policy.is_short(self.limits, each)]:
            for entry in self._behind.pop(ready):
                heapq.heappush(self._line, entry)
        while self.idle_slots:
            request = self._first(self._line)
            if request is None:
                break
            if (self._crowded and self.active) or not self._fits(request):
                self._wait_for_memory(request)
                break
            entry = heapq.heappop(self._line)
            reuse = find_reuse(self.rules, request.tokens, self.sequences, self.limits.slots)
            assert reuse is not None
            leader = self._ahead_of(request, reuse.length)
            if leader is not None:
                self._behind.setdefault(leader, []).append(entry)
                continue
            del self.queue[request]
            self._give_slot(request, reuse, now)

    def _ahead_of(self, request: Request, held: int) -> Request | None:
        """A running prompt that begins alike, and is just computing what this one would compute, too.

        Several answers to one prompt come at once, and so do many that begin with the same instructions.
        """
        if not self.limits.prefix_cache or not self.rules.cut or self.rules.copy != "part":
            return None
        least, most = held + max(_LEAST_CHECKPOINT, self.rules.least_copy), len(request.tokens) - 1
        for each in self.active.values():
            if (
                not policy.is_short(self.limits, each)
                and each.priority >= request.priority
                and common_prefix(request.tokens, each.tokens, most) >= least
            ):
                return each
        return None

    def _fits(self, request: Request) -> bool:
        """Whether there are cells for it beside those that run; what idle sequences hold can be taken."""
        if self.rules.cells is None or not self.active:
            return True
        used = self.cells.used_by(self.active)
        coming = sum(each.rows_left + _headroom(each) for each in self.active.values())
        shared = 0
        if self.rules.copy == "part":
            most = len(request.tokens) - 1
            shared = max(
                common_prefix(request.tokens, each.tokens, min(each.held, most)) for each in self.active.values()
            )
        return used + coming + len(request.tokens) - shared + _headroom(request) <= self.rules.cells

    def _give_slot(self, request: Request, reuse: Reuse, now: float) -> None:
        seq, source = reuse.slot, reuse.source
        if source is None:
            self._clear(seq)
        elif source is seq:
            self._cut(seq, reuse.length)
        else:
            self._copy(source, seq, reuse.length)
            source.used_at = now
        seq.request = request
        seq.tokens = request.tokens
        self.active[seq.id] = request
        request.slot = request.last_slot = seq.id
        request.held = seq.held
        request.state = "prefill"
        request.waits_for_memory = False
        request.place = policy.place_of(self.limits, request.priority, now)
        request.turn = self.limits.quantum
        request.checkpoints = self._places_for_checkpoints(request, reuse.seen)
        if request.started_at is None:
            request.started_at = now
            request.cached_tokens = seq.held
        self.changes.append(request)

    def _places_for_checkpoints(self, request: Request, seen: int) -> list[int]:
        """Before the last token, for the same prompt again or one that continues it; and where others branched off."""
        if not self.rules.checkpoints or not self.limits.prefix_cache:
            return []
        last = len(request.tokens) - 1
        places = [last]
        if last - seen >= _LEAST_CHECKPOINT:
            places.append(seen)
        return [place for place in places if place - request.held >= _LEAST_CHECKPOINT]

    def _keep_checkpoint(self, request: Request, now: float) -> None:
        request.checkpoints.pop()
        tokens = request.tokens[: request.held]
        seqs = self.sequences[self.limits.slots :]
        seq = next((seq for seq in seqs if seq.held == len(tokens) and seq.tokens == tokens), None)
        if seq is None:
            seq = min(seqs, key=lambda seq: (seq.held > 0, seq.used_at))
            self._copy(self.sequences[_slot_of(request)], seq, request.held)
            seq.tokens = tokens
        seq.used_at = now

    def _preempt(self, request: Request, now: float) -> None:
        """Back to the queue; what it has generated becomes part of its prompt."""
        seq = self.sequences[_slot_of(request)]
        self._free_slot(request, now)
        self._clear(seq)
        request.held = 0
        request.preemptions += 1
        self._enqueue(request)
        self._wait_for_memory(request)

    # -- room

    def _make_room(
        self, running: list[Request], prompts: list[Request], budget: int, now: float
    ) -> tuple[list[Request], list[Request], int]:
        """Takes cells from idle sequences, and if need be from the last in line, until the step has room."""
        while True:
            n_generating = _rows_of(running) - _rows_of(prompts)
            wanted = n_generating + min(budget, _rows_of(prompts))
            while (free := self.cells.free or 0) < wanted and self._evict():
                pass
            if free >= wanted or free > n_generating or (free == n_generating and n_generating):
                return running, prompts, min(budget, free - n_generating)
            if len(self.active) == 1:
                request = running[0]
                self._finish(request, "error", now, MemoryFullError("the context's memory has no room for the request"))
                return [], [], 0
            last = self._last_in_line()
            self._preempt(last, now)
            running = [request for request in running if request is not last]
            prompts = [request for request in prompts if request is not last]
            if not running:
                return [], [], 0

    def _wait_for_memory(self, request: Request) -> None:
        """Notes it until the next plan, for those who look."""
        request.waits_for_memory = True
        self._without_memory.append(request)

    def _last_in_line(self) -> Request:
        return max(
            self.active.values(),
            key=lambda request: (
                policy.place_of(self.limits, request.priority, request.submitted_at),
                request.number,
            ),
        )

    def _evict(self) -> bool:
        """Forget the idle sequence that was of no use for the longest. False if there is none."""
        idle = [seq for seq in self.sequences if seq.request is None and seq.held]
        if not idle:
            return False
        self._clear(min(idle, key=lambda seq: seq.used_at))
        return True

    def _clear(self, seq: Sequence) -> None:
        if seq.held:
            self._actions.append(Clear(seq.id))
            self.cells.cut(seq.id, 0)
            seq.forget()

    def _cut(self, seq: Sequence, length: int) -> None:
        if length < seq.held:
            self._actions.append(Trim(seq.id, length))
            self.cells.cut(seq.id, length)
            seq.held = length

    def _copy(self, source: Sequence, seq: Sequence, length: int) -> None:
        self._clear(seq)
        whole = length == source.held
        self._actions.append(Copy(source.id, seq.id, None if whole else length))
        self.cells.copy(source.id, seq.id, length)
        seq.hold(source.tokens, length, source.peak)

    # -- what came of it

    def commit(self, outcome: Outcome, now: float) -> None:
        """Take in what came of the plan."""
        flight, self.in_flight = self.in_flight, None
        assert flight is not None, "there is no plan to commit"
        plan = flight.plan
        if outcome.fault in (Fault.BROKEN, Fault.UPSET):
            outcome.lost = [seq.id for seq in self.sequences]
        for seq_id in outcome.lost:
            self._lose(self.sequences[seq_id])
        if outcome.fault is not None:
            self._fault(plan, outcome, now)
        else:
            for rows in plan.rows:
                self._progress(rows, outcome, now)
            if outcome.aborted:
                self.pace.observe_stop(_loss(flight, outcome))
            elif plan.rows and outcome.rows_done == plan.n_prompt_rows + plan.n_other_rows:
                self.pace.observe(plan.n_prompt_rows, plan.n_other_rows, outcome.seconds, plan.depth)
        self._end_those(plan, outcome, now)

    def _end_those(self, plan: Plan, outcome: Outcome, now: float) -> None:
        """End those of a plan that have failed by themselves, or were cancelled."""
        for request in plan.requests:
            if request.state == "finished":
                continue
            if request in outcome.failed:
                self._finish(request, "error", now, outcome.failed[request])
            elif request in outcome.cancelled:
                self._finish(request, outcome.cancelled[request], now)

    def _progress(self, rows: Rows, outcome: Outcome, now: float) -> None:
        request, seq = rows.request, self.sequences[rows.slot]
        held = outcome.held.get(rows.slot, request.held)
        if held > request.held:
            self.cells.grow(seq.id, held - request.held)
            request.turn -= held - request.held
            request.held = seq.held = held
            seq.peak = max(seq.peak, held)
            request.passed_over = 0
            if request.turn <= 0:
                request.turn = self.limits.quantum
                request.place = policy.place_of(self.limits, request.priority, now)
        else:
            request.passed_over += 1
        if request.checkpoints and request.checkpoints[-1] == held:
            self._keep_checkpoint(request, now)
        request.suspect = False
        if request in outcome.cancelled or request in outcome.failed:
            return
        sampled = outcome.sampled.get(rows.slot)
        if sampled is None:
            assert not rows.output or held < len(request.tokens), "a row was computed, and no token was chosen from it"
            return
        request.tokens.append(sampled.token)
        request.tokens.extend(sampled.forced)
        if request.state != "decode":
            request.state = "decode"
            if request.first_token_at is None:
                request.first_token_at = now
            self.changes.append(request)
        if sampled.stops:
            self._finish(request, "stop", now)
        elif request.n_generated == request.max_tokens or len(request.tokens) >= self.limits.n_ctx:
            self._finish(request, "length", now)

    def _lose(self, seq: Sequence) -> None:
        self.cells.cut(seq.id, 0)
        if seq.request is not None:
            seq.request.held = seq.held = seq.peak = 0
        else:
            seq.forget()

    def _fault(self, plan: Plan, outcome: Outcome, now: float) -> None:
        error = outcome.error or DecodeFailedError("the step failed")
        requests = plan.requests
        if outcome.fault is Fault.BROKEN:
            pass  # by a step before, for which somebody has answered
        elif outcome.fault is Fault.FULL and plan.rows:
            self._full(requests, outcome, error, now)
        elif len(requests) == 1:
            if requests[0] not in outcome.cancelled:
                self._finish(requests[0], "error", now, error)
        else:
            for request in requests:
                request.suspect = True

    def _full(self, requests: list[Request], outcome: Outcome, error: Exception, now: float) -> None:
        """There was no room where the cells that were counted promised some: in a sliding window, say."""
        self._crowded = True
        if self._evict():
            while self._evict():
                pass
        elif len(self.active) == 1:
            for request in requests:
                if request not in outcome.cancelled:
                    self._finish(request, "error", now, error)
        else:
            self._preempt(self._last_in_line(), now)

    # -- texts to embed

    def plan_texts(self, now: float, alone: bool = False) -> Flight | None:
        """The next batch; None if no text waits, or one is being computed. `commit_texts()` must be told of it.

        Args:
            now: The time.
            alone: It has one text: what else it needs may fail, and that is to end no other.
        """
        if self.texts_in_flight is not None:
            return None
        plan, rows = Plan(began=now), self.limits.embed_rows
        while (request := self._first(self._line_of_texts)) is not None:
            if plan.texts and (request.n_prompt > rows or request.suspect):
                break
            heapq.heappop(self._line_of_texts)
            del self.queue[request]
            request.state = "prefill"
            if request.started_at is None:
                request.started_at = now
            self.changes.append(request)
            plan.texts.append(request)
            rows -= request.n_prompt
            if alone or request.suspect or len(plan.texts) == self.limits.embed_sequences:
                break
        if plan:
            self.texts_in_flight = Flight(plan, self.texts_pace.copy(), self.limits, self.rules)
        return self.texts_in_flight

    def commit_texts(self, outcome: Outcome, now: float) -> None:
        """Take in what came of a batch. A text of which nothing came is computed again."""
        flight, self.texts_in_flight = self.texts_in_flight, None
        assert flight is not None, "there is no batch to commit"
        plan = flight.plan
        if outcome.fault is not None:
            self._fault(plan, outcome, now)
        elif outcome.aborted:
            self.texts_pace.observe_stop(_loss(flight, outcome))
        elif len(outcome.embedded) == len(plan.texts):
            n = [request.n_prompt for request in plan.texts]
            self.texts_pace.observe(sum(n), 0, outcome.seconds, sum(each * each for each in n) / 2 / sum(n))
        for request in outcome.embedded:
            request.held = request.n_prompt
            self._finish(request, "stop", now)
        self._end_those(plan, outcome, now)
        for request in plan.texts:
            if request.state != "finished":
                self._enqueue(request)


def _loss(flight: Flight, outcome: Outcome) -> float:
    """Seconds that it cost those who stayed that it was stopped for others."""
    gone = [request in outcome.cancelled for request in flight.plan.requests]
    return max(policy.loss(flight.parts(gone), outcome.seconds), 0.0)


def _headroom(request: Request) -> int:
    return _HEADROOM if request.max_tokens is None else min(_HEADROOM, request.max_tokens - request.n_generated)


def _rows_of(requests: list[Request]) -> int:
    return sum(request.rows_left for request in requests)


def _slot_of(request: Request) -> int:
    assert request.slot is not None
    return request.slot

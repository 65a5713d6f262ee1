"""No schedule of submits, cancels and faults loses a request, ends one twice, leaks a slot, changes an answer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamacancel.engine.scheduler import Limits, MemoryRules, Outcome, Plan, Request, Scheduler
from tests.unit.fake_runner import Chances, FakeRunner, answer

KINDS = {
    "attention": MemoryRules(cut=True, copy="part", cells=64),
    "roomy attention": MemoryRules(cut=True, copy="part", cells=400),
    "attention of each its own": MemoryRules(cut=True, least_copy=4, in_order=True, by_sequence=True),
    "sliding window": MemoryRules(cut=False, window=8, copy="part", checkpoints=3, cells=120),
    "recurrent": MemoryRules(cut=False, copy="whole", checkpoints=2, by_sequence=True),
    "hybrid": MemoryRules(cut=False, copy="whole", checkpoints=3, cells=100, by_sequence=True),
    "other": MemoryRules(cut=False, copy="nothing"),
}
N_CTX = 48

# Prompts that begin alike, and go on differently.
STEM = [7, 7, 3, 9, 4, 4, 1, 8, 2, 6, 5, 3, 1, 9, 2, 2, 8, 8, 4, 7, 3, 6, 9, 1]
PROMPTS = st.builds(
    lambda n, rest: (STEM[:n] + rest) or [5], st.integers(0, len(STEM)), st.lists(st.integers(1, 3), max_size=20)
)


class Schedules(RuleBasedStateMachine):
    """Requests come, are cancelled at any moment, and steps go wrong in all the ways there are."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        slots=st.integers(1, 4),
        n_batch=st.integers(4, 40),
        cache=st.booleans(),
        seed=st.integers(0, 2**32),
        trouble=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    )
    def begin(self, kind: str, slots: int, n_batch: int, cache: bool, seed: int, trouble: float) -> None:
        self.rules = KINDS[kind]
        self.limits = Limits(
            slots=slots,
            queue_limit=6,
            n_ctx=N_CTX,
            n_batch=n_batch,
            n_ubatch=8,
            quantum=12,
            embed_rows=48,
            embed_sequences=slots,
            prefix_cache=cache,
        )
        self.scheduler = Scheduler(self.limits, self.rules)
        chances = Chances(
            stopped=trouble,
            full=trouble / 2,
            failed=trouble / 3,
            broken=trouble / 4,
            upset=trouble / 4,
            lost=trouble / 2,
            sampler=trouble / 10,
        )
        self.runner = FakeRunner(self.rules, n_batch, random.Random(seed), chances)
        self.now = 0.0
        self.accepted: dict[str, tuple[Request, list[int]]] = {}
        self.ended: dict[str, object] = {}
        self.told: set[str] = set()  # cancels that were accepted
        self.plan: Plan | None = None
        self.outcome: Outcome | None = None
        self.vectors: Outcome | None = None  # what came of the batch of texts that is in flight

    # -- what may happen

    @rule(prompt=PROMPTS, max_tokens=st.one_of(st.none(), st.integers(1, 12)), priority=st.integers(-2, 2))
    def submit(self, prompt: list[int], max_tokens: int | None, priority: int) -> None:
        self._submit(Request(f"r{len(self.accepted)}", list(prompt), max_tokens=max_tokens, priority=priority), prompt)

    @rule(prompt=PROMPTS)
    def embed(self, prompt: list[int]) -> None:
        self._submit(Request(f"r{len(self.accepted)}", list(prompt), kind="embedding"), prompt)

    def _submit(self, request: Request, prompt: list[int]) -> None:
        self.scheduler.submit(request, self.now)
        self.accepted[request.id] = (request, prompt)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), ending=st.sampled_from(["cancelled", "deadline", "shutdown"]), seen=st.booleans())
    def cancel(self, data: st.DataObject, ending: Any, seen: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.accepted)))
        unfinished = self.accepted[name][0].state != "finished"
        if unfinished:
            self.runner.cancelled.setdefault(name, ending)
        if self.plan is None and (seen or not unfinished):  # the step may find out before the box is emptied
            request = self.accepted[name][0]
            is_computed = request in self.scheduler.embedding
            told = self.scheduler.cancel(request, self.runner.cancelled.get(name, ending), self.now)
            assert told == (unfinished and not is_computed)
            if told:
                self.told.add(name)
        for flight in (self.scheduler.in_flight, self.scheduler.texts_in_flight):
            if flight is not None:
                flight.stops_inside([each.id in self.runner.cancelled for each in flight.plan.requests], self.now)

    @precondition(lambda self: self.plan is None)
    @rule()
    def start_step(self) -> None:
        plan = self.scheduler.plan(self.now)
        if plan:
            self.plan = plan
        elif not self.scheduler.embedding:
            texts = [each for each in self.scheduler.queue if each.kind == "embedding"]
            assert len(self.scheduler.queue) == len(texts), "requests wait, and there is nothing to do"

    @precondition(lambda self: self.plan is not None and self.outcome is None)
    @rule(seconds=st.floats(0.001, 1.0))
    def run_step(self, seconds: float) -> None:
        assert self.plan is not None
        self.outcome = self.runner.run(self.plan)
        self.outcome.seconds = seconds
        self.now += seconds

    @precondition(lambda self: self.outcome is not None)
    @rule()
    def end_step(self) -> None:
        assert self.outcome is not None
        self.scheduler.commit(self.outcome, self.now)
        self.plan = self.outcome = None

    @precondition(lambda self: self.plan is None)
    @rule(alone=st.booleans())
    def start_texts(self, alone: bool) -> None:
        before = self.scheduler.texts_in_flight
        texts = [each for each in self.scheduler.queue if each.kind == "embedding"]
        flight = self.scheduler.plan_texts(self.now, alone)
        assert (flight is not None) == (before is None and bool(texts))
        if flight is not None:
            assert len(flight.plan.texts) <= (1 if alone else self.limits.embed_sequences)
            assert sum(each.n_prompt for each in flight.plan.texts) <= self.limits.embed_rows

    @precondition(lambda self: self.scheduler.embedding and self.vectors is None)
    @rule(seconds=st.floats(0.001, 1.0))
    def run_texts(self, seconds: float) -> None:
        assert self.scheduler.texts_in_flight is not None
        self.vectors = self.runner.embed(self.scheduler.texts_in_flight.plan)
        self.vectors.seconds = seconds

    @precondition(lambda self: self.plan is None and self.vectors is not None)
    @rule()
    def end_texts(self) -> None:
        assert self.vectors is not None
        texts = self.scheduler.embedding
        self.scheduler.commit_texts(self.vectors, self.now)
        self.vectors = None
        assert not self.scheduler.embedding
        for each in texts:  # as the engine's thread does
            if each.id in self.runner.cancelled:
                self.scheduler.cancel(each, self.runner.cancelled[each.id], self.now)
                assert each.state == "finished"

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- what must hold

    @invariant()
    def nobody_is_lost_or_told_twice(self) -> None:
        for request in self.scheduler.changes:
            if request.state == "finished":
                self.ended.setdefault(request.id, _end_of(request))
                assert self.ended[request.id] == _end_of(request)
        self.scheduler.changes = []
        for name, (request, _) in self.accepted.items():
            assert (request.state == "finished") == (name in self.ended)
            assert request.state != "finished" or self.ended[name] == _end_of(request), "it ended a second time"
            places = (*self.scheduler.queue, *self.scheduler.active.values(), *self.scheduler.embedding)
            assert places.count(request) == (request.state != "finished")

    @invariant()
    def slots_are_those_of_the_active(self) -> None:
        for slot, request in self.scheduler.active.items():
            assert request.slot == slot
            assert self.scheduler.sequences[slot].request is request
            assert request.state in ("prefill", "decode")
        for request, _ in self.accepted.values():
            assert (request.slot is not None) == (request in self.scheduler.active.values())
        assert self.scheduler.idle_slots == self.limits.slots - len(self.scheduler.active)

    @invariant()
    def the_memory_holds_what_the_scheduler_thinks(self) -> None:
        if self.plan is not None or self.scheduler._actions:
            return  # what is planned was not done yet
        for seq in self.scheduler.sequences:
            assert self.runner.content(seq.id) == seq.tokens[: seq.held]
            assert seq.request is None or seq.held == seq.request.held
        assert self.scheduler.cells.used == self.runner.used

    @invariant()
    def answers_are_those_that_each_gives_alone(self) -> None:
        for request, prompt in self.accepted.values():
            if request.kind == "embedding":
                continue
            assert request.tokens[: len(prompt)] == prompt
            given = request.tokens[len(prompt) :]
            expected = answer(prompt, request.max_tokens, N_CTX)
            if request.finish_reason in ("stop", "length"):
                assert given == expected
                assert (request.finish_reason == "stop") == (given[-1] == 0)
            else:
                assert given == expected[: len(given)]

    @invariant()
    def endings_have_their_reasons(self) -> None:
        for name, (request, _) in self.accepted.items():
            if request.finish_reason in ("cancelled", "deadline", "shutdown"):
                assert self.runner.cancelled[name] == request.finish_reason
            assert (request.finish_reason == "error") == (request.error is not None)
            if name in self.told and request.state == "finished":
                assert request.finish_reason not in ("stop", "length"), "a cancel was accepted and forgotten"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.runner.chances = Chances()
        for _ in range(3000):
            if self.plan is None:
                self.start_texts(False)
                self.start_step()
            if self.scheduler.embedding and self.vectors is None:
                self.run_texts(0.01)
            if self.plan is not None:
                if self.outcome is None:
                    self.run_step(0.01)
                self.end_step()
            if self.vectors is not None:
                self.end_texts()
            if self.scheduler.idle:
                break
        else:
            pytest.fail("the requests never end")
        self.nobody_is_lost_or_told_twice()
        self.the_memory_holds_what_the_scheduler_thinks()
        self.answers_are_those_that_each_gives_alone()
        assert set(self.ended) == set(self.accepted)
        assert not self.scheduler.active
        assert not self.scheduler.queue


def _end_of(request: Request) -> object:
    return request.finish_reason, request.finished_at, len(request.tokens), request.error


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)

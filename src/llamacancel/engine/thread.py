"""The engine's thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ..cancel import Cause
from ..errors import ClosedError
from .desk import Desk
from .embedder import Embedder
from .faults import is_lost
from .joining import join
from .runner import Runner
from .scheduler import Outcome, Plan, Request, Scheduler, place_of
from .views import EngineSnapshot, RequestView, SlotView
from .work import Registration, Work, call, ending_of

__all__ = ["EngineThread"]


class EngineThread:
    """One thread that plans, runs and commits steps, until it is told to stop.

    It knows nothing of the `Engine`, so that an engine that was forgotten can be collected. No other thread touches the
    scheduler: what others want lies in the desk's box, which is emptied at the head of each turn.

    Args:
        scheduler: Decides.
        runner: Computes steps.
        embedder: Computes texts to embed, beside them.
        desk: Where requests and cancels come in.
        stream_interval: Seconds within which readers are told once of what short steps have brought.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, embedder: Embedder, desk: Desk, stream_interval: float
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.embedder = embedder
        self.desk = desk
        self.stream_interval = stream_interval
        self.steps = 0
        self.schedule_seconds = self.run_seconds = self.commit_seconds = self.decode_seconds = 0.0
        self.listeners: list[Registration] = []
        self._news: list[tuple[Work, RequestView | None]] = []
        self._unread: dict[Work, None] = {}  # have text of which their readers are not told yet
        self._told_at = -math.inf  # when readers were last told of text
        self._thread = desk.thread = threading.Thread(target=self._main, name="llamacancel-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- the engine's thread

    def _main(self) -> None:
        try:
            while (plan := self._schedule()) is not None:
                self._tell_all()
                self._commit(self._run(plan))
            self._end(ClosedError("the engine is closed"))
        except BaseException as error:
            self._fail(error)
        finally:
            try:
                self.embedder.close()
            finally:
                self.runner.close()

    def _schedule(self) -> Plan | None:
        """The next step. Sleeps while there is none; None when the engine is to stop."""
        desk, scheduler = self.desk, self.scheduler
        while True:
            began = time.perf_counter()
            now = time.monotonic()
            self._empty_box(now)
            self._see_to_texts(now)
            self._take_changes()
            plan = scheduler.plan(now)
            self._take_changes()
            if self._unread and self._readers_are_due(plan, now):
                self._take_unread(now)
            self.schedule_seconds += time.perf_counter() - began
            if plan or self._news:
                return plan
            if desk.closing and scheduler.idle and desk.box.empty():
                return None
            self._take_in(desk.box.get(), time.monotonic())

    def _empty_box(self, now: float) -> None:
        box = self.desk.box
        while not box.empty():
            self._take_in(box.get_nowait(), now)

    def _take_in(self, news: Work | Outcome | None, now: float) -> None:
        """Look at a request that is new or was cancelled, or at what came of a batch of texts."""
        if news is None:
            return
        if isinstance(news, Outcome):
            self._commit_texts(news, now)
            return
        if not news.taken:
            news.taken = True
            self.scheduler.submit(news.request, news.request.submitted_at)
        self._see_to_cancel(news, now)

    def _see_to_cancel(self, work: Work, now: float) -> None:
        if work.token.cancelled:
            self.scheduler.cancel(work.request, ending_of(work.token), now)

    def _see_to_texts(self, now: float) -> None:
        """Has the next batch of texts computed if none is. The first one alone, since the context is made with it."""
        flight = self.scheduler.plan_texts(now, alone=self.embedder.context is None)
        if flight is not None:
            self.embedder.begin(flight)

    def _commit_texts(self, outcome: Outcome, now: float) -> None:
        texts = self.scheduler.embedding
        self.desk.texts.end()
        if outcome.error is not None and is_lost(outcome.error):
            raise outcome.error
        self.scheduler.commit_texts(outcome, now)
        self.steps += 1
        self.run_seconds += outcome.seconds
        self.decode_seconds += outcome.seconds
        for request in texts:  # one that is to be computed again may have been cancelled when that went unnoticed
            self._see_to_cancel(request.owner, now)

    def _tell_all(self) -> None:
        """What a step has brought is told when the next one is planned: readers run while llama.cpp computes, and this
        thread need not wait for the interpreter lock until they are done.
        """
        if not self._news:
            return
        began = time.perf_counter()
        self._tell()
        self.commit_seconds += time.perf_counter() - began

    def _run(self, plan: Plan) -> Outcome | None:
        if not plan:
            return None
        began = time.perf_counter()
        self.runner.stop = self.desk.steps.begin(self.scheduler.in_flight)
        try:
            return self.runner.run(plan)
        except BaseException as error:
            return self.runner.upset(plan, error)
        finally:
            self.desk.steps.end()
            self.run_seconds += time.perf_counter() - began

    def _commit(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        began = time.perf_counter()
        self.scheduler.commit(outcome, time.monotonic())
        self.steps += 1
        self.decode_seconds += outcome.seconds
        self._take_changes()
        for slot, sampled in outcome.sampled.items():
            request = self.scheduler.active.get(slot)
            if request is not None and request.owner.has_readers:
                self._unread[request.owner] = None
                if request.n_generated == 1 + len(sampled.forced):
                    self._told_at = -math.inf  # nobody waits for the first text
        self.commit_seconds += time.perf_counter() - began

    def _fail(self, error: BaseException) -> None:
        """The engine cannot go on: everybody is told why."""
        self.desk.failure = error
        ended = ClosedError(f"the engine failed: {type(error).__name__}: {error}")
        ended.__cause__ = error
        self._end(ended)

    def _end(self, error: ClosedError) -> None:
        """Nobody looks into the box from now on: who comes later finds that out by himself."""
        self.desk.closing = True
        self.desk.over = error
        now = time.monotonic()
        for work in list(self.desk.works.values()):
            if work.token.cancelled:
                work.finish(ending_of(work.token), now)
            else:
                work.finish("error", now, error)
            self._news.append((work, work.view()))
        self._tell()

    # -- any thread

    def close(self) -> None:
        """Refuse new work, and stop once all that was accepted is finished."""
        self.desk.closing = True
        self.desk.box.put(None)

    def stop(self) -> None:
        """Refuse new work, and end what was accepted with "shutdown"."""
        self.close()
        self.desk.token.cancel("the engine closes", cause=Cause.SHUTDOWN)

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread's end; True if it has come, or if the exit has stopped it for good."""
        return join(self._thread, timeout)

    @property
    def stopped(self) -> bool:
        return not self._thread.is_alive()

    def snapshot(self) -> EngineSnapshot:
        """What is copied of the engine's own is copied by CPython as a whole; all the rest is up to this thread."""
        scheduler = self.scheduler
        works = list(self.desk.works.values())
        recent = tuple(self.desk.recent)
        views = [view for work in sorted(works, key=self._place_of) if (view := work.view()).state != "finished"]
        slots = []
        for seq in scheduler.sequences[: scheduler.limits.slots]:
            request = seq.request
            if request is None:
                slots.append(SlotView(seq.id, "idle", None, seq.held))
            else:
                slots.append(
                    SlotView(seq.id, "decode" if request.state == "decode" else "prefill", request.id, seq.held)
                )
        return EngineSnapshot(
            slots=tuple(slots),
            queue=tuple(view for view in views if view.state == "queued"),
            active=tuple(view for view in views if view.state != "queued"),
            recent=recent,
            steps=self.steps,
            queue_limit=scheduler.limits.queue_limit,
            closing=self.desk.closing,
            cells_used=None if scheduler.cells.total is None else scheduler.cells.used,
            cells=scheduler.cells.total,
            schedule_seconds=self.schedule_seconds,
            run_seconds=self.run_seconds,
            commit_seconds=self.commit_seconds,
            decode_seconds=self.decode_seconds,
        )

    def _place_of(self, work: Work) -> tuple[float, int]:
        request = work.request
        return place_of(self.scheduler.limits, request.priority, request.submitted_at), request.number

    # -- telling

    def _take_changes(self) -> None:
        """What became of requests since it was last asked."""
        changes = self.scheduler.changes
        if not changes:
            return
        now = time.monotonic()
        for request in changes:
            self._take_change(request, now)
        changes.clear()

    def _take_change(self, request: Request, now: float) -> None:
        work: Work = request.owner
        if request.state == "finished":
            if work.settled:  # it was done within one step
                return
            work.settled = True
            assert request.finish_reason is not None
            work.finish(request.finish_reason, now, request.error)
            self.desk.names.give_back(work)
            self._unread.pop(work, None)
            self._news.append((work, work.view() if self.listeners else None))
            return
        if request.slot is not None or request.kind == "embedding":
            work.start()
        if self.listeners:
            self._news.append((work, work.view()))

    def _readers_are_due(self, plan: Plan, now: float) -> bool:
        """Whether readers are told of new text before this step: its end may come later than they are to wait.

        A wake-up takes a part of a millisecond, which a fast model's steps would be made longer by, each of them.
        """
        is_short = plan.rows and not plan.n_prompt_rows
        return not is_short or now + self.scheduler.pace.step_seconds >= self._told_at + self.stream_interval

    def _take_unread(self, now: float) -> None:
        self._news.extend((work, None) for work in self._unread)
        self._unread.clear()
        self._told_at = now

    def _tell(self) -> None:
        """Calls listeners and readers, in order."""
        news, self._news = self._news, []
        afterwards: dict[Callable[[], object], None] = {}
        for work, view in news:
            if view is not None:
                for listener in tuple(self.listeners):
                    call(listener.fn, view)
            if view is None or view.state == "finished":
                afterwards.update(work.tell())
        for after in afterwards:
            call(after)

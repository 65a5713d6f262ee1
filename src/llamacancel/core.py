"""The engine's thread, and what it shares with those who submit and cancel."""

from __future__ import annotations

import functools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from ._cancel import CancelToken, Cause
from .errors import ClosedError
from .runner import Runner
from .scheduler import Outcome, Plan, Request, Scheduler
from .views import EngineSnapshot, RequestView, SlotView
from .work import Registration, Work, ending_of

__all__ = ["Core"]


class Core:
    """One thread that plans, runs and commits steps, until it is told to stop.

    It knows nothing of the `Engine`, so that an engine that was forgotten can be collected. The scheduler is used under
    `_lock`, which is never held while llama.cpp computes or somebody else's function is called.

    Args:
        scheduler: Decides.
        runner: Computes.
        history: Finished requests to remember.
        stream_interval: Seconds within which readers are told once of what short steps have brought.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, history: int, stream_interval: float) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.stream_interval = stream_interval
        self.works = runner.works
        self.token = CancelToken()
        self.closing = False
        self.failure: BaseException | None = None
        self.steps = 0
        self.schedule_seconds = self.run_seconds = self.commit_seconds = 0.0
        self.listeners: list[Registration] = []
        self._recent: deque[RequestView] = deque(maxlen=history)
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._news: deque[tuple[Work, RequestView | None]] = deque()
        self._unread: dict[Work, None] = {}  # have text of which their readers are not told yet
        self._told_at = -math.inf  # when readers were last told of text
        self._telling = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="llamacancel-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- the engine's thread

    def _main(self) -> None:
        try:
            while (plan := self._schedule()) is not None:
                self._tell_all()
                self._commit(self._run(plan))
            self._tell_all()
        except BaseException as error:
            self._fail(error)
        finally:
            self.runner.close()

    def _schedule(self) -> Plan | None:
        """The next step. Sleeps while there is none; None when the engine is to stop."""
        with self._wake:
            while True:
                began = time.perf_counter()
                if self.runner.stop.cancelled:
                    self.runner.stop = CancelToken()
                now = time.monotonic()
                plan = self.scheduler.plan(now)
                self._take_changes()
                if self._unread and self._readers_are_due(plan, now):
                    self._take_unread(now)
                self.schedule_seconds += time.perf_counter() - began
                if plan:
                    break
                if self.closing and self.scheduler.idle:
                    return None
                if self._news and not self._telling.locked():
                    break
                self._wake.wait()
        return plan

    def _tell_all(self) -> None:
        """What a step has brought is told when the next one is planned: readers run while llama.cpp computes, and this
        thread need not wait for the interpreter lock until they are done.
        """
        began = time.perf_counter()
        self._tell()
        self.commit_seconds += time.perf_counter() - began

    def _run(self, plan: Plan) -> Outcome | None:
        if not plan:
            return None
        began = time.perf_counter()
        outcome = self.runner.run(plan)
        self.run_seconds += time.perf_counter() - began
        return outcome

    def _commit(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        began = time.perf_counter()
        with self._lock:
            self.scheduler.commit(outcome, time.monotonic())
            self.steps += 1
            self._take_changes()
            for slot in outcome.sampled:
                request = self.scheduler.active.get(slot)
                if request is not None and (work := self.works[request.id]).has_readers:
                    self._unread[work] = None
                    if request.n_generated == 1:
                        self._told_at = -math.inf  # nobody waits for the first text
        self.commit_seconds += time.perf_counter() - began

    def _fail(self, error: BaseException) -> None:
        """The engine cannot go on: everybody is told why."""
        with self._lock:
            self.failure = error
            self.closing = True
            ended = ClosedError(f"the engine failed: {type(error).__name__}: {error}")
            ended.__cause__ = error
            self.scheduler.abandon(ended, time.monotonic())
            self._take_changes()
        self._tell()

    # -- any thread

    def submit(self, make_work: Callable[[CancelToken], Work]) -> Work:
        """Queue the work that `make_work` makes with the engine's token.

        Raises:
            ClosedError: If the engine is closed or failed.
            QueueFullError: If the queue is full.
            ValueError: If an unfinished request has that id.
        """
        with self._lock:
            self.check_open()
        work = make_work(self.token)
        request = work._request
        with self._wake:
            self.check_open()
            if request.id in self.works:
                raise ValueError(f"there is an unfinished request {request.id!r}")
            self.works[request.id] = work
            try:
                self.scheduler.submit(request, time.monotonic())
            except BaseException:
                del self.works[request.id]
                raise
            self._take_changes()
            self._wake.notify()
        this = weakref.ref(self)

        def cancelled() -> None:
            core = this()
            if core is not None:
                core.cancelled(work)

        # Outside of the lock: a token that is cancelled by now calls at once.
        handle = work._token.add_callback(cancelled)
        work._callback = handle
        if work.ended:
            handle.remove()
        self._tell()
        return work

    def cancelled(self, work: Work) -> None:
        """The token of `work` was cancelled."""
        with self._wake:
            now = time.monotonic()
            self.scheduler.cancel(work.id, ending_of(work._token), now)
            if self.scheduler.stops_inside(now):
                self.runner.stop.cancel("others in the step were cancelled")
            self._take_changes()
            self._wake.notify()
        self._tell()

    def close(self) -> None:
        """Refuse new work, and stop once all that was accepted is finished."""
        with self._wake:
            self.closing = True
            self._wake.notify()

    def stop(self) -> None:
        """Refuse new work, and end what was accepted with "shutdown"."""
        self.close()
        self.token.cancel("the engine closes", cause=Cause.SHUTDOWN)

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread's end; True if it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_this_thread(self) -> bool:
        """Whether it is the engine's thread that asks."""
        return self._thread is threading.current_thread()

    @property
    def stopped(self) -> bool:
        return not self._thread.is_alive()

    def snapshot(self) -> EngineSnapshot:
        with self._lock:
            scheduler = self.scheduler
            slots = tuple(
                SlotView(seq.id, "idle", None, seq.held)
                if seq.request is None
                else SlotView(
                    seq.id, "decode" if seq.request.state == "decode" else "prefill", seq.request.id, seq.held
                )
                for seq in scheduler.sequences[: scheduler.limits.slots]
            )
            return EngineSnapshot(
                slots=slots,
                queue=tuple(self.works[request.id].view() for request in scheduler.waiting()),
                active=tuple(
                    self.works[request.id].view() for request in (*scheduler.active.values(), *scheduler.embedding)
                ),
                recent=tuple(self._recent),
                steps=self.steps,
                queue_limit=scheduler.limits.queue_limit,
                closing=self.closing,
                cells_used=None if scheduler.cells.total is None else scheduler.cells.used,
                cells=scheduler.cells.total,
                schedule_seconds=self.schedule_seconds,
                run_seconds=self.run_seconds,
                commit_seconds=self.commit_seconds,
                decode_seconds=self.runner.decode_seconds,
            )

    def check_open(self) -> None:
        if self.failure is not None:
            raise ClosedError(f"the engine failed: {type(self.failure).__name__}: {self.failure}") from self.failure
        if self.closing:
            raise ClosedError("the engine is closed")

    # -- telling

    def _take_changes(self) -> None:
        """Under the lock: what became of requests since it was last asked."""
        changes = self.scheduler.changes
        if not changes:
            return
        now = time.monotonic()
        while changes:  # taken out when it is dealt with: a Ctrl-C on the main thread may come anywhere
            self._take_change(changes[0], now)
            del changes[0]

    def _take_change(self, request: Request, now: float) -> None:
        work = self.works.get(request.id)
        if work is None or work._request is not request:
            return
        if request.state == "finished":
            work._end(now)
            view = work.view()
            self._recent.append(view)
            self._unread.pop(work, None)
            del self.works[request.id]
        elif not self.listeners:
            return
        else:
            view = work.view()
        self._news.append((work, view))

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
        """Calls listeners and readers, in order and one at a time, without the lock.

        If another thread is at it, that one tells our news, too.
        """
        while self._news and self._telling.acquire(blocking=False):
            try:
                afterwards: dict[Callable[[], object], None] = {}
                while self._news:
                    work, view = self._news.popleft()
                    if view is not None:
                        for listener in tuple(self.listeners):
                            _call(listener.fn, view)
                    if view is None or view.state == "finished":
                        work._wake()
                        for entry in tuple(work._notify):
                            _call(entry.fn)
                            if entry.after is not None:
                                afterwards[entry.after] = None
                for after in afterwards:
                    _call(after)
            finally:
                self._telling.release()


_called_at_once = CancelToken()
_called_at_once.cancel()


def _call(fn: Callable[..., object], *args: object) -> None:
    """Calls somebody else's function; what it raises goes to `sys.unraisablehook`, as with any callback of a token."""
    _called_at_once.add_callback(functools.partial(fn, *args))

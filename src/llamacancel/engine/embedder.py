"""Embeds texts on a thread of its own, in a context of its own: generations go on beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ..cancel import CancelToken
from ..errors import DecodeCancelled
from ..llama import Batch, Context, DecodeResult
from .desk import Watch
from .faults import for_a_reader
from .generation import EmbeddingWork
from .joining import join
from .scheduler import Fault, Flight, Outcome, Plan, Request
from .work import ending_of

__all__ = ["Embedder"]


class Embedder:
    """Computes one batch of texts at a time, under the tokens of its requests.

    The context is made with the first batch, under its first request's token. After a fault it is closed, and made
    again with the next one. `begin()` and `close()` are the engine's thread's, all else is its own thread's.

    Args:
        make: Makes the context, given a token.
        watch: Has the batch stopped that is being computed.
        tell: Called with what came of a batch.

    Attributes:
        context: The context; None as long as there is none.
    """

    def __init__(
        self, make: Callable[[CancelToken | None], Context], watch: Watch, tell: Callable[[Outcome], object]
    ) -> None:
        self.context: Context | None = None
        self._make = make
        self._watch = watch
        self._tell = tell
        self._batch: Batch | None = None
        self._thread: threading.Thread | None = None
        self._plans: SimpleQueue[tuple[Plan, CancelToken] | None] = SimpleQueue()

    def begin(self, flight: Flight) -> None:
        """Have a batch computed. The one before has been told of."""
        plan, stop = flight.plan, self._watch.begin(flight)
        try:
            if self._thread is None:
                thread = threading.Thread(target=self._main, name="llamacancel-embedder", daemon=True)
                thread.start()
                self._thread = thread
            self._plans.put((plan, stop))
        except BaseException as error:  # no more threads, say
            self._tell(_fault(plan, error))

    def close(self) -> None:
        """End the thread, unless the exit holds it, and close the context. A batch that it computes is stopped."""
        self._watch.stop.cancel("the engine closes")
        self._plans.put(None)
        if self._thread is not None:
            join(self._thread)
            if self._thread.is_alive():
                return
        self._drop()

    # -- its own thread

    def _main(self) -> None:
        while (begun := self._plans.get()) is not None:
            plan, stop = begun
            try:
                outcome = self._run(plan.texts, stop)
            except BaseException as error:
                outcome = _fault(plan, error)
                self._drop()
            self._tell(outcome)

    def _run(self, requests: list[Request], stop: CancelToken) -> Outcome:
        tokens = {seq: request.owner.token_until(stop) for seq, request in enumerate(requests)}
        if self.context is None:
            self.context = self._make(tokens[0])
        context, outcome = self.context, Outcome()
        batch = self._fill(requests, context)
        began = time.perf_counter()
        told: dict[int, Any]
        try:
            told = self._compute(context, batch, tokens).sequences
        except DecodeCancelled as error:
            told = error.sequences
            outcome.aborted = stop.cancelled
        outcome.seconds = time.perf_counter() - began
        for seq, request in enumerate(requests):
            work: EmbeddingWork = request.owner
            if told[seq].cancelled:
                if work.token.cancelled:
                    outcome.cancelled[request] = ending_of(work.token)
            elif told[seq].state == "completed":
                self._take(context, seq, work, outcome)
        if context.memory.kind != "none":
            context.memory.clear()
        return outcome

    def _fill(self, requests: list[Request], context: Context) -> Batch:
        batch = self._batch = self._batch or Batch(context.n_batch)
        batch.clear()
        for seq, request in enumerate(requests):
            batch.add_sequence(request.tokens, seq_id=seq, logits="all")
        return batch

    def _compute(self, context: Context, batch: Batch, tokens: dict[int, CancelToken]) -> DecodeResult:
        """The native call: all that this class does is around it."""
        return context.decode(batch, tokens)

    def _take(self, context: Context, seq: int, work: EmbeddingWork, outcome: Outcome) -> None:
        try:
            work.vector = context.pooled_embeddings(seq)
            outcome.embedded.append(work.request)
        except BaseException as error:
            outcome.failed[work.request] = for_a_reader(error)

    def _drop(self) -> None:
        context, self.context = self.context, None
        if context is not None:
            context.close()


def _fault(plan: Plan, error: BaseException) -> Outcome:
    """What comes of a batch that could not be computed."""
    left = {each: ending_of(each.owner.token) for each in plan.texts if each.owner.token.cancelled}
    return Outcome(fault=Fault.FAILED, error=for_a_reader(error), cancelled=left)

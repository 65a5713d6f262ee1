"""Does what the scheduler has planned: the part of a step that computes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from ..cancel import CancelToken
from ..errors import (
    ContextBusyError,
    DecodeCancelled,
    DecodeFailedError,
    DirtySequenceError,
    InvalidBatchError,
    MemoryFullError,
    SequenceOutcome,
)
from ..llama import Batch, Context, DecodeResult, Model, Sampler, choose_tokens
from .faults import for_a_reader, is_lost
from .generation import GenerationWork
from .masks import Masks
from .scheduler import Clear, Copy, Fault, MemoryRules, Outcome, Plan, Request, Rows, Sampled, Trim
from .scheduler.plan import Action
from .work import ending_of

if TYPE_CHECKING:
    from ..llama import Chosen

__all__ = ["Runner", "rules_of"]

_LEAST_COPY = 32  # tokens from which on it pays to copy a cache that another sequence has to itself, all of it
_UNUSABLE = "the context is unusable"  # how the core says that an assertion has failed in it before
_AS_BEFORE = (DecodeFailedError, MemoryFullError, InvalidBatchError, DirtySequenceError, ContextBusyError, MemoryError)
"""What a decode raises that leaves the context as it was, but for what it says."""


def rules_of(model: Model, *, slots: int, checkpoints: int | None, unified: bool, swa_full: bool) -> MemoryRules:
    """What the memory of a model's contexts can do; `cells` is filled in when there is a context.

    Args:
        model: The model.
        slots: Requests that run at the same time.
        checkpoints: States to keep beside them; None: as many as slots where a state cannot be cut back.
        unified: One cache for all sequences.
        swa_full: A sliding window keeps everything.
    """
    kind = str(model.memory_kind)
    by_sequence = not unified or kind in ("recurrent", "hybrid", "hybrid_sliding_window")
    if kind == "attention" or (kind == "sliding_window" and swa_full):
        if unified:
            return MemoryRules(cut=True)
        return MemoryRules(cut=True, least_copy=_LEAST_COPY, in_order=True, by_sequence=by_sequence)
    if kind in ("none", "other") or not unified:
        return MemoryRules(cut=False, copy="nothing", by_sequence=by_sequence)
    return MemoryRules(
        cut=False,
        window=model.n_swa if kind == "sliding_window" else 0,
        copy="part" if kind == "sliding_window" else "whole",
        checkpoints=slots if checkpoints is None else checkpoints,
        by_sequence=by_sequence,
    )


class _StepBatch(Batch):
    """A batch that takes the single rows of many sequences in one call."""

    def add_single_rows(self, tokens: list[int], positions: list[int], seq_ids: list[int]) -> None:
        """Adds a row with an output for each of the sequences. The values are known to be good."""
        assert self._token is not None
        n = self._n
        end = n + len(tokens)
        first = int(self._seq_offset[n])
        self._token[n:end] = tokens
        self._pos[n:end] = positions
        self._seq_id[first : first + len(tokens)] = seq_ids
        self._seq_offset[n + 1 : end + 1] = range(first + 1, first + len(tokens) + 1)
        self._output[n:end] = 1
        self._n = end


class Runner:
    """Runs steps in a context.

    Args:
        make_context: Makes the context, given a token; None if the model does not generate.
        token: Cancels the making of the first context.
        least_forced: Tokens that a constraint forces are computed at once if there are so many; 0: never.

    Attributes:
        stop: Cancelled to stop the step that is being run, for all of its requests. Each step listens to the one that
            is here when it begins.
        n_ctx, n_batch, n_ubatch: Of the context.
        unified: Whether all of its sequences share one cache.
        cells: Cells that they share; None if each has its own, or needs none.
    """

    def __init__(
        self,
        make_context: Callable[[CancelToken | None], Context] | None,
        token: CancelToken | None = None,
        least_forced: int = 0,
    ) -> None:
        self._make_context = make_context
        self.stop = CancelToken()
        self._masks = Masks(os.cpu_count() or 1)
        self.least_forced = least_forced
        self.n_ctx = self.n_batch = self.n_ubatch = 1
        self.unified = True
        self.cells: int | None = None
        if make_context is not None:
            self.context = make_context(token)
            self._memory = self.context.memory
            self._batch = _StepBatch(self.context.n_batch)
            self.n_ctx, self.n_batch, self.n_ubatch = (
                self.context.n_ctx_seq,
                self.context.n_batch,
                self.context.n_ubatch,
            )
            self.unified = self.n_ctx == self.context.n_ctx
            if self._memory.kind not in ("recurrent", "other") and self.unified:
                self.cells = self.n_ctx

    def close(self) -> None:
        """Free the context."""
        self._masks.close()
        if self._make_context is not None:
            self.context.close()

    def run(self, plan: Plan) -> Outcome:
        """Does what is planned, and tells what came of it."""
        outcome = Outcome()
        for action in plan.actions:
            self._act(action, outcome)
        if plan.rows:
            self._decode(plan, outcome)
        return outcome

    def upset(self, plan: Plan, error: BaseException) -> Outcome:
        """What comes of a plan when `run` has raised something that nobody has foreseen.

        It is the fault of one of the requests. What the memory holds is not known, so it is emptied.

        Raises:
            BaseException: `error`, if the model is lost; or why no context can be made any more.
        """
        if is_lost(error):
            raise error
        if self._make_context is not None:
            try:
                self._memory.clear()
            except BaseException:
                self._renew()
        return Outcome(fault=Fault.UPSET, error=for_a_reader(error), cancelled=self._cancelled(plan))

    def _cancelled(self, plan: Plan) -> dict[Request, Any]:
        return {each: ending_of(each.owner.token) for each in plan.requests if each.owner.token.cancelled}

    # -- generations

    def _act(self, action: Action, outcome: Outcome) -> None:
        if isinstance(action, Clear):
            self._clear(action.seq)
            return
        try:
            if isinstance(action, Trim):
                self._memory.remove(action.seq, action.length)
            else:
                self._copy(action)
        except (ValueError, DirtySequenceError, DecodeFailedError, MemoryError):
            self._lose(action.dst if isinstance(action, Copy) else action.seq, outcome)

    def _copy(self, action: Copy) -> None:
        length = -1 if action.length is None else action.length
        if self.unified:
            self._memory.copy(action.src, action.dst, 0, length)
        else:  # a cache of its own is copied as a whole
            self._memory.copy(action.src, action.dst)
            if length >= 0:
                self._memory.remove(action.dst, length)
        if self._memory.pos_max(action.dst) < 0:
            raise ValueError(f"sequence {action.src} holds nothing to copy")

    def _clear(self, seq: int) -> None:
        with suppress(DecodeFailedError):  # the model is lost, as the next decode tells
            self._memory.remove(seq)

    def _lose(self, seq: int, outcome: Outcome) -> None:
        self._clear(seq)
        outcome.lost.append(seq)

    def _decode(self, plan: Plan, outcome: Outcome) -> None:
        planned = [rows for rows in plan.rows if rows.slot not in outcome.lost] if outcome.lost else plan.rows
        if not planned:
            return
        last_rows = self._fill(planned)
        tokens = {rows.slot: rows.request.owner.token_until(self.stop) for rows in planned}
        began = time.perf_counter()
        self._begin_masks(planned)
        try:
            when = "finish" if plan.whole else "stop"
            result = self._compute(self.context, self._batch, tokens, on_cancel="keep", when_shared=when)
        except DecodeCancelled as error:
            told, outcome.rows_done = error.sequences, error.rows_done
            outcome.aborted = self.stop.cancelled
        except _AS_BEFORE as error:
            self._failed(error, outcome)
            outcome.cancelled = self._cancelled(plan)
            return
        else:
            told, outcome.rows_done = result.sequences, result.rows_done
        finally:
            outcome.seconds = time.perf_counter() - began
        self._collect(planned, last_rows, told, outcome)

    def _compute(self, context: Context, batch: Batch, tokens: dict[int, CancelToken], **how: Any) -> DecodeResult:
        """The native call: all that this class does is around it."""
        return context.decode(batch, tokens, **how)

    def _begin_masks(self, planned: list[Rows]) -> None:
        """Has what constraints allow next computed while llama.cpp computes. What fails is met again by `_sample`.

        One whose step is not sampled, because it was stopped or cancelled, goes on by itself.
        """
        for rows in planned:
            work: GenerationWork = rows.request.owner
            if rows.output and work.mask is None and work.sampler is not None and work.sampler._lacks_mask:
                with suppress(RuntimeError):  # no more threads, say
                    work.mask = self._masks.begin(work.sampler, work.token)

    def _fill(self, planned: list[Rows]) -> list[int]:
        """Puts the rows into the batch; the index of the last row of each."""
        batch = self._batch
        batch.clear()
        n = 0
        while n < len(planned) and planned[n].count == 1 and planned[n].output:
            n += 1
        if n:
            single = planned[:n]
            batch.add_single_rows(
                [rows.request.tokens[rows.start] for rows in single],
                [rows.start for rows in single],
                [rows.slot for rows in single],
            )
        last = list(range(n))
        for rows in planned[n:]:
            chunk = rows.request.tokens[rows.start : rows.start + rows.count]
            last.append(batch.add_sequence(chunk, rows.start, rows.slot, "last" if rows.output else "none").stop - 1)
        return last

    def _failed(self, error: Exception, outcome: Outcome) -> None:
        outcome.error = error
        if is_lost(error):
            raise error
        if isinstance(error, DirtySequenceError):
            for seq in error.seq_ids:
                self._lose(seq, outcome)
        elif isinstance(error, MemoryFullError):
            outcome.fault = Fault.FULL
        elif str(error).startswith(_UNUSABLE):
            outcome.fault = Fault.BROKEN
            self._renew()
        else:
            outcome.fault = Fault.FAILED

    def _renew(self) -> None:
        assert self._make_context is not None
        self.context.close()
        self.context = self._make_context(None)
        self._memory = self.context.memory

    def _collect(
        self, planned: list[Rows], last_rows: list[int], told: dict[int, SequenceOutcome], outcome: Outcome
    ) -> None:
        due: list[tuple[Rows, int, GenerationWork]] = []
        for rows, row in zip(planned, last_rows, strict=True):
            sequence = told[rows.slot]
            work: GenerationWork = rows.request.owner
            cancelled = sequence.cancelled and work.token.cancelled  # itself, and not only with the step
            if cancelled:
                outcome.cancelled[rows.request] = ending_of(work.token)
            if sequence.state == "dirty":
                self._lose(rows.slot, outcome)
                continue
            outcome.held[rows.slot] = sequence.end
            if rows.output and not cancelled and sequence.end >= rows.start + rows.count:
                due.append((rows, row, work))
        if due:
            self._sample(due, outcome)

    def _sample(self, due: list[tuple[Rows, int, GenerationWork]], outcome: Outcome) -> None:
        for _, _, work in due:
            mask, work.mask = work.mask, None
            if mask is not None:
                mask.wait()
        for (rows, _, work), drawn in zip(due, self._choose(due), strict=True):
            try:
                if isinstance(drawn, Exception):
                    raise drawn
                stops = work.take(*drawn)
                outcome.sampled[rows.slot] = Sampled(drawn[0], stops) if stops else self._force(rows, drawn[0])
            except DecodeCancelled:
                outcome.cancelled[rows.request] = ending_of(work.token)
            except BaseException as error:
                outcome.failed[rows.request] = for_a_reader(error)

    def _force(self, rows: Rows, token: int) -> Sampled:
        """Adds what the constraint forces behind the token that was chosen: those rows are computed at once."""
        work: GenerationWork = rows.request.owner
        sampled, room = Sampled(token), rows.room - 1
        if self.least_forced and room > 0 and work.sampler is not None and work.logprobs is None:
            taken = []
            for each in work.sampler._take_forced(self.least_forced, room):
                taken.append(each)
                sampled.stops = work.take(each, None, ())
                if sampled.stops:
                    break
            sampled.forced = taken
        return sampled

    def _choose(self, due: list[tuple[Rows, int, GenerationWork]]) -> Sequence[Chosen | Exception]:
        """The next token of each, or why there is none."""
        rows = [(cast(Sampler, work.sampler), row, work.token, work.logprobs) for _, row, work in due]
        try:
            return choose_tokens(self.context, rows)
        except BaseException as error:
            if len(due) == 1:
                return [for_a_reader(error)]
        return [drawn for each in due for drawn in self._choose([each])]

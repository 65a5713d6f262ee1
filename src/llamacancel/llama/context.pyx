# distutils: language = c++
"""A context: the guarded decode and its outputs."""

import sys
import warnings

import numpy as np

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, uint32_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.map cimport map as cppmap
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from posix.unistd cimport getpid

from .._native.cancel.call cimport Call, WhenShared
from .._native.cancel.token cimport TokenCore
from .._native.guard.context cimport OnCancel, DecodeReport, shared_call, check_tokens, ContextBox
from .._native.guard.cut cimport BatchView, GapCost, Cut
from .._native.guard.outputs cimport Outputs, CANCELLED
from .._native.llama cimport *
from .._native.model.model cimport ModelBox
from .._native.process.status cimport Status
from ..cancel.token cimport CancelToken, core_of
from ._llama cimport check_forked, check_process, drain_log, text_of
from .call cimport Interrupt, cause_of, check_status, raise_cancelled, watch_signals
from .model cimport LoraAdapter, Model
from .result cimport outcomes_of, result_of, survivors_of, untouched

from ..cancel import Cause
from .params import (
    CACHE_TYPES,
    FLASH_ATTENTION,
    POOLING,
    ROPE_SCALING,
    LatencyPlan,
    choice,
    default_threads,
    integer,
    number,
)
from .batch import Batch
from ..errors import (
    ClosedError,
    ContextError,
    DirtySequenceError,
    InvalidBatchError,
    SequenceOutcome,
)
from ..cancel.outcome import cancelled_error

cdef dict _ON_CANCEL = {"rollback": 0, "keep": 1}
cdef dict _WHEN_SHARED = {"finish": 0, "stop": 1}
cdef str _ROLLBACK = "rollback"
cdef str _FINISH = "finish"
cdef int _LARGEST_UBATCH = 512  # on a CPU nothing is gained beyond


@cython.no_gc_clear
cdef class Context:
    """A context of a model: memory for sequences, and the decode that fills it. Made by `Model.context`.

    One thread uses a context at a time. A second one waits under its token, or gets a `ContextBusyError` if
    it has none.

    Args:
        model: The model.
        n_ctx: Cells of memory, in tokens; None for what the model was trained for, at most 4,096.
        n_batch: Most rows in one batch.
        n_ubatch: Rows computed at a time. None: chosen from `cancel_latency`.
        n_seq_max: Most sequences; ids are 0 to n_seq_max - 1.
        n_threads: Threads for the computation; None for all CPUs that the process may use.
        n_threads_batch: Threads for more than one row at a time; None for the same.
        cancel_latency: Seconds from a cancel to the call's return to aim for. The context cuts its work to
            meet it and says in `latency_plan` what it expects and chose: on a CPU smaller ubatches, where
            looks at the token would lie too far apart; on other devices pieces of a ubatch's graph, with
            looks at the token between. None: no aim.
        embeddings: Compute embeddings. Every row is an output then.
        pooling: "none", "mean", "cls", "last" or "rank"; None for what the model says.
        kv_unified: One cache for all sequences, which may then share rows. False: n_ctx is divided among them. Without
            flash attention a sequence in whose numbers there is NaN spoils those that share its cache.
        flash_attn: True, False or "auto".
        type_k, type_v: Types of the cache: "f16", "q8_0", ...
        swa_full: Keep all positions in a sliding-window cache, so that any can be removed again.
        rope_scaling, rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast,
        yarn_beta_slow, yarn_orig_ctx, offload_kqv, op_offload, no_perf: As in llama.cpp.
        token: Cancels the making: the clearing of the memory and, on other devices than a CPU, the measuring for
            `cancel_latency`, which a model's first context waits for.

    Raises:
        DecodeCancelled: If `token` was cancelled.
        ContextError: If llama.cpp cannot make such a context.
        TypeError, ValueError: If an argument is none that it can be.
    """

    def __init__(self, Model model not None, *, n_ctx=None, n_batch=2048, n_ubatch=None, n_seq_max=1, n_threads=None,
                 n_threads_batch=None, cancel_latency=0.02, embeddings=False, pooling=None, kv_unified=True,
                 flash_attn="auto", type_k="f16", type_v="f16", swa_full=False, rope_scaling=None,
                 rope_freq_base=None, rope_freq_scale=None, yarn_ext_factor=None, yarn_attn_factor=None,
                 yarn_beta_fast=None, yarn_beta_slow=None, yarn_orig_ctx=None, offload_kqv=True, op_offload=True,
                 no_perf=False, token=None, _n_pieces=None):
        if self.pid != 0:
            raise TypeError("a Context is made once")
        self.pid = getpid()
        model._check_open()
        check_forked()
        cdef shared_ptr[ModelBox] model_box = model.box
        if not model_box.get().has_weights():
            raise ContextError("the model was loaded with vocab_only=True: it has no weights to compute with")
        cdef llama_context_params params = llama_context_default_params()
        if n_ctx is None:
            n_ctx = min(model.n_ctx_train, 4096)
        params.n_ctx = integer("n_ctx", n_ctx, 1, 2**31 - 1)
        params.n_seq_max = integer("n_seq_max", n_seq_max, 1, llama_max_parallel_sequences())
        params.n_batch = min(<uint32_t> integer("n_batch", n_batch, 1, 2**31 - 1), params.n_ctx)
        if params.n_batch < params.n_seq_max:
            raise ValueError(f"n_batch ({params.n_batch}) must be at least n_seq_max ({params.n_seq_max})")
        if embeddings and pooling != "none":
            # llama.cpp can pool only if n_ubatch is a multiple of the number of sequences.
            params.n_batch -= params.n_batch % params.n_seq_max
            if n_ubatch is not None and integer("n_ubatch", n_ubatch, 1, 2**31 - 1) % n_seq_max:
                raise ValueError(f"n_ubatch ({n_ubatch}) must be a multiple of n_seq_max ({n_seq_max}) for pooled "
                                 "embeddings")
        threads = default_threads() if n_threads is None else n_threads
        params.n_threads = integer("n_threads", threads, 1, 512)
        params.n_threads_batch = (params.n_threads if n_threads_batch is None
                                  else <int> integer("n_threads_batch", n_threads_batch, 1, 512))
        if model.has_encoder and model.has_decoder and n_seq_max > 1 and not kv_unified:
            raise ContextError("several sequences of a model with an encoder and a decoder need kv_unified=True")
        params.embeddings = embeddings
        if pooling is not None:
            params.pooling_type = <llama_pooling_type> <int> choice("pooling", pooling, POOLING)
        params.kv_unified = kv_unified
        params.flash_attn_type = <llama_flash_attn_type> <int> choice("flash_attn", flash_attn, FLASH_ATTENTION)
        params.type_k = <ggml_type> <int> choice("type_k", type_k, CACHE_TYPES)
        params.type_v = <ggml_type> <int> choice("type_v", type_v, CACHE_TYPES)
        params.swa_full = swa_full
        if rope_scaling is not None:
            scaling = choice("rope_scaling", rope_scaling, ROPE_SCALING)
            params.rope_scaling_type = <llama_rope_scaling_type> <int> scaling
        if rope_freq_base is not None:
            params.rope_freq_base = number("rope_freq_base", rope_freq_base, 0)
        if rope_freq_scale is not None:
            params.rope_freq_scale = number("rope_freq_scale", rope_freq_scale, 0)
        if yarn_ext_factor is not None:
            params.yarn_ext_factor = number("yarn_ext_factor", yarn_ext_factor)
        if yarn_attn_factor is not None:
            params.yarn_attn_factor = number("yarn_attn_factor", yarn_attn_factor)
        if yarn_beta_fast is not None:
            params.yarn_beta_fast = number("yarn_beta_fast", yarn_beta_fast)
        if yarn_beta_slow is not None:
            params.yarn_beta_slow = number("yarn_beta_slow", yarn_beta_slow)
        if yarn_orig_ctx is not None:
            params.yarn_orig_ctx = integer("yarn_orig_ctx", yarn_orig_ctx, 0, 2**31 - 1)
        params.offload_kqv = offload_kqv
        params.op_offload = op_offload
        params.no_perf = no_perf
        cdef double target = 0
        if cancel_latency is not None:
            target = number("cancel_latency", cancel_latency, 1e-4, 3600)

        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef string message
        cdef Status status
        cdef Cut cut
        cdef uint32_t limit = min(params.n_batch, <uint32_t> _LARGEST_UBATCH)
        cdef GapCost cost
        # A seam for tests: a CPU that stands in for a device, and is stopped between pieces of a graph only.
        cdef cbool as_device = _n_pieces is not None
        # Encoders and pooling read a sequence in one piece, whatever that takes.
        one_piece = (model.memory_kind == "none" or not model_box.get().causal() or model.has_encoder
                     or (embeddings and pooling != "none"))
        if n_ubatch is not None:
            limit = min(integer("n_ubatch", n_ubatch, 1, 2**31 - 1), params.n_batch)
        elif one_piece:
            limit = params.n_batch
        cut = Cut.exactly(limit)
        on_cpu = model_box.get().on_cpu()
        if cancel_latency is not None and not (on_cpu and (one_piece or n_ubatch is not None)):
            with nogil:
                status = model_box.get().gap_cost(params.n_threads_batch, as_device, call, cost)
            drain_log()
            check_status(status, "making a context", message, &call, interrupt)
            cut = Cut.choose(target, cost, limit) if on_cpu else Cut.for_device(target, cost, limit)
        if as_device:
            cut.n_pieces = integer("_n_pieces", _n_pieces, 1, 2**31 - 1)

        with nogil:
            status = ContextBox.make(model_box, params, cut, call, self.box, message)
        drain_log()
        check_status(status, "making a context", message, &call, interrupt, "cannot make a context: ", ContextError,
                     ContextError)
        self.model = model
        self._lora = ()

    def close(self):
        """Free the context. Idempotent.

        Raises:
            ContextBusyError: If a call is in flight in another thread: cancel its token first.
        """
        if not self.box or self.pid != getpid():
            return
        self._acquire(NULL, None, "close")
        cdef shared_ptr[ContextBox] box
        box.swap(self.box)
        box.get().release()
        with nogil:
            box.reset()
        drain_log()

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        if self.box and self.pid == getpid() and not sys.is_finalizing():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def __dealloc__(self):
        if self.box and self.pid != getpid():
            new shared_ptr[ContextBox](self.box)  # a forked child leaves the parent's context alone
        with nogil:
            self.box.reset()

    def __repr__(self):
        if not self.box:
            return "<Context closed>"
        if self.pid != getpid():
            return f"<Context of process {self.pid}>"
        return f"<Context n_ctx={self.n_ctx} n_seq_max={self.n_seq_max} of {self.model!r}>"

    def __reduce__(self):
        raise TypeError("a Context cannot be pickled: save the state of its sequences instead")

    cdef int _check_open(self) except -1:
        if not self.box:
            raise ClosedError("the context is closed")
        return check_process(self.pid, "the context")

    cdef int _acquire(self, Call * call, Interrupt interrupt, str what, batch=None, token=None) except -1:
        # `batch`, `token`: those of a decode, for what it leaves of its sequences if it is cancelled while it waits.
        self._check_open()
        cdef shared_ptr[ContextBox] box = self.box
        cdef Status status
        with nogil:
            status = box.get().acquire(call)
        if status == Status.Cancelled:
            raise_cancelled(f"{what}, waiting for the context,", call[0], interrupt, None,
                            None if batch is None else untouched(batch, token))
        if status != Status.Done:
            check_status(status, what, string(), NULL, interrupt)
        if self.box != box:
            box.get().release()
            raise ClosedError("the context was closed while the call waited for it")
        return 0

    # -- decode

    def decode(self, batch, token=None, *, on_cancel="rollback", when_shared="finish"):
        """Compute a batch; stop when `token` is cancelled.

        Args:
            batch: The rows. Positions of a sequence follow on what the context holds of it.
            token: A `CancelToken` for the whole call, or {seq_id: CancelToken} for a batch that several
                requests share. An already cancelled token starts no work.
            on_cancel: What a cancelled call leaves. "rollback": the context as before the call, to the bit.
                "keep": the rows that were completed; the call can be resumed with the rest.
            when_shared: With a token for each sequence, what happens once some of them are cancelled, but not all.
                "finish": the call goes on for those who stay, without the cancelled rows. "stop": it returns at the
                next place that costs those who stay nothing, and tells who they are. With "keep" that is the end of
                the ubatch that is being computed; after the last one the call is through. With "rollback", which
                leaves them nothing anyway, it is at once. A ubatch that nobody wants any more is stopped at once, also
                where a call that keeps goes on for the others.

        Returns:
            A `DecodeResult`; `logits()` and `embeddings()` give the outputs.

        Raises:
            DecodeCancelled: If the call was stopped. `DeadlineExceeded` if a deadline was the cause.
            KeyboardInterrupt: On Ctrl-C in the main thread; its `__cause__` is the `DecodeCancelled`.
            InvalidBatchError: If the batch cannot be computed in this context. Nothing was done.
            MemoryFullError: If there is no room for it. The context is as before.
            DirtySequenceError: If it names a sequence that could not be repaired.
            ContextBusyError: If another thread uses the context and there is no token to wait under.
            DecodeFailedError: If llama.cpp failed. The context is as before, but for one whose RPC server was lost: the
                text says so, and it can only be closed.
        """
        return self._run(batch, token, on_cancel, when_shared, False)

    def encode(self, batch, token=None):
        """Run the encoder of a model that has one; `decode` then attends to its output.

        Args, Returns and Raises as for `decode`. The batch is computed in one piece. What the decoder holds of its
        sequences belongs to the encoding before: remove it from the memory first.
        """
        return self._run(batch, token, _ROLLBACK, _FINISH, True)

    cdef object _run(self, batch, token, on_cancel, when_shared, bint encoding):
        cdef str what = "encode" if encoding else "decode"
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch, not {type(batch).__name__}")
        cdef OnCancel keep = OnCancel.Rollback
        cdef WhenShared when = WhenShared.Finish
        if on_cancel is not _ROLLBACK:
            keep = <OnCancel> <int> choice("on_cancel", on_cancel, _ON_CANCEL)
        if when_shared is not _FINISH:
            when = <WhenShared> <int> choice("when_shared", when_shared, _WHEN_SHARED)
        cdef _View view = _view_of(batch)
        cdef cppmap[llama_seq_id, shared_ptr[TokenCore]] tokens
        cdef string problem
        cdef Call call
        if isinstance(token, dict):
            for seq_id, each in token.items():
                if not isinstance(each, CancelToken):
                    raise TypeError(f"the token of sequence {seq_id} must be a CancelToken, not {type(each).__name__}")
                tokens[integer("a sequence id", seq_id, -2**31, 2**31 - 1)] = core_of(each)
            with nogil:
                problem = check_tokens(view.batch, tokens)
                call = shared_call(view.batch, tokens, when, keep)
            if not problem.empty():
                raise InvalidBatchError(text_of(problem))
        else:
            call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef shared_ptr[ContextBox] box = self.box
        cdef DecodeReport report
        cdef vector[llama_seq_id] dirty
        view.readers += 1
        try:
            self._acquire(&call, interrupt, what, batch, token)
            try:
                if call.should_stop():
                    raise_cancelled(what, call, interrupt, None, self._untouched(batch, token, keep))
                with nogil:
                    report.message = box.get().unusable()
                    if not report.message.empty():
                        report.status = Status.Failed
                    else:
                        report.message = box.get().check(view.batch, encoding)
                        if not report.message.empty():
                            report.status = Status.Invalid
                        else:
                            dirty = box.get().dirty_among(view.batch)
                            if dirty.empty():
                                report = (box.get().encode(view.batch, call) if encoding
                                          else box.get().decode(view.batch, call, tokens, keep))
                if not dirty.empty():
                    self._raise_dirty([seq for seq in dirty])
            finally:
                box.get().release()
        finally:
            view.readers -= 1
        drain_log()
        if report.status == Status.Done:
            return result_of(report)
        if report.status != Status.Cancelled:
            check_status(report.status, what, report.message, NULL, interrupt, "", InvalidBatchError)
        sequences = outcomes_of(report.sequences)
        error = cancelled_error(
            what, Cause.INTERRUPT if report.interrupted else cause_of(report.verdict),
            report.verdict.reason.decode("utf-8", "replace"), report.latency,
            sequences=sequences, survivors=survivors_of(sequences), rows_done=report.rows_done,
            repair_seconds=report.repair_seconds)
        if report.interrupted:
            raise interrupt.error from error
        raise error

    cdef dict _untouched(self, batch, token, OnCancel keep):
        """What a call that was cancelled before it began leaves of its batch's sequences."""
        outcomes = untouched(batch, token)
        cdef llama_seq_id n_seq_max = llama_n_seq_max(self.box.get().get())
        for seq, outcome in outcomes.items():
            held = self.box.get().memory().pos_max(seq) + 1 if 0 <= seq < n_seq_max else 0
            outcomes[seq] = SequenceOutcome("kept" if keep == OnCancel.Keep else outcome.state, outcome.start,
                                            min(outcome.start, held), outcome.cancelled)
        return outcomes

    def _decode_bare(self, batch):
        """llama_decode() itself: no token, no guard, no checks. For the benchmark."""
        cdef _View view = _view_of(batch)
        cdef int32_t code
        self._acquire(NULL, None, "decode")
        try:
            with nogil:
                code = self.box.get().decode_bare(view.batch)
        finally:
            self.box.get().release()
        return code

    # -- outputs

    def logits(self, i=-1):
        """The logits of an output row, float32 of shape (n_vocab,).

        Args:
            i: The row of the last batch, or negative from the last output. Rows that were cancelled, in a batch
                that others shared, do not count.

        Raises:
            IndexError: If the row has no logits.
        """
        cdef int32_t row = integer("i", i, -2**31, 2**31 - 1)
        self._acquire(NULL, None, "logits")
        try:
            data = self._logits_of(row)
            return _copy_of(data, self.box.get().outputs().n_vocab)
        finally:
            self.box.get().release()

    cdef const float * _logits_of(self, int32_t i) except NULL:
        cdef const Outputs * outputs = &self.box.get().outputs()
        cdef int32_t slot = outputs.slot(i)
        cdef const float * data = NULL
        if slot >= 0:
            data = outputs.logits(slot)
        if data == NULL:
            raise IndexError(f"row {i} of the last batch has no logits: "
                             + ("it was cancelled" if slot == CANCELLED else "ask for them when the row is added"))
        return data

    def embeddings(self, i=-1):
        """The embedding of an output row, float32 of shape (n_embd,). The context has `embeddings=True`, no pooling.

        Args:
            i: The row of the last batch, or negative from the last output. Rows that were cancelled, in a batch
                that others shared, do not count.

        Raises:
            IndexError: If the row has no embedding.
        """
        cdef int32_t row = integer("i", i, -2**31, 2**31 - 1)
        cdef const float * data = NULL
        self._acquire(NULL, None, "embeddings")
        try:
            slot = self.box.get().outputs().slot(row)
            if slot >= 0:
                data = self.box.get().outputs().embeddings(slot)
            if data == NULL:
                raise IndexError(f"row {i} of the last batch has no embedding"
                                 + (": it was cancelled" if slot == CANCELLED else
                                    ": they were pooled, see pooled_embeddings()" if self.box.get().pooled() else ""))
            return _copy_of(data, self.box.get().outputs().n_embd)
        finally:
            self.box.get().release()

    def pooled_embeddings(self, seq_id=0):
        """The pooled embedding of a sequence of the last batch, float32 of shape (n_embd,).

        With `pooling="rank"` the scores of the sequence instead.

        Raises:
            IndexError: If there is none.
        """
        cdef int32_t seq = integer("seq_id", seq_id, 0, 2**31 - 1)
        self._acquire(NULL, None, "pooled_embeddings")
        try:
            if self.box.get().outputs().pooled.count(seq) == 0:
                raise IndexError(f"sequence {seq} has no pooled embedding")
            data = self.box.get().outputs().pooled.at(seq).data()
            return _copy_of(data, self.box.get().outputs().pooled.at(seq).size())
        finally:
            self.box.get().release()

    # -- the rest

    @property
    def memory(self):
        """What the context holds of its sequences, as a `Memory`."""
        from .memory import Memory
        return Memory(self)

    @property
    def state(self):
        """Saving and loading the state of sequences, as a `State`."""
        from .state import State
        return State(self)

    @property
    def dirty_sequences(self):
        """Ids of sequences that could not be repaired and have not been cleared since."""
        self._acquire(NULL, None, "dirty_sequences")
        try:
            return [seq for seq in self.box.get().dirty()]
        finally:
            self.box.get().release()

    cdef object _raise_dirty(self, seq_ids):
        names = ", ".join(map(str, seq_ids))
        raise DirtySequenceError(
            f"sequence {names} could not be repaired after a cancel; memory.remove() it before its next use", seq_ids)

    cdef int _check_seq(self, seq_id) except -1:
        self._check_open()
        return integer("a sequence id", seq_id, 0, llama_n_seq_max(self.box.get().get()) - 1)

    @property
    def latency_plan(self):
        """How the context cuts its work, as a `LatencyPlan`."""
        self._check_open()
        cdef Cut cut = self.box.get().cut()
        n_pieces, of_one = cut.pieces_at(cut.n_ubatch, cut.n_ubatch), cut.pieces_at(1, cut.n_ubatch)
        if cut.target == 0:
            return LatencyPlan(None, cut.n_ubatch, cut.max_outputs, n_pieces, of_one, None, None)
        gap = cut.cost.seconds + cut.cost.seconds_per_row * cut.n_ubatch
        return LatencyPlan(cut.target, cut.n_ubatch, cut.max_outputs, n_pieces, of_one, gap,
                           cut.cost.seconds_per_row_kv * 1000)

    def set_lora(self, adapters=()):
        """Use these LoRA adapters from the next call on: pairs of `LoraAdapter` and scale. None: no adapter."""
        cdef vector[llama_adapter_lora *] native
        cdef vector[float] scales
        pairs = tuple(adapters)
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], LoraAdapter)):
                raise TypeError(f"adapters are pairs of LoraAdapter and scale, not {pair!r}")
            if (<LoraAdapter> pair[0]).box != self.model.box:
                raise ValueError(f"{pair[0]!r} belongs to another model")
            native.push_back((<LoraAdapter> pair[0]).native)
            scales.push_back(number("scale", pair[1]))
        cdef int32_t code
        self._acquire(NULL, None, "set_lora")
        try:
            with nogil:
                code = llama_set_adapters_lora(self.box.get().get(), native.data(), native.size(), scales.data())
            if code != 0:
                raise ContextError("the adapters cannot be applied")
            self._lora = pairs
        finally:
            self.box.get().release()

    def set_threads(self, n_threads, n_threads_batch=None):
        """Use so many threads for single rows, and for more (None: the same)."""
        batch = n_threads if n_threads_batch is None else n_threads_batch
        cdef int32_t single = integer("n_threads", n_threads, 1, 512)
        cdef int32_t many = integer("n_threads_batch", batch, 1, 512)
        self._acquire(NULL, None, "set_threads")
        llama_set_n_threads(self.box.get().get(), single, many)
        self.box.get().release()

    def perf(self, reset=False):
        """llama.cpp's performance counters since the context was made or they were reset.

        Returns:
            A dict: prompt_seconds, prompt_tokens (rows in batches of several), eval_seconds, eval_tokens
            (single rows), graphs_reused.
        """
        self._acquire(NULL, None, "perf")
        cdef llama_perf_context_data data = llama_perf_context(self.box.get().get())
        if reset:
            llama_perf_context_reset(self.box.get().get())
        self.box.get().release()
        return {
            "prompt_seconds": data.t_p_eval_ms * 1e-3,
            "prompt_tokens": data.n_p_eval,
            "eval_seconds": data.t_eval_ms * 1e-3,
            "eval_tokens": data.n_eval,
            "graphs_reused": data.n_reused,
        }

    @property
    def closed(self):
        return not self.box

    @property
    def n_ctx(self):
        """Cells of memory, in tokens."""
        self._check_open()
        return llama_n_ctx(self.box.get().get())

    @property
    def n_ctx_seq(self):
        """Cells that one sequence may use."""
        self._check_open()
        return llama_n_ctx_seq(self.box.get().get())

    @property
    def n_batch(self):
        """Most rows in one batch."""
        self._check_open()
        return llama_n_batch(self.box.get().get())

    @property
    def n_ubatch(self):
        """Most rows computed at a time."""
        self._check_open()
        return llama_n_ubatch(self.box.get().get())

    @property
    def n_seq_max(self):
        """Most sequences."""
        self._check_open()
        return llama_n_seq_max(self.box.get().get())

    @property
    def n_threads(self):
        self._check_open()
        return llama_n_threads(self.box.get().get())

    @property
    def n_threads_batch(self):
        self._check_open()
        return llama_n_threads_batch(self.box.get().get())


cdef _copy_of(const float * data, size_t n):
    result = np.empty(n, np.float32)
    cdef float[::1] view = result
    if n:
        memcpy(&view[0], data, n * sizeof(float))
    return result


@cython.final
cdef class _View:
    """A Batch's arrays as the native core reads them."""
    cdef BatchView batch
    cdef readonly int readers  # calls that are reading them, without the GIL
    cdef const int32_t[::1] token, pos, seq_offset, seq_id
    cdef const float[:, ::1] embd
    cdef const int8_t[::1] output

    def __cinit__(self, batch):
        self.pos = batch._pos
        self.seq_offset = batch._seq_offset
        self.seq_id = batch._seq_id
        self.output = batch._output
        self.batch.pos = &self.pos[0]
        self.batch.seq_offset = &self.seq_offset[0]
        self.batch.seq_id = &self.seq_id[0]
        self.batch.output = &self.output[0]
        if batch._token is not None:
            self.token = batch._token
            self.batch.token = &self.token[0]
        else:
            self.embd = batch._embd
            self.batch.embd = &self.embd[0, 0]
            self.batch.n_embd = self.embd.shape[1]


cdef _View _view_of(batch):
    """The batch's view, made once: its arrays stay where they are."""
    if batch._view is None:
        batch._view = _View(batch)
    cdef _View view = batch._view
    if not view.readers:
        view.batch.n_rows = batch._n
    return view

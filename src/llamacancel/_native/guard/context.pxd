# Declarations of context.hpp.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t
from libcpp cimport bool
from libcpp.map cimport map as cppmap
from libcpp.memory cimport shared_ptr
from libcpp.set cimport set as cppset
from libcpp.string cimport string
from libcpp.vector cimport vector

from ..cancel.call cimport Call, WhenShared
from ..cancel.token cimport TokenCore, Verdict
from ..llama cimport llama_context, llama_context_params, llama_pos, llama_seq_id
from ..memory.memory cimport MemoryParts
from ..model.model cimport ModelBox
from ..process.status cimport Status
from .cut cimport BatchView, Cut
from .outputs cimport Outputs


cdef extern from "guard/context.hpp" namespace "llamacancel" nogil:
    enum class OnCancel (uint8_t):
        Rollback
        Keep

    enum class Fate (uint8_t):
        Completed
        RolledBack
        Kept
        Dirty

    struct SequenceResult:
        llama_seq_id seq
        Fate fate
        llama_pos start
        llama_pos end
        bool cancelled

    struct DecodeReport:
        Status status
        string message
        vector[SequenceResult] sequences
        int32_t rows_done
        int32_t n_ubatches
        size_t snapshot_bytes
        double repair_seconds
        double seconds
        Verdict verdict
        double latency
        bool interrupted

    Call shared_call(const BatchView & batch, const cppmap[llama_seq_id, shared_ptr[TokenCore]] & tokens,
                     WhenShared when, OnCancel on_cancel) except +

    string check_tokens(const BatchView & batch, const cppmap[llama_seq_id, shared_ptr[TokenCore]] & tokens) except +

    cppclass ContextBox:
        @staticmethod
        Status make(shared_ptr[ModelBox] model, llama_context_params params, const Cut & cut, Call & call,
                    shared_ptr[ContextBox] & box, string & message) except +
        Status acquire(Call * call) except +
        void release() noexcept
        string unusable() except +
        string check(const BatchView & batch, bool encoding) except +
        vector[llama_seq_id] dirty_among(const BatchView & batch) except +
        DecodeReport decode(const BatchView & batch, Call & call,
                            const cppmap[llama_seq_id, shared_ptr[TokenCore]] & tokens, OnCancel on_cancel) except +
        DecodeReport encode(const BatchView & batch, Call & call) except +
        int32_t decode_bare(const BatchView & batch) except +
        Status remove(llama_seq_id seq, llama_pos p0, llama_pos p1, string & message) except +
        Status copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1, Call & call,
                    string & message) except +
        void keep(llama_seq_id seq) except +
        Status clear(Call & call, string & message) except +
        void wrote_everywhere() noexcept
        string description() except +
        Status save_state(llama_seq_id seq, Call & call, vector[uint8_t] & bytes, string & message) except +
        Status load_state(llama_seq_id seq, const uint8_t * bytes, size_t size, Call & call, string & message) except +
        llama_context * get() noexcept
        const MemoryParts & memory() noexcept
        const Cut & cut() noexcept
        const Outputs & outputs() noexcept
        const shared_ptr[ModelBox] & model() noexcept
        const cppset[llama_seq_id] & dirty() noexcept
        bool pooled() noexcept
        const shared_ptr[ModelBox] & model() noexcept

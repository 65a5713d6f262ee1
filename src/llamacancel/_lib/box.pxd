# The native core as Cython sees it: declarations of _native/{call,cut,memory,outputs,box,guard,rpc,sampler}.hpp.

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.map cimport map as cppmap
from libcpp.memory cimport shared_ptr
from libcpp.set cimport set as cppset
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from .llama cimport (
    llama_adapter_lora, llama_context, llama_context_params, llama_logit_bias, llama_model, llama_model_params, llama_pos, llama_sampler, llama_seq_id,
    llama_token, llama_vocab,
)
from .token cimport TokenState, Verdict


cdef extern from "call.hpp" namespace "llamacancel" nogil:
    enum class WhenShared (uint8_t):
        Finish
        Stop

    cppclass Call:
        Call() noexcept
        Call(shared_ptr[TokenState] token) except +
        void set_interrupt(bool (*hook)(void *) noexcept, void * arg) noexcept
        bool should_stop() noexcept
        bool stopped_by_interrupt() noexcept
        const Verdict * verdict() noexcept


cdef extern from "cut.hpp" namespace "llamacancel" nogil:
    struct BatchView:
        int32_t n_rows
        const int32_t * token
        const float * embd
        int32_t n_embd
        const int32_t * pos
        const int32_t * seq_offset
        const int32_t * seq_id
        const int8_t * output

    struct GapCost:
        double seconds
        double seconds_per_row
        double seconds_per_row_kv
        double seconds_per_output

    cppclass Cut:
        Cut() noexcept
        double target
        uint32_t n_ubatch
        uint32_t max_outputs
        bool fixed
        bool on_device
        uint32_t n_pieces
        GapCost cost
        @staticmethod
        Cut choose(double target, const GapCost & cost, uint32_t limit) noexcept
        @staticmethod
        Cut exactly(uint32_t n_ubatch) noexcept
        @staticmethod
        Cut for_device(double target, const GapCost & cost, uint32_t n_ubatch) noexcept
        uint32_t pieces_at(uint32_t n_rows, uint32_t n_kv) noexcept


cdef extern from "memory.hpp" namespace "llamacancel" nogil:
    enum class MemoryKind (uint8_t):
        pass

    cppclass NativeMemory "llamacancel::Memory":
        void * memory
        MemoryKind kind
        llama_pos pos_min(llama_seq_id seq) except +
        llama_pos pos_max(llama_seq_id seq) except +

    const char * name_of(MemoryKind kind)


cdef extern from "outputs.hpp" namespace "llamacancel" nogil:
    cppclass Outputs:
        int32_t slot(int32_t i) noexcept
        const float * logits(int32_t slot) noexcept
        const float * embeddings(int32_t slot) noexcept
        int32_t n_vocab
        int32_t n_embd
        cppmap[int32_t, vector[float]] pooled

    const int32_t CANCELLED "llamacancel::Outputs::kCancelled"


ctypedef bool (*ProgressCallback)(float, void *) noexcept nogil


cdef extern from "box.hpp" namespace "llamacancel" nogil:
    enum class Status (uint8_t):
        Done
        Cancelled
        Invalid
        Full
        Failed
        Busy
        NoMemory

    enum class OnCancel (uint8_t):
        Rollback
        Keep

    enum class SequenceState (uint8_t):
        Completed
        RolledBack
        Kept
        Dirty

    struct SequenceResult:
        llama_seq_id seq
        SequenceState state
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

    Call shared_call(const BatchView & batch, const cppmap[llama_seq_id, shared_ptr[TokenState]] & tokens,
                     WhenShared when, OnCancel on_cancel) except +

    string check_tokens(const BatchView & batch, const cppmap[llama_seq_id, shared_ptr[TokenState]] & tokens) except +

    cppclass ModelBox:
        @staticmethod
        Status load(const string & path, llama_model_params params, const vector[string] & rpc_servers, Call & call,
                    ProgressCallback progress, void * arg, shared_ptr[ModelBox] & box, string & message) except +
        llama_model * get() noexcept
        const llama_vocab * vocab() noexcept
        bool on_cpu() noexcept
        string lost_server() except +
        bool has_weights() noexcept
        int32_t max_positions() noexcept
        bool causal() noexcept
        MemoryKind memory_kind() noexcept
        Status gap_cost(int32_t n_threads, Call & call, GapCost & cost) except +
        Status tokenize(const string & text, bool add_special, bool parse_special, Call & call,
                        vector[llama_token] & tokens, string & message) except +
        Status detokenize(const llama_token * tokens, int32_t n, bool remove_special, bool unparse_special,
                          Call & call, string & text, string & message) except +
        string piece(llama_token token, bool special) except +
        Status load_adapter(const string & path, Call & call, llama_adapter_lora * & adapter, string & identity,
                            string & message) except +
        void free_adapter(llama_adapter_lora * adapter) except +

    cppclass ContextBox:
        @staticmethod
        Status make(shared_ptr[ModelBox] model, llama_context_params params, const Cut & cut, Call & call,
                    shared_ptr[ContextBox] & box, string & message) except +
        Status acquire(Call * call) except +
        void release() noexcept
        string unusable() except +
        string check(const BatchView & batch, bool encoding) except +
        vector[llama_seq_id] dirty_among(const BatchView & batch) except +
        DecodeReport decode(const BatchView & batch, Call & call, const cppmap[llama_seq_id, shared_ptr[TokenState]] & tokens,
                            OnCancel on_cancel) except +
        DecodeReport encode(const BatchView & batch, Call & call) except +
        int32_t decode_bare(const BatchView & batch) except +
        bool remove(llama_seq_id seq, llama_pos p0, llama_pos p1) except +
        Status copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1, Call & call, string & message) except +
        void keep(llama_seq_id seq) except +
        Status clear(Call & call, string & message) except +
        void wrote_everywhere() noexcept
        string description() except +
        Status save_state(llama_seq_id seq, Call & call, vector[uint8_t] & bytes, string & message) except +
        Status load_state(llama_seq_id seq, const uint8_t * bytes, size_t size, Call & call, string & message) except +
        llama_context * get() noexcept
        const NativeMemory & memory() noexcept
        const Cut & cut() noexcept
        const Outputs & outputs() noexcept
        const shared_ptr[ModelBox] & model() noexcept
        const cppset[llama_seq_id] & dirty() noexcept
        bool pooled() noexcept
        const shared_ptr[ModelBox] & model() noexcept


cdef extern from "guard.hpp" namespace "llamacancel" nogil:
    void initialize() except +
    void begin_exit(double most_seconds) noexcept
    bool parked(unsigned long thread) noexcept
    void after_fork_in_child() except +
    struct LogLine:
        int level
        string text
    bool next_log_line(LogLine & line) except +


cdef extern from "rpc.hpp" namespace "llamacancel" nogil:
    string serve_rpc(const string & endpoint, size_t n_threads) except +


cdef extern from "sampler.hpp" namespace "llamacancel" nogil:
    struct Draw:
        llama_sampler * chain
        const float * logits
        const uint32_t * mask
        Call call
        Status status
        llama_token token
        string message
        uint64_t steps
        const vector[llama_logit_bias] * biases
        int32_t n_top
        double logprob
        vector[pair[llama_token, double]] top
    void sample(Draw & draw, int32_t n_vocab) except +
    void sample_rows "llamacancel::sample" (vector[Draw] & draws, int32_t n_vocab, int n_threads) except +
    Status accept(llama_sampler * chain, llama_token token, string & message, uint64_t & steps) except +
    void reset(llama_sampler * chain) except +
    Status make_grammar(const llama_vocab * vocab, const string & text, const string & root, Call & call,
                        llama_sampler *& made, string & message, uint64_t & steps) except +

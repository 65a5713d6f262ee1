# Declarations of model.hpp.

from libc.stdint cimport int32_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from ..cancel.call cimport Call
from ..llama cimport llama_adapter_lora, llama_model, llama_model_params, llama_vocab
from ..memory.memory cimport MemoryKind
from ..process.status cimport Status
from .gap cimport GapCost


ctypedef bool (*ProgressCallback)(float, void *) noexcept nogil


cdef extern from "model/model.hpp" namespace "llamacancel" nogil:
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
        Status gap_cost(int32_t n_threads, bool device, Call & call, GapCost & cost) except +
        Status load_adapter(const string & path, Call & call, llama_adapter_lora * & adapter, string & identity,
                            string & message) except +
        void free_adapter(llama_adapter_lora * adapter) except +

cimport cython
from libcpp.memory cimport shared_ptr

from .._native.llama cimport llama_adapter_lora, llama_model, llama_token, llama_vocab
from .._native.model.model cimport ModelBox


@cython.final
cdef class Model:
    cdef object __weakref__
    cdef shared_ptr[ModelBox] box  # shared with contexts and adapters; null once closed
    cdef int pid                   # the process that loaded it
    cdef object _path
    cdef object _metadata
    cdef public object _chat_template  # read on first use: see `chat`
    cdef public object _control_texts  # as well
    cdef object _vocabulary        # for constraints: made on first use, kept as long as the model; see `_sampler`

    cdef int _check_open(self) except -1
    cdef const llama_vocab * _vocab(self) except NULL
    cdef llama_model * _native(self) except NULL
    cdef int _check_tokens(self, values) except -1
    cdef llama_token _check_token(self, token) except -1


@cython.final
cdef class LoraAdapter:
    cdef shared_ptr[ModelBox] box     # the model, which outlives the adapter
    cdef int pid                      # the process that loaded it
    cdef bytes identity               # tells it from other adapters, by what it does
    cdef llama_adapter_lora * native  # freed with this object, which the contexts that use it hold
    cdef object _path

# Declarations of memory.hpp.

from libc.stdint cimport uint8_t

from ..llama cimport llama_pos, llama_seq_id


cdef extern from "memory/memory.hpp" namespace "llamacancel" nogil:
    enum class MemoryKind (uint8_t):
        pass

    cppclass MemoryParts:
        void * memory
        MemoryKind kind
        llama_pos pos_min(llama_seq_id seq) except +
        llama_pos pos_max(llama_seq_id seq) except +

    const char * name_of(MemoryKind kind)

# Declarations of outputs.hpp.

from libc.stdint cimport int32_t
from libcpp.map cimport map as cppmap
from libcpp.vector cimport vector


cdef extern from "guard/outputs.hpp" namespace "llamacancel" nogil:
    cppclass Outputs:
        int32_t slot(int32_t i) noexcept
        const float * logits(int32_t slot) noexcept
        const float * embeddings(int32_t slot) noexcept
        int32_t n_vocab
        int32_t n_embd
        cppmap[int32_t, vector[float]] pooled

    const int32_t CANCELLED "llamacancel::Outputs::kCancelled"

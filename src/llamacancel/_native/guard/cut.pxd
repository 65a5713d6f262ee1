# Declarations of cut.hpp.

from libc.stdint cimport int8_t, int32_t, uint32_t
from libcpp cimport bool

from ..model.gap cimport GapCost


cdef extern from "guard/cut.hpp" namespace "llamacancel" nogil:
    struct BatchView:
        int32_t n_rows
        const int32_t * token
        const float * embd
        int32_t n_embd
        const int32_t * pos
        const int32_t * seq_offset
        const int32_t * seq_id
        const int8_t * output

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

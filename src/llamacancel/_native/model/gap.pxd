# Declarations of gap.hpp.


cdef extern from "model/gap.hpp" namespace "llamacancel" nogil:
    struct GapCost:
        double seconds
        double seconds_per_row
        double seconds_per_row_kv
        double seconds_per_output

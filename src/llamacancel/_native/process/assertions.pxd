# Declarations of assertions.hpp.


cdef extern from "process/assertions.hpp" namespace "llamacancel" nogil:
    void catch_assertions() except +

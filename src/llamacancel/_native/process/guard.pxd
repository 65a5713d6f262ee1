# Declarations of guard.hpp.

from libcpp cimport bool
from libcpp.string cimport string


cdef extern from "process/guard.hpp" namespace "llamacancel" nogil:
    void initialize() except +
    void begin_exit(double most_seconds) noexcept
    bool parked(unsigned long thread) noexcept
    void after_fork_in_child() except +
    struct LogLine:
        int level
        string text
    bool next_log_line(LogLine & line) except +

# Declarations of log.hpp.

from libcpp cimport bool
from libcpp.string cimport string


cdef extern from "process/log.hpp" namespace "llamacancel" nogil:
    struct LogLine:
        int level
        string text
    bool next_log_line(LogLine & line) except +
    void collect_log() except +
    void forget_log_after_fork() except +

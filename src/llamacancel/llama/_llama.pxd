from libcpp.string cimport string

cdef int drain_log() except -1
cdef int check_forked() except -1
cdef void entered_process() noexcept
cdef int check_process(int pid, str what) except -1
cdef str text_of(const string & message)

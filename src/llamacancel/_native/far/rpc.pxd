# Declarations of rpc.hpp.

from libc.stddef cimport size_t
from libcpp.string cimport string


cdef extern from "far/rpc.hpp" namespace "llamacancel" nogil:
    string serve_rpc(const string & endpoint, size_t n_threads) except +
    void forget_servers_after_fork "llamacancel::RpcServer::after_fork_in_child"() except +

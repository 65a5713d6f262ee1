# Declarations of vocabulary.hpp.

from libc.stdint cimport int32_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.vector cimport vector

from ..cancel.call cimport Call
from ..llama cimport llama_token, llama_vocab
from ..process.status cimport Status


cdef extern from "words/vocabulary.hpp" namespace "llamacancel" nogil:
    Status tokenize(const llama_vocab * vocab, const string & text, bool add_special, bool parse_special, Call & call,
                    vector[llama_token] & tokens, string & message) except +
    Status detokenize(const llama_vocab * vocab, const llama_token * tokens, int32_t n, bool remove_special,
                      bool unparse_special, Call & call, string & text, string & message) except +
    string piece_of(const llama_vocab * vocab, llama_token token, bool special) except +

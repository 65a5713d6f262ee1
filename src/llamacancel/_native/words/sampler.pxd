# Declarations of sampler.hpp.

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from ..cancel.call cimport Call
from ..llama cimport llama_logit_bias, llama_sampler, llama_token, llama_vocab
from ..process.status cimport Status


cdef extern from "words/sampler.hpp" namespace "llamacancel" nogil:
    struct Draw:
        llama_sampler * chain
        const float * logits
        const uint32_t * mask
        Call call
        Status status
        llama_token token
        string message
        uint64_t steps
        const vector[llama_logit_bias] * biases
        int32_t n_top
        double logprob
        vector[pair[llama_token, double]] top
    void sample(Draw & draw, int32_t n_vocab) except +
    void sample_rows "llamacancel::sample" (vector[Draw] & draws, int32_t n_vocab, int n_threads) except +
    Status accept(llama_sampler * chain, llama_token token, string & message, uint64_t & steps) except +
    void reset(llama_sampler * chain) except +
    Status force(llama_sampler * chain, llama_token token, string & message) except +
    Status make_grammar(const llama_vocab * vocab, const string & text, const string & root, Call & call,
                        llama_sampler *& made, string & message, uint64_t & steps) except +

// Sampling from an output row, and the checks of what a sampler is made from.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cancel/call.hpp"
#include "llama.h"
#include "process/status.hpp"

namespace llamacancel {

// The sampling of a row: its chain, its logits, the tokens that a constraint allows and its call, and what came of it.
struct Draw {
    llama_sampler * chain = nullptr;
    const float * logits = nullptr;
    const uint32_t * mask = nullptr;  // a bit for each token of the vocabulary; null: all are allowed
    Call call;
    Status status = Status::Done;
    llama_token token = -1;
    std::string message;
    const std::vector<llama_logit_bias> * biases = nullptr;  // added before anything else
    uint64_t steps = 0;  // that the grammar took, for the choice and for telling it of the token
    int32_t n_top = -1;  // how many of the likeliest tokens to tell; negative: no probabilities
    double logprob = 0;  // natural logarithm of the probability of `token`, before the chain changed anything
    std::vector<std::pair<llama_token, double>> top;  // the likeliest tokens first, the lower id of two that are equal
};

// Applies the chain to the row's logits, those of the tokens alone that the mask allows, draws a token and tells the
// chain of it. Status::Invalid with a message where the logits are no numbers, where no token is left to draw, where
// the grammar is too ambiguous, or where an assertion of llama.cpp fails. Status::Cancelled leaves the chain as it was.
void sample(Draw & draw, int32_t n_vocab);

// The same for several rows with as many chains, shared among `n_threads` threads.
void sample(std::vector<Draw> & draws, int32_t n_vocab, int n_threads);

// `steps` grows by those that it takes.
Status accept(llama_sampler * chain, llama_token token, std::string & message, uint64_t & steps);
void reset(llama_sampler * chain);

// Has the chain choose and remember the only token that there is: whatever its logit, so that none has to be computed.
// Random numbers and penalties go on as if it had been drawn.
Status force(llama_sampler * chain, llama_token token, std::string & message);

// Makes a GBNF grammar's sampler, which is the caller's. Status::Invalid with a message for a bad grammar,
// Status::Cancelled once the call is to stop.
Status make_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root, Call & call,
                    llama_sampler *& made, std::string & message, uint64_t & steps);

}  // namespace llamacancel

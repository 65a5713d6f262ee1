// Sampling from an output row, and the checks of what a sampler is made from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "box.hpp"

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
};

// Applies the chain to the row's logits, those of the tokens alone that the mask allows, draws a token and tells the chain of it. Status::Invalid with a message where
// the logits are no numbers, where no token is left to draw, where the grammar is too ambiguous, or where an assertion
// of llama.cpp fails. Status::Cancelled leaves the chain as it was.
void sample(Draw & draw, int32_t n_vocab);

// The same for several rows with as many chains, shared among `n_threads` threads.
void sample(std::vector<Draw> & draws, int32_t n_vocab, int n_threads);

Status accept(llama_sampler * chain, llama_token token, std::string & message);
void reset(llama_sampler * chain);

// A GBNF grammar's sampler; null with a message for a bad grammar.
llama_sampler * make_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root,
                             std::string & message);

}  // namespace llamacancel

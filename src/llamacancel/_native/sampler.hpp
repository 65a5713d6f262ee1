// Sampling from an output row, and the checks of what a sampler is made from.
#pragma once

#include <string>

#include "box.hpp"

namespace llamacancel {

// Applies the chain to a row of logits, draws a token and tells the chain of it. Throws std::runtime_error
// where no token is left to draw, or where an assertion of llama.cpp fails.
llama_token sample(llama_sampler * chain, const float * logits, int32_t n_vocab);
void accept(llama_sampler * chain, llama_token token);

// A GBNF grammar's sampler. Throws std::invalid_argument with llama.cpp's own words for a bad grammar.
llama_sampler * grammar(const llama_vocab * vocab, const std::string & text, const std::string & root);

}  // namespace llamacancel

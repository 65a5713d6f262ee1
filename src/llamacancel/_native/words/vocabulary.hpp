// A vocabulary: tokens of texts, and texts of tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cancel/call.hpp"
#include "llama.h"
#include "process/status.hpp"

namespace llamacancel {

// Tokens of `text`, or the text of tokens; Status::Failed with a message where the vocabulary cannot.
Status tokenize(const llama_vocab * vocab, const std::string & text, bool add_special, bool parse_special, Call & call,
                std::vector<llama_token> & tokens, std::string & message);
Status detokenize(const llama_vocab * vocab, const llama_token * tokens, int32_t n, bool remove_special,
                  bool unparse_special, Call & call, std::string & text, std::string & message);
std::string piece_of(const llama_vocab * vocab, llama_token token, bool special);

// Says what of a vocabulary llama.cpp would not survive, or "": its RWKV tokenizer never ends at a byte that begins a
// token and is none itself. Throws Stopped once `call` is to stop.
std::string check_vocabulary(const llama_vocab * vocab, Call & call);

}  // namespace llamacancel

#include "words/vocabulary.hpp"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>

#include "llama-vocab.h"
#include "process/steps.hpp"

namespace llamacancel {

Status tokenize(const llama_vocab * vocab, const std::string & text, bool add_special, bool parse_special, Call & call,
                std::vector<llama_token> & tokens, std::string & message) {
    try {
        const CountedSteps counted(call);
        tokens.resize(text.size() + 2);
        int32_t n =
            llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), add_special, parse_special);
        if (n < 0) {
            tokens.resize(-n);
            n = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), add_special,
                               parse_special);
        }
        tokens.resize(std::max(n, 0));
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const StackTooSmall &) {
        message = "a run of characters that the vocabulary's pattern takes as one is too long for this thread's stack";
        return Status::Invalid;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
}

Status detokenize(const llama_vocab * vocab, const llama_token * tokens, int32_t n, bool remove_special,
                  bool unparse_special, Call & call, std::string & text, std::string & message) {
    try {
        CountedSteps counted(call);
        if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
            return Status::Done;
        }
        size_t most = 0;
        for (int32_t i = 0; i < n; ++i) {
            if (i % 1024 == 0) {
                counted.add(1024 / 16);
            }
            most += vocab->token_to_piece(tokens[i]).size();
        }
        if (most > INT32_MAX) {
            throw std::runtime_error("it would be longer than 2^31 bytes");
        }
        text.resize(most + 1);
        const int32_t size =
            llama_detokenize(vocab, tokens, n, text.data(), text.size(), remove_special, unparse_special);
        if (size < 0) {
            throw std::runtime_error("it is longer than its pieces are");
        }
        text.resize(size);
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
}

std::string piece_of(const llama_vocab * vocab, llama_token token, bool special) {
    std::string text(64, '\0');
    int32_t size = llama_token_to_piece(vocab, token, text.data(), text.size(), 0, special);
    if (size < 0) {
        text.resize(-size);
        size = llama_token_to_piece(vocab, token, text.data(), text.size(), 0, special);
    }
    text.resize(std::max(size, 0));
    return text;
}

std::string check_vocabulary(const llama_vocab * vocab, Call & call) {
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_RWKV) {
        return "";
    }
    bool begins[256] = {}, alone[256] = {};
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        const std::string piece = piece_of(vocab, token, true);
        if (token % 1024 == 0 && call.should_stop()) {
            throw Stopped{};
        }
        if (!piece.empty()) {
            const uint8_t first = piece[0];
            begins[first] = true;
            alone[first] = alone[first] || piece.size() == 1;
        }
    }
    for (int byte = 0; byte < 256; ++byte) {
        if (begins[byte] && !alone[byte]) {
            return "the RWKV vocabulary has no token for the single byte " + std::to_string(byte);
        }
    }
    return "";
}

}  // namespace llamacancel

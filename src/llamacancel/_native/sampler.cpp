#include "sampler.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "llama-grammar.h"

namespace llamacancel {

namespace {

// What llama.cpp's parser never ends on ({m,n} with n < m counts down from 2^64), recurses too deep for, or
// takes for no grammar at all. Texts, classes and comments are passed over.
void check_text(const std::string & text) {
    constexpr int kDeepest = 500;
    if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
        throw std::runtime_error("it is empty");
    }
    int depth = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"' || c == '[') {
            const char end = c == '"' ? '"' : ']';
            for (++i; i < text.size() && text[i] != end; ++i) {
                i += text[i] == '\\';
            }
        } else if (c == '#') {
            i = std::min(text.find('\n', i), text.size());
        } else if (c == '(' && ++depth > kDeepest) {
            throw std::runtime_error("it is nested deeper than " + std::to_string(kDeepest));
        } else if (c == ')') {
            --depth;
        } else if (c == '{') {
            unsigned long long least = 0, most = 0;
            if (std::sscanf(text.c_str() + i, "{ %llu , %llu", &least, &most) == 2 && most < least) {
                throw std::runtime_error("a repetition of at least " + std::to_string(least) + " and at most " +
                                         std::to_string(most));
            }
        }
    }
}

// llama_grammar_parser::parse() prints what is wrong to stderr. We ask its parts, which throw.
void check_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root) {
    check_text(text);
    llama_grammar_parser parser(vocab);
    const char * at = text.c_str();
    while (*at == '#' || std::isspace(static_cast<unsigned char>(*at))) {
        at = *at == '#' ? at + std::strcspn(at, "\r\n") : at + 1;
    }
    while (*at) {
        at = parser.parse_rule(at);
    }
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            throw std::runtime_error("the rule '" + name + "' is not defined");
        }
    }
    if (parser.symbol_ids.count(root) == 0) {
        throw std::runtime_error("it has no rule '" + root + "' to begin with");
    }
}

}  // namespace

llama_token sample(llama_sampler * chain, const float * logits, int32_t n_vocab) {
    AssertionGuard guard;
    std::vector<llama_token_data> candidates(n_vocab);
    for (llama_token id = 0; id < n_vocab; ++id) {
        candidates[id] = {id, logits[id], 0.0f};
    }
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(chain, &array);
    if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) {
        throw std::runtime_error("the sampler selected no token");
    }
    const llama_token_data & chosen = array.data[array.selected];
    if (std::isinf(chosen.logit) && chosen.logit < 0) {
        throw std::runtime_error(
            "no token of the vocabulary is left to choose: the grammar or the biases exclude them all");
    }
    llama_sampler_accept(chain, chosen.id);
    return chosen.id;
}

void accept(llama_sampler * chain, llama_token token) {
    AssertionGuard guard;
    llama_sampler_accept(chain, token);
}

llama_sampler * grammar(const llama_vocab * vocab, const std::string & text, const std::string & root) {
    clear_errors();
    AssertionGuard guard;
    try {
        check_grammar(vocab, text, root);
    } catch (const std::exception & error) {
        throw std::invalid_argument(std::string("the grammar cannot be parsed: ") + error.what());
    }
    llama_sampler * sampler = llama_sampler_init_grammar(vocab, text.c_str(), root.c_str());
    if (!sampler) {
        throw std::invalid_argument("the grammar cannot be parsed: " + last_errors());
    }
    return sampler;
}

}  // namespace llamacancel

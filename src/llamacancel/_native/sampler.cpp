#include "sampler.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

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

// How llama.cpp looks for rules that begin with themselves: it follows the rules that a rule may begin with, each as
// deep as it goes, and again wherever it is named. A long chain would end its stack, and forty rules that name the next
// one twice would keep it busy for days. Here each rule is followed once, and what llama.cpp would do is counted.
class Beginnings {
public:
    explicit Beginnings(const llama_grammar_rules & rules)
        : rules_(rules), steps_(rules.size(), 0), open_(rules.size(), false) {
        for (const llama_grammar_rule & rule : rules) {
            may_be_empty_.push_back(has_empty_alternative(rule));
        }
    }

    void check() {
        uint64_t total = 0;
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            if (steps_[id] == 0) {
                add(total, steps_of(id, 0));
            }
        }
    }

private:
    static constexpr size_t kDeepest = 1000;
    static constexpr uint64_t kMostSteps = 1'000'000;

    static void add(uint64_t & total, uint64_t steps) {
        total += steps;
        if (total > kMostSteps) {
            throw std::runtime_error("its rules begin with each other in too many ways");
        }
    }

    static bool ends(const llama_grammar_element & element) {
        return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
    }

    static bool has_empty_alternative(const llama_grammar_rule & rule) {
        bool at_start = true;
        for (const llama_grammar_element & element : rule) {
            if (ends(element) && at_start) {
                return true;
            }
            at_start = ends(element);
        }
        return false;
    }

    uint64_t steps_of(uint32_t id, size_t depth) {
        if (depth > kDeepest) {
            throw std::runtime_error("a chain of more than " + std::to_string(kDeepest) +
                                     " rules, each of which begins with the next");
        }
        if (steps_[id] != 0 || open_[id]) {
            return std::max<uint64_t>(steps_[id], 1);  // one that begins with itself is llama.cpp's to tell
        }
        open_[id] = true;
        uint64_t steps = 1;
        bool at_beginning = true;
        for (const llama_grammar_element & element : rules_[id]) {
            if (element.type == LLAMA_GRETYPE_RULE_REF && at_beginning) {
                add(steps, steps_of(element.value, depth + 1));
                at_beginning = may_be_empty_[element.value];
            } else {
                at_beginning = ends(element);
            }
        }
        open_[id] = false;
        return steps_[id] = steps;
    }

    const llama_grammar_rules & rules_;
    std::vector<uint64_t> steps_;  // of those that were followed
    std::vector<bool> open_;       // those that are being followed
    std::vector<bool> may_be_empty_;
};

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
    Beginnings(parser.rules).check();
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

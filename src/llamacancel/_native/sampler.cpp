#include "sampler.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "llama-grammar.h"
#include "steps.hpp"
#include "team.hpp"

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

// What each rule may begin with: those that its alternatives name before anything that is not empty.
//
// A rule that begins with itself, and has something to follow there, would have llama.cpp add to its stacks without
// end. llama.cpp looks for such rules, too, but it misses those behind a rule that is empty only through others. It
// follows the rules that a rule may begin with each as deep as it goes, and again wherever it is named: a long chain
// would end its stack, and forty rules that name the next one twice would keep it busy for days. Here each rule is
// followed once, and what llama.cpp would do is counted.
class Beginnings {
public:
    explicit Beginnings(const llama_grammar_rules & rules)
        : rules_(rules), may_be_empty_(rules.size(), false), visits_(rules.size()) {
        find_empty();
    }

    // Throws where llama.cpp would get lost. `in_circles` becomes a rule that begins with itself, if there is one.
    void check(const std::map<std::string, uint32_t> & names, std::string & in_circles) {
        uint64_t total = 0;
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            if (visits_[id].steps == 0) {
                add(total, steps_of(id, 0));
            }
        }
        for (const auto & [name, id] : names) {
            for (const auto & [next, goes_on] : visits_[id].beginnings) {
                if (visits_[id].circle == visits_[next].circle) {
                    in_circles = in_circles.empty() ? name : in_circles;
                    if (goes_on) {
                        throw std::runtime_error("the rule '" + name + "' begins with itself (left recursion)");
                    }
                }
            }
        }
    }

private:
    static constexpr size_t kDeepest = 1000;
    static constexpr uint64_t kMostSteps = 1'000'000;

    struct Visit {
        uint64_t steps = 0;   // that llama.cpp would take from here; 0 before the visit
        uint32_t number = 0;  // of the visit
        uint32_t circle = 0;  // of the first visit among the rules that begin with each other
        bool open = false;    // its circle is not known yet
        std::vector<std::pair<uint32_t, bool>> beginnings;  // rules, and whether something follows them
    };

    static void add(uint64_t & total, uint64_t steps) {
        total += steps;
        if (total > kMostSteps) {
            throw std::runtime_error("its rules begin with each other in too many ways");
        }
    }

    static bool ends(const llama_grammar_element & element) {
        return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
    }

    // Marks the rules that have an alternative of nothing but rules that may be empty.
    void find_empty() {
        struct Alternative {
            uint32_t rule;
            size_t open;  // rules in it that are not known to be empty
        };
        std::vector<Alternative> alternatives;
        std::vector<std::vector<size_t>> named_in(rules_.size());
        std::vector<size_t> empty;
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            size_t n_rules = 0, n_others = 0;
            for (const llama_grammar_element & element : rules_[id]) {
                if (!ends(element)) {
                    const bool is_rule = element.type == LLAMA_GRETYPE_RULE_REF;
                    if (is_rule) {
                        named_in[element.value].push_back(alternatives.size());
                    }
                    ++(is_rule ? n_rules : n_others);
                    continue;
                }
                if (n_rules + n_others == 0) {
                    empty.push_back(alternatives.size());
                }
                alternatives.push_back({id, n_rules + n_others});
                n_rules = n_others = 0;
            }
        }
        while (!empty.empty()) {
            const uint32_t id = alternatives[empty.back()].rule;
            empty.pop_back();
            if (may_be_empty_[id]) {
                continue;
            }
            may_be_empty_[id] = true;
            for (const size_t i : named_in[id]) {
                if (--alternatives[i].open == 0) {
                    empty.push_back(i);
                }
            }
        }
    }

    // Follows the rules that this one may begin with (Tarjan's algorithm finds the circles on the way).
    uint64_t steps_of(uint32_t id, size_t depth) {
        if (depth > kDeepest) {
            throw std::runtime_error("a chain of more than " + std::to_string(kDeepest) +
                                     " rules, each of which begins with the next");
        }
        Visit & visit = visits_[id];
        if (visit.steps != 0) {
            return visit.steps;
        }
        uint64_t steps = visit.steps = 1;
        visit.number = visit.circle = ++n_visits_;
        visit.open = true;
        open_.push_back(id);
        bool at_beginning = true;
        const llama_grammar_rule & rule = rules_[id];
        for (size_t i = 0; i < rule.size(); ++i) {
            if (rule[i].type != LLAMA_GRETYPE_RULE_REF || !at_beginning) {
                at_beginning = ends(rule[i]);
                continue;
            }
            const uint32_t next = rule[i].value;
            add(steps, steps_of(next, depth + 1));
            visit.beginnings.push_back({next, !ends(rule[i + 1])});
            if (visits_[next].open) {
                visit.circle = std::min(visit.circle, visits_[next].circle);
            }
            at_beginning = may_be_empty_[next];
        }
        if (visit.circle == visit.number) {
            uint32_t member;
            do {
                member = open_.back();
                open_.pop_back();
                visits_[member].open = false;
                visits_[member].circle = visit.number;
            } while (member != id);
        }
        return visit.steps = steps;
    }

    const llama_grammar_rules & rules_;
    std::vector<bool> may_be_empty_;
    std::vector<Visit> visits_;
    std::vector<uint32_t> open_;
    uint32_t n_visits_ = 0;
};

// llama_grammar_parser::parse() prints what is wrong to stderr. We ask its parts, which throw.
void check_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root,
                   std::string & in_circles) {
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
    Beginnings(parser.rules).check(parser.symbol_ids, in_circles);
}

// What a grammar may cost for one token, in llama.cpp's steps of some 50 ns. Most take 200,000 with a vocabulary of
// 150,000 tokens, a choice of 500 texts 7 million; one that can be read in many ways takes more without bound, and
// others wait.
constexpr uint64_t kGrammarSteps = 16'000'000;

constexpr const char * kNoneLeft =
    "no token of the vocabulary is left to choose: the grammar, the constraint or the biases exclude them all";

constexpr const char * kTooAmbiguous =
    "the grammar is too ambiguous: there are too many ways to read what was written so far, or to go on";

// Runs `work` under the call; what it throws becomes a status and a message.
template <typename Work>
Status guarded(Call & call, std::string & message, const Work & work) {
    try {
        const CountedSteps counted(call, kGrammarSteps);
        work();
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const TooManySteps &) {
        message = kTooAmbiguous;
    } catch (const std::exception & error) {
        message = error.what();
    }
    return Status::Invalid;
}

}  // namespace

void sample(Draw & draw, int32_t n_vocab) {
    draw.status = guarded(draw.call, draw.message, [&] {
        const std::unique_ptr<llama_token_data[]> candidates(new llama_token_data[n_vocab]);  // not zeroed first
        bool numbers = true;
        size_t n = 0;
        for (llama_token id = 0; id < n_vocab; ++id) {
            candidates[n] = {id, draw.logits[id], 0.0f};
            numbers &= draw.logits[id] < INFINITY;
            n += !draw.mask || (draw.mask[id / 32] >> (id % 32) & 1);
        }
        if (!numbers) {
            throw std::runtime_error("the logits are not numbers: there are NaNs or infinities among them");
        }
        if (n == 0) {
            throw std::runtime_error(kNoneLeft);
        }
        llama_token_data_array array = {candidates.get(), n, -1, false};
        llama_sampler_apply(draw.chain, &array);
        if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) {
            throw std::runtime_error("the sampler selected no token");
        }
        const llama_token_data & chosen = array.data[array.selected];
        if (std::isinf(chosen.logit) && chosen.logit < 0) {
            throw std::runtime_error(kNoneLeft);
        }
        draw.token = chosen.id;
    });
    if (draw.status == Status::Done) {
        draw.status = accept(draw.chain, draw.token, draw.message);
    }
}

void sample(std::vector<Draw> & draws, int32_t n_vocab, int n_threads) {
    share(n_threads, static_cast<int>(draws.size()), [&](int i) { sample(draws[i], n_vocab); });
}

Status accept(llama_sampler * chain, llama_token token, std::string & message) {
    Call whole;  // a chain half of which knows the token would be of no use
    return guarded(whole, message, [&] { llama_sampler_accept(chain, token); });
}

void reset(llama_sampler * chain) {
    const InFlight in_flight;
    const AssertionGuard guard;
    llama_sampler_reset(chain);
}

llama_sampler * make_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root,
                             std::string & message) {
    clear_errors();
    Call whole;
    std::string in_circles;
    llama_sampler * sampler = nullptr;
    const Status status = guarded(whole, message, [&] {
        check_grammar(vocab, text, root, in_circles);
        sampler = llama_sampler_init_grammar(vocab, text.c_str(), root.c_str());
        if (!sampler) {
            throw std::runtime_error(in_circles.empty()
                                         ? last_errors()
                                         : "the rule '" + in_circles + "' begins with itself (left recursion)");
        }
    });
    if (status == Status::Invalid && message != kTooAmbiguous) {
        message = "the grammar cannot be parsed: " + message;
    }
    return sampler;
}

}  // namespace llamacancel

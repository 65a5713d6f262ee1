#include "words/sampler.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "llama-grammar.h"
#include "process/assertions.hpp"
#include "process/exit.hpp"
#include "process/log.hpp"
#include "process/steps.hpp"
#include "process/team.hpp"

namespace llamacancel {

namespace {

// What llama.cpp's parser recurses too deep for, or takes for no grammar at all. Texts, classes and comments are passed
// over.
void check_text(const std::string & text, CountedSteps & counted) {
    constexpr int kDeepest = 500;
    counted.add(text.size() / 16);
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
    Beginnings(const llama_grammar_rules & rules, CountedSteps & counted)
        : rules_(rules), counted_(counted), may_be_empty_(rules.size(), false), visits_(rules.size()) {
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
            counted_.add(1 + rules_[id].size() / 16);
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
            counted_.add(1 + named_in[id].size() / 16);
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
        counted_.add(1 + rule.size() / 16);
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
    CountedSteps & counted_;
    std::vector<bool> may_be_empty_;
    std::vector<Visit> visits_;
    std::vector<uint32_t> open_;
    uint32_t n_visits_ = 0;
};

// What of a text is put into a message.
std::string excerpt(const std::string & text) {
    constexpr size_t kMost = 200;
    return text.size() <= kMost ? text : text.substr(0, kMost) + "...";
}

// llama_grammar_parser::parse() prints what is wrong to stderr. We ask its parts, which throw.
llama_grammar * parse(const llama_vocab * vocab, const std::string & text, const std::string & root,
                      CountedSteps & counted) {
    check_text(text, counted);
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
            throw std::runtime_error("the rule '" + excerpt(name) + "' is not defined");
        }
    }
    const auto first = parser.symbol_ids.find(root);
    if (first == parser.symbol_ids.end()) {
        throw std::runtime_error("it has no rule '" + excerpt(root) + "' to begin with");
    }
    std::string in_circles;
    Beginnings(parser.rules, counted).check(parser.symbol_ids, in_circles);
    std::vector<const llama_grammar_element *> rules = parser.c_rules();
    llama_grammar * const grammar = llama_grammar_init_impl(vocab, rules.data(), rules.size(), first->second);
    if (!grammar) {
        throw std::runtime_error(in_circles.empty()
                                     ? last_errors()
                                     : "the rule '" + excerpt(in_circles) + "' begins with itself (left recursion)");
    }
    return grammar;
}

// A grammar in a chain. llama.cpp's own parses its text again for a reset; ours begins again with a copy.
struct Grammar {
    struct Free {
        void operator()(llama_grammar * grammar) const { llama_grammar_free_impl(grammar); }
    };
    using Pointer = std::unique_ptr<llama_grammar, Free>;

    std::shared_ptr<const llama_grammar> at_start;
    Pointer now = Pointer(llama_grammar_clone_impl(*at_start));

    static Grammar & of(const llama_sampler * sampler) { return *static_cast<Grammar *>(sampler->ctx); }

    static llama_sampler * make(std::unique_ptr<Grammar> grammar) {
        return llama_sampler_init(&interface(), grammar.release());
    }

    static llama_sampler_i & interface() {
        static llama_sampler_i functions = [] {
            llama_sampler_i made = {};
            made.name = [](const llama_sampler *) { return "grammar"; };
            made.accept = [](llama_sampler * sampler, llama_token token) {
                llama_grammar_accept_impl(*of(sampler).now, token);
            };
            made.apply = [](llama_sampler * sampler, llama_token_data_array * candidates) {
                llama_grammar_apply_impl(*of(sampler).now, candidates);
            };
            made.reset = [](llama_sampler * sampler) {
                of(sampler).now.reset(llama_grammar_clone_impl(*of(sampler).at_start));
            };
            made.clone = [](const llama_sampler * sampler) {
                auto copy = std::make_unique<Grammar>(Grammar{of(sampler).at_start, nullptr});
                copy->now.reset(llama_grammar_clone_impl(*of(sampler).now));
                return make(std::move(copy));
            };
            made.free = [](llama_sampler * sampler) { delete &of(sampler); };
            return made;
        }();
        return functions;
    }
};

// What a grammar may cost for one token, its choice and its being told together, in llama.cpp's steps of some 50 ns:
// others wait for as long, so it is less than what an engine's step takes by default (0.4 s). Most grammars take 4 for
// each token of the vocabulary, a choice of 500 texts 4.3 million; one that can be read in many ways takes more without
// bound.
constexpr uint64_t kTokenSteps = 6'000'000;

// What its parsing may cost, which is on no engine's thread.
constexpr uint64_t kParsingSteps = 16'000'000;

constexpr const char * kNoneLeft =
    "no token of the vocabulary is left to choose: the grammar, the constraint or the biases exclude them all";

constexpr const char * kTooAmbiguous =
    "the grammar is too ambiguous or too large: there are too many ways to read what was written so far, or to go on";

// Runs `work` under the call; what it throws becomes a status and a message. `steps` grows by those that it takes.
template <typename Work>
Status guarded(Call & call, uint64_t most_steps, std::string & message, uint64_t & steps, const Work & work) {
    try {
        CountedSteps counted(call, most_steps);
        struct Tell {
            const CountedSteps & counted;
            uint64_t & steps;
            ~Tell() { steps += counted.steps(); }
        } tell{counted, steps};
        work(counted);
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const TooManySteps &) {
        message = kTooAmbiguous;
    } catch (const std::exception & error) {
        message = excerpt(error.what());
    }
    return Status::Invalid;
}

// The logarithms of the probabilities that the logits give: of the token, and of the likeliest ones.
void look_at(Draw & draw, int32_t n_vocab) {
    const float * const logits = draw.logits;
    const float most = *std::max_element(logits, logits + n_vocab);
    double sum = 0;
    for (int32_t id = 0; id < n_vocab; ++id) {
        sum += std::exp(logits[id] - most);
    }
    const double whole = most + std::log(sum);
    draw.logprob = logits[draw.token] - whole;
    const auto likelier = [&](llama_token a, llama_token b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    std::vector<llama_token> best;  // a heap with the least likely of them on top
    const size_t n_top = std::min(draw.n_top, n_vocab);
    for (llama_token id = 0; id < n_vocab && n_top > 0; ++id) {
        if (best.size() == n_top) {
            if (!likelier(id, best.front())) {
                continue;
            }
            std::pop_heap(best.begin(), best.end(), likelier);
            best.pop_back();
        }
        best.push_back(id);
        std::push_heap(best.begin(), best.end(), likelier);
    }
    std::sort_heap(best.begin(), best.end(), likelier);
    draw.top.clear();
    for (const llama_token id : best) {
        draw.top.push_back({id, logits[id] - whole});
    }
}

}  // namespace

void sample(Draw & draw, int32_t n_vocab) {
    draw.status = guarded(draw.call, kTokenSteps, draw.message, draw.steps, [&](CountedSteps &) {
        const std::unique_ptr<llama_token_data[]> candidates(new llama_token_data[n_vocab]);  // not zeroed first
        bool numbers = true;
        for (llama_token id = 0; id < n_vocab; ++id) {
            candidates[id] = {id, draw.logits[id], 0.0f};
            numbers &= draw.logits[id] < INFINITY;
        }
        if (!numbers) {
            throw std::runtime_error("the logits are not numbers: there are NaNs or infinities among them");
        }
        if (draw.biases) {  // here, where a token is at its own place: llama.cpp's sampler searches behind a mask
            for (const llama_logit_bias & bias : *draw.biases) {
                candidates[bias.token].logit += bias.bias;
            }
        }
        size_t n = draw.mask ? 0 : n_vocab;
        for (llama_token id = 0; draw.mask && id < n_vocab; ++id) {
            candidates[n] = candidates[id];
            n += draw.mask[id / 32] >> (id % 32) & 1;
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
        draw.status = accept(draw.chain, draw.token, draw.message, draw.steps);  // of what is left for the token
    }
    if (draw.status == Status::Done && draw.n_top >= 0) {
        look_at(draw, n_vocab);
    }
}

void sample(std::vector<Draw> & draws, int32_t n_vocab, int n_threads) {
    on_team(n_threads, static_cast<int>(draws.size()), [&](int i) { sample(draws[i], n_vocab); });
}

Status accept(llama_sampler * chain, llama_token token, std::string & message, uint64_t & steps) {
    Call whole;  // a chain half of which knows the token would be of no use
    const uint64_t left = kTokenSteps - std::min(steps, kTokenSteps);
    return guarded(whole, left, message, steps, [&](CountedSteps &) { llama_sampler_accept(chain, token); });
}

Status force(llama_sampler * chain, llama_token token, std::string & message) {
    Call whole;
    uint64_t steps = 0;
    return guarded(whole, kTokenSteps, message, steps, [&](CountedSteps &) {
        llama_token_data only = {token, 0.0f, 0.0f};
        llama_token_data_array array = {&only, 1, -1, false};
        llama_sampler_apply(chain, &array);
        llama_sampler_accept(chain, token);
    });
}

void reset(llama_sampler * chain) {
    const InFlight in_flight;
    const AssertionsThrow net;
    llama_sampler_reset(chain);
}

Status make_grammar(const llama_vocab * vocab, const std::string & text, const std::string & root, Call & call,
                    llama_sampler *& made, std::string & message, uint64_t & steps) {
    clear_errors();
    const Status status = guarded(call, kParsingSteps, message, steps, [&](CountedSteps & counted) {
        std::shared_ptr<const llama_grammar> grammar(parse(vocab, text, root, counted), Grammar::Free{});
        made = Grammar::make(std::make_unique<Grammar>(Grammar{std::move(grammar)}));
    });
    if (status == Status::Invalid && message != kTooAmbiguous) {
        message = "the grammar cannot be parsed: " + message;
    }
    return status;
}

}  // namespace llamacancel

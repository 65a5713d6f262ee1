#include <chrono>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "allocations.hpp"
#include "cancel/token.hpp"
#include "check.hpp"
#include "fake_clock.hpp"

using namespace llamacancel;
using Ptr = TokenCore::Ptr;

static void count(void * counter) noexcept { static_cast<std::atomic<int> *>(counter)->fetch_add(1); }

template <typename Work>
static void in_threads(int n, Work work) {
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
        threads.emplace_back(work, i);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static int rounds(int n) {
    const char * const factor = std::getenv("STRESS");
    return factor ? n * std::atoi(factor) : n;
}

TEST("a new token is live, and stays so without a deadline") {
    const Ptr token = TokenCore::make();
    CHECK(!token->poll());
    advance(1'000'000'000'000);
    CHECK(!token->poll());
    CHECK(token->deadline_ns() == kNever);
}

TEST("the first cancel wins and says when") {
    const Ptr token = TokenCore::make();
    const int64_t at = fake_time;
    CHECK(token->cancel(Cause::Shutdown, "closing"));
    advance(50);
    CHECK(token->poll());
    CHECK(token->verdict().cause == Cause::Shutdown);
    CHECK(token->verdict().reason == "closing");
    CHECK(token->verdict().at_ns == at);
}

TEST("a late cancel is inert") {
    const Ptr token = TokenCore::make();
    const Ptr child = TokenCore::derive({token});
    CHECK(token->cancel(Cause::Client, "first"));
    CHECK(!token->cancel(Cause::Interrupt, "second"));
    CHECK(!child->cancel(Cause::Interrupt, "third"));
    CHECK(token->verdict().reason == "first");
    CHECK(child->verdict().reason == "first");
    CHECK(child->verdict().cause == Cause::Client);
}

TEST("of many cancels at once exactly one is the first") {
    for (int round = 0; round < rounds(200); ++round) {
        const Ptr token = TokenCore::make();
        std::atomic<int> firsts{0};
        std::atomic<int> winner{-1};
        in_threads(4, [&](int i) {
            if (token->cancel(Cause::Client, std::to_string(i))) {
                ++firsts;
                winner = i;
            }
            CHECK(token->poll());
        });
        CHECK(firsts == 1);
        CHECK(token->verdict().reason == std::to_string(winner.load()));
    }
}

TEST("a cancel travels down") {
    const Ptr root = TokenCore::make();
    const Ptr child = TokenCore::derive({root});
    const Ptr grandchild = TokenCore::derive({child});
    CHECK(root->cancel(Cause::Client, "gone"));
    CHECK(child->poll());
    CHECK(grandchild->poll());
    CHECK(grandchild->verdict().cause == Cause::Client);
    CHECK(grandchild->verdict().reason == "gone");
    CHECK(grandchild->verdict().at_ns == root->verdict().at_ns);
}

TEST("a cancel never travels up or across") {
    const Ptr root = TokenCore::make();
    const Ptr left = TokenCore::derive({root});
    const Ptr right = TokenCore::derive({root});
    const Ptr below = TokenCore::derive({left});
    CHECK(left->cancel(Cause::Client, ""));
    CHECK(below->poll());
    CHECK(!root->poll());
    CHECK(!right->poll());
}

TEST("a cancel reaches below a token that everybody has let go of") {
    const Ptr root = TokenCore::make();
    Ptr middle = TokenCore::derive({root});
    const Ptr leaf = TokenCore::derive({middle});
    middle.reset();
    CHECK(root->cancel(Cause::Client, "gone"));
    CHECK(leaf->poll());
    CHECK(leaf->verdict().reason == "gone");
}

TEST("a child of a cancelled token is born cancelled") {
    const Ptr root = TokenCore::make();
    root->cancel(Cause::Interrupt, "^C");
    const Ptr child = TokenCore::derive({root});
    CHECK(child->poll());
    CHECK(child->verdict().cause == Cause::Interrupt);
    CHECK(child->verdict().reason == "^C");
    CHECK(!child->cancel(Cause::Client, "late"));
}

TEST("a token derived while its parent is cancelled is cancelled") {
    for (int round = 0; round < rounds(300); ++round) {
        const Ptr root = TokenCore::make();
        std::vector<Ptr> children(60);
        in_threads(3, [&](int i) {
            if (i == 0) {
                root->cancel(Cause::Client, "now");
                return;
            }
            for (int n = 0; n < 30; ++n) {
                Ptr & child = children[(i - 1) * 30 + n];
                child = TokenCore::derive({n % 2 && n > 1 ? children[(i - 1) * 30 + n - 1] : root});
            }
        });
        for (const Ptr & child : children) {
            CHECK(child->poll());
            CHECK(child->verdict().reason == "now");
        }
    }
}

TEST("a cancel reaches the end of a chain of 100,000, and the chain dies, without recursion") {
    const long before = allocated;
    {
        const Ptr root = TokenCore::make();
        Ptr leaf = root;
        for (int i = 0; i < 100'000; ++i) {
            leaf = TokenCore::derive({leaf});
        }
        CHECK(!leaf->poll());
        root->cancel(Cause::Client, "deep");
        CHECK(leaf->poll());
        CHECK(leaf->verdict().reason == "deep");
        Ptr live = TokenCore::make();
        for (int i = 0; i < 100'000; ++i) {
            live = TokenCore::derive({live, live});
        }
    }
    CHECK(allocated == before);
}

TEST("a chain cancelled from below dies without recursion") {
    const long before = allocated;
    {
        std::vector<Ptr> chain{TokenCore::make()};
        for (int i = 0; i < 100'000; ++i) {
            chain.push_back(TokenCore::derive({chain.back()}));
        }
        for (auto token = chain.rbegin(); token != chain.rend(); ++token) {
            CHECK((*token)->cancel(Cause::Client, ""));
        }
        const Ptr leaf = chain.back();
        chain.clear();
    }
    CHECK(allocated == before);
}

TEST("a cancel reaches each of 10,000 children and theirs") {
    const Ptr root = TokenCore::make();
    std::vector<Ptr> tokens;
    for (int i = 0; i < 10'000; ++i) {
        tokens.push_back(TokenCore::derive({root}));
        tokens.push_back(TokenCore::derive({tokens.back()}));
    }
    root->cancel(Cause::Client, "wide");
    for (const Ptr & token : tokens) {
        CHECK(token->poll());
        CHECK(token->verdict().reason == "wide");
    }
}

TEST("a poll reads the clock once where there is a deadline, and not otherwise, at any depth") {
    Ptr plain = TokenCore::make();
    Ptr timed = TokenCore::make(fake_time + 1'000'000);
    for (int i = 0; i < 1'000; ++i) {
        plain = TokenCore::derive({plain});
        timed = TokenCore::derive({timed});
    }
    int64_t reads = clock_reads;
    CHECK(!plain->poll());
    CHECK(clock_reads == reads);
    CHECK(!timed->poll());
    CHECK(clock_reads == reads + 1);
    timed->cancel(Cause::Client, "");
    reads = clock_reads;
    CHECK(timed->poll());
    CHECK(clock_reads == reads);
}

TEST("any_of is cancelled by each of its tokens and reaches none of them") {
    for (int which = 0; which < 3; ++which) {
        const std::vector<Ptr> parents{TokenCore::make(), TokenCore::make(), TokenCore::make()};
        const Ptr any = TokenCore::derive(parents);
        const Ptr below = TokenCore::derive({any});
        CHECK(!any->poll());
        parents[which]->cancel(Cause::Shutdown, std::to_string(which));
        CHECK(below->poll());
        CHECK(any->verdict().reason == std::to_string(which));
        CHECK(any->verdict().cause == Cause::Shutdown);
        for (int other = 0; other < 3; ++other) {
            CHECK(parents[other]->poll() == (other == which));
        }
    }
    const Ptr parent = TokenCore::make();
    const Ptr any = TokenCore::derive({parent, parent});
    any->cancel(Cause::Client, "");
    CHECK(!parent->poll());
    CHECK(!TokenCore::derive({parent, parent})->poll());
}

TEST("a deadline cancels the token at its time") {
    const int64_t deadline = fake_time + 100;
    const Ptr token = TokenCore::make(deadline);
    advance(99);
    CHECK(!token->poll());
    advance(1);
    CHECK(token->poll());
    advance(1'000);
    CHECK(token->verdict().cause == Cause::Deadline);
    CHECK(token->verdict().reason.empty());
    CHECK(token->verdict().at_ns == deadline);
    CHECK(!token->cancel(Cause::Client, "late"));
    CHECK(token->verdict().cause == Cause::Deadline);
}

TEST("a cancel before the deadline stays the cause") {
    const Ptr token = TokenCore::make(fake_time + 100);
    CHECK(token->cancel(Cause::Client, "early"));
    advance(1'000);
    CHECK(token->verdict().cause == Cause::Client);
}

TEST("a child has the earlier of its own and its parent's deadline") {
    const int64_t now = fake_time;
    const Ptr parent = TokenCore::make(now + 100);
    const Ptr shorter = TokenCore::derive({parent}, now + 50);
    const Ptr longer = TokenCore::derive({parent}, now + 500);
    CHECK(shorter->deadline_ns() == now + 50);
    CHECK(longer->deadline_ns() == now + 100);
    advance(50);
    CHECK(shorter->poll());
    CHECK(!parent->poll());
    advance(50);
    CHECK(longer->poll());
    CHECK(longer->verdict().cause == Cause::Deadline);
    CHECK(longer->verdict().at_ns == now + 100);
    CHECK(parent->poll());
}

TEST("any_of has the earliest deadline of its tokens") {
    const int64_t now = fake_time;
    const Ptr never = TokenCore::make();
    const Ptr later = TokenCore::make(now + 500);
    const Ptr sooner = TokenCore::make(now + 100);
    const Ptr any = TokenCore::derive({never, later, sooner});
    CHECK(any->deadline_ns() == now + 100);
    advance(100);
    CHECK(any->poll());
    CHECK(any->verdict().cause == Cause::Deadline);
    CHECK(!later->poll());
}

TEST("a child whose deadline passed before its parent's cancel says deadline") {
    const Ptr parent = TokenCore::make();
    const Ptr child = TokenCore::derive({parent}, fake_time + 10);
    advance(20);
    parent->cancel(Cause::Client, "later");
    CHECK(child->poll());
    CHECK(child->verdict().cause == Cause::Deadline);
}

TEST("a token with a deadline in the past is born cancelled") {
    CHECK(TokenCore::make(fake_time)->poll());
    CHECK(TokenCore::derive({TokenCore::make()}, 0)->poll());
}

TEST("a callback runs once, at the cancel") {
    std::atomic<int> runs{0};
    const Ptr root = TokenCore::make();
    const Ptr child = TokenCore::derive({root});
    CHECK(root->add_callback(count, &runs) != 0);
    CHECK(child->add_callback(count, &runs) != 0);
    CHECK(runs == 0);
    root->cancel(Cause::Client, "");
    CHECK(runs == 2);
    root->cancel(Cause::Client, "");
    root->run_callbacks();
    CHECK(runs == 2);
}

TEST("a callback sees every descendant cancelled") {
    struct Sight {
        std::vector<Ptr> tokens;
        std::atomic<int> cancelled{0};
    } sight;
    const Ptr root = TokenCore::make();
    for (int i = 0; i < 10; ++i) {
        sight.tokens.push_back(TokenCore::derive({i ? sight.tokens.back() : root}));
    }
    root->add_callback(
        [](void * data) noexcept {
            for (const Ptr & token : static_cast<Sight *>(data)->tokens) {
                static_cast<Sight *>(data)->cancelled += token->poll();
            }
        },
        &sight);
    root->cancel(Cause::Client, "");
    CHECK(sight.cancelled == 10);
}

TEST("a callback may derive, cancel, poll and drop its own token") {
    struct Args {
        Ptr token = TokenCore::make();
        Ptr other = TokenCore::make();
    } mine;
    mine.token->add_callback(
        [](void * data) noexcept {
            Args & args = *static_cast<Args *>(data);
            CHECK(TokenCore::derive({args.token})->poll());
            CHECK(!args.token->cancel(Cause::Client, "again"));
            CHECK(args.token->add_callback(count, nullptr) == 0);
            args.other->cancel(Cause::Client, args.token->verdict().reason);
            args.token.reset();
        },
        &mine);
    Ptr(mine.token)->cancel(Cause::Client, "first");
    CHECK(!mine.token);
    CHECK(mine.other->verdict().reason == "first");
}

TEST("a callback on a cancelled token is refused") {
    const Ptr token = TokenCore::make();
    token->cancel(Cause::Client, "");
    CHECK(token->add_callback(count, nullptr) == 0);
    CHECK(TokenCore::derive({token})->add_callback(count, nullptr) == 0);
}

TEST("a removed callback does not run") {
    std::atomic<int> runs{0};
    const Ptr token = TokenCore::make();
    const uint64_t id = token->add_callback(count, &runs);
    const uint64_t kept = token->add_callback(count, &runs);
    CHECK(token->remove_callback(id));
    CHECK(!token->remove_callback(id));
    CHECK(!token->remove_callback(0));
    token->cancel(Cause::Client, "");
    CHECK(runs == 1);
    CHECK(!token->remove_callback(kept));
}

TEST("after a deadline callbacks wait for run_callbacks") {
    std::atomic<int> runs{0};
    const Ptr token = TokenCore::make(fake_time + 10);
    CHECK(token->add_callback(count, &runs) != 0);
    advance(10);
    CHECK(token->poll());
    CHECK(runs == 0);
    token->run_callbacks();
    CHECK(runs == 1);
}

TEST("a callback runs exactly once or is removed, whoever races") {
    for (int round = 0; round < rounds(500); ++round) {
        std::atomic<int> runs{0};
        std::atomic<int> removed{0};
        const Ptr root = TokenCore::make();
        const Ptr token = TokenCore::derive({root});
        const uint64_t id = token->add_callback(count, &runs);
        in_threads(4, [&](int i) {
            if (i == 0) {
                removed += token->remove_callback(id);
            } else if (i == 1) {
                root->cancel(Cause::Client, "root");
            } else {
                token->cancel(Cause::Client, "token");
            }
        });
        CHECK(runs + removed == 1);
    }
}

TEST("a callback added during a cancel runs or is refused") {
    for (int round = 0; round < rounds(500); ++round) {
        std::atomic<int> runs{0};
        std::atomic<int> refused{0};
        const Ptr token = TokenCore::make();
        in_threads(3, [&](int i) {
            if (i == 0) {
                token->cancel(Cause::Client, "");
            } else {
                refused += token->add_callback(count, &runs) == 0;
            }
        });
        CHECK(runs + refused == 2);
    }
}

TEST("children may die during a cancel") {
    for (int round = 0; round < rounds(200); ++round) {
        const Ptr left = TokenCore::make();
        const Ptr right = TokenCore::make();
        in_threads(4, [&](int i) {
            if (i == 0) {
                left->cancel(Cause::Client, "left");
            } else if (i == 1) {
                right->cancel(Cause::Client, "right");
            } else {
                for (int n = 0; n < 40; ++n) {
                    Ptr any = TokenCore::derive({left, right, left});
                    Ptr below = TokenCore::derive({any});
                    any.reset();
                    if (below->poll()) {
                        CHECK(!below->verdict().reason.empty());
                    }
                }
            }
        });
    }
}

TEST("a dropped token frees its links and lets its parents go") {
    const Ptr root = TokenCore::make();
    const long before = allocated;
    for (int i = 0; i < 1'000; ++i) {
        Ptr child = TokenCore::derive({root});
        const Ptr grandchild = TokenCore::derive({child, root});
        child.reset();
    }
    CHECK(allocated == before);
    CHECK(root.use_count() == 1);
    root->cancel(Cause::Client, "");
    std::weak_ptr<TokenCore> gone = TokenCore::derive({root});
    CHECK(gone.expired());
    CHECK(root.use_count() == 1);
}

TEST("a cancelled tree is freed whole") {
    const long before = allocated;
    {
        Ptr root = TokenCore::make();
        std::vector<Ptr> tokens{root};
        for (int i = 0; i < 500; ++i) {
            tokens.push_back(TokenCore::derive({tokens[i / 3], tokens[i / 2]}));
        }
        root->cancel(Cause::Client, "a reason that is too long for a small string to hold in place");
        root.reset();
        while (!tokens.empty()) {
            tokens.erase(tokens.begin());
            CHECK(tokens.empty() || tokens.back()->verdict().reason.size() > 30);
        }
    }
    CHECK(allocated == before);
}

TEST("wait ends with the cancel, at once if it was before") {
    const Ptr root = TokenCore::make();
    const Ptr child = TokenCore::derive({root});
    std::thread waiter([&] { CHECK(child->wait_until(kNever)); });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    root->cancel(Cause::Client, "");
    waiter.join();
    CHECK(root->wait_until(kNever));
    CHECK(root->wait_until(0));
}

TEST("wait returns false when its time is up first") {
    const Ptr token = TokenCore::make();
    CHECK(!token->wait_until(0));
    std::atomic<bool> done{false};
    std::thread waiter([&] {
        CHECK(!token->wait_until(fake_time + 2'000'000));
        done = true;
    });
    while (!done) {
        advance(500'000);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    waiter.join();
    CHECK(!token->poll());
}

TEST("wait ends with the deadline") {
    const Ptr token = TokenCore::make(fake_time + 2'000'000);
    std::atomic<bool> done{false};
    std::thread waiter([&] {
        CHECK(token->wait_until(kNever));
        done = true;
    });
    while (!done) {
        advance(500'000);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    waiter.join();
    CHECK(token->verdict().cause == Cause::Deadline);
}

TEST("eight threads derive, cancel, drop, poll, wait and call back at random") {
    struct Record {
        std::atomic<int> runs{0};
        bool removed = false;
    };
    struct Slot {
        std::mutex mutex;
        Ptr token = TokenCore::make();
    };
    const long before = allocated;
    {
        std::deque<Slot> slots(48);
        std::deque<std::deque<Record>> records(8);
        in_threads(8, [&](int thread) {
            std::mt19937 random(thread + 1);
            const auto pick = [&]() -> Slot & { return slots[random() % slots.size()]; };
            const auto get = [&] {
                Slot & slot = pick();
                std::lock_guard<std::mutex> lock(slot.mutex);
                return slot.token;
            };
            const auto put = [&](Ptr token) {
                Slot & slot = pick();
                std::lock_guard<std::mutex> lock(slot.mutex);
                slot.token.swap(token);
            };
            for (int op = 0; op < rounds(3'000); ++op) {
                const unsigned what = random() % 100;
                const Ptr token = get();
                if (what < 35) {
                    std::vector<Ptr> parents{token};
                    while (random() % 3 == 0) {
                        parents.push_back(get());
                    }
                    put(TokenCore::derive(parents, random() % 4 ? kNever : fake_time + random() % 100'000));
                } else if (what < 45) {
                    put(TokenCore::make());
                } else if (what < 55) {
                    token->cancel(Cause::Client, "a reason that is too long for a small string to hold");
                    CHECK(token->poll());
                } else if (what < 70) {
                    Record & record = records[thread].emplace_back();
                    const uint64_t id = token->add_callback(count, &record.runs);
                    if (random() % 2) {
                        record.removed = id == 0 || token->remove_callback(id);
                    }
                } else if (what < 75) {
                    token->wait_until(fake_time);
                } else if (what < 80) {
                    advance(random() % 5'000);
                } else if (what < 82) {
                    if (token->poll()) {
                        CHECK(token->wait_until(kNever));
                        token->run_callbacks();
                    }
                } else if (token->poll()) {
                    const Verdict & verdict = token->verdict();
                    CHECK(verdict.cause == (verdict.reason.empty() ? Cause::Deadline : Cause::Client));
                    CHECK(verdict.at_ns <= fake_time);
                }
            }
        });
        for (Slot & slot : slots) {
            slot.token->cancel(Cause::Shutdown, "end");
            slot.token->run_callbacks();
        }
        for (const auto & of_thread : records) {
            for (const Record & record : of_thread) {
                CHECK(record.runs <= (record.removed ? 0 : 1));
            }
        }
    }
    CHECK(allocated == before);
}

int main(int argc, char ** argv) { return check::run(argc, argv); }

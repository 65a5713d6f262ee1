// A cancel token: one atomic state, a deadline, the first cause, and the tokens derived from it.
//
// poll() is one atomic load, and one clock read where there is a deadline, however deep the tree is:
// a cancel is pushed down to the descendants when it happens, and a deadline is copied down when a
// token is derived. See DESIGN.md beside this file for ownership and memory order.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cancel/clock.hpp"

namespace llamacancel {

enum class Cause : uint8_t { None = 0, Client, Deadline, Interrupt, Shutdown };

struct Verdict {
    Cause cause = Cause::None;
    std::string reason;
    int64_t at_ns = 0;  // when cancel() was called, or the deadline that passed
};

class TokenCore : public std::enable_shared_from_this<TokenCore> {
public:
    using Ptr = std::shared_ptr<TokenCore>;
    using CallbackFn = void (*)(void *) noexcept;

    static Ptr make(int64_t deadline_ns = kNever) { return Ptr(new TokenCore(deadline_ns)); }

    // A token that is cancelled as soon as one of `parents` is, and that reaches none of them.
    static Ptr derive(const std::vector<Ptr> & parents, int64_t deadline_ns = kNever) {
        for (const Ptr & parent : parents) {
            deadline_ns = std::min(deadline_ns, parent->deadline_ns_);
        }
        Ptr token = make(deadline_ns);
        for (const Ptr & parent : parents) {
            token->links_ = new Link(token, parent, token->links_);
        }
        // Linked first, looked at second: a cancel that comes between is seen by at least one of the two.
        for (const Ptr & parent : parents) {
            if (parent->poll()) {
                token->adopt(parent->shared_verdict());
                break;
            }
        }
        return token;
    }

    // Leaves the parents' lists and lets go of the parents. Those that die with this token have their own
    // links moved here first, so that a chain of any depth is destroyed without recursion.
    ~TokenCore() {
        Link * rest = nullptr;
        take_links(*this, rest);
        while (rest) {
            const std::unique_ptr<Link> link(rest);
            rest = link->sibling;
            if (link->parent.use_count() == 1) {
                take_links(*link->parent, rest);
            }
        }
    }
    TokenCore(const TokenCore &) = delete;
    TokenCore & operator=(const TokenCore &) = delete;

    // True once cancelled or past the deadline. Wait-free; takes no lock, allocates nothing.
    bool poll() noexcept {
        if (phase_.load(std::memory_order_acquire) != kLive) {
            return true;
        }
        return deadline_ns_ != kNever && now_ns() >= deadline_ns_ && (expire(), true);
    }

    // Cancels this token and its descendants. True for the first cancel only. Runs the callbacks on
    // this thread, after every descendant is marked and with no lock held. Allocates nothing.
    bool cancel(Cause cause, std::string reason) noexcept {
        if (poll() || !claim()) {
            return false;
        }
        verdict_->cause = cause;
        verdict_->reason = std::move(reason);
        verdict_->at_ns = now_ns();
        publish();
        push_down();
        return true;
    }

    // Valid once poll() was true, for as long as the token. Waits out the few instructions between claim
    // and publish.
    const Verdict & verdict() const noexcept { return *shared_verdict(); }

    int64_t deadline_ns() const noexcept { return deadline_ns_; }

    // Blocks until cancelled, or until `until_ns`. True if cancelled.
    bool wait_until(int64_t until_ns) {
        const int64_t wake = std::min(until_ns, deadline_ns_);
        std::unique_lock<std::mutex> lock(mutex_);
        while (!poll()) {
            if (wake == kNever) {
                changed_.wait(lock);
            } else {
                if (now_ns() >= wake) {
                    return poll();
                }
                // At most an hour at a time: a wait without end would overflow some libraries' clocks.
                changed_.wait_for(lock, std::chrono::nanoseconds(std::min(wake - now_ns(), kHour)));
            }
        }
        return true;
    }

    // Registers `fn(arg)` to be run once, by the thread that cancels. Returns its id, or 0 if the token
    // is cancelled already and `fn` will not be run. poll() runs no callbacks: after a deadline
    // somebody calls run_callbacks().
    uint64_t add_callback(CallbackFn fn, void * arg) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (phase_.load(std::memory_order_acquire) != kLive) {
            return 0;
        }
        callbacks_.push_back({++last_callback_, fn, arg});
        return last_callback_;
    }

    // True if the callback was taken out before it was run: then `arg` is the caller's again.
    bool remove_callback(uint64_t id) noexcept {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto it = callbacks_.begin(); it != callbacks_.end(); ++it) {
            if (it->id == id) {
                callbacks_.erase(it);
                return true;
            }
        }
        return false;
    }

    // Wakes the waiters and runs each callback that has not run yet, once.
    void run_callbacks() noexcept {
        std::vector<Callback> due;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            due.swap(callbacks_);
        }
        changed_.notify_all();
        for (const Callback & callback : due) {
            callback.fn(callback.arg);
        }
    }

private:
    static constexpr int64_t kHour = int64_t{3600} * 1'000'000'000;

    enum Phase : uint8_t { kLive = 0, kClaimed, kPublished };

    struct Callback {
        uint64_t id;
        CallbackFn fn;
        void * arg;
    };

    // One edge of the tree: owned by the child, listed by the parent. A child keeps its parents, so that a
    // cancel from above reaches it whoever else has let go of the tokens between; a parent keeps no child.
    struct Link {
        Link(const Ptr & child_, const Ptr & parent_, Link * sibling_)
            : child(child_), raw(child_.get()), parent(parent_), sibling(sibling_) {
            std::lock_guard<std::mutex> lock(parent->children_mutex_);
            next = parent->children_;
            if (next) {
                next->previous = this;
            }
            parent->children_ = this;
        }
        void leave() noexcept {
            std::lock_guard<std::mutex> lock(parent->children_mutex_);
            (previous ? previous->next : parent->children_) = next;
            if (next) {
                next->previous = previous;
            }
        }
        const std::weak_ptr<TokenCore> child;
        TokenCore * const raw;  // valid while the link is in the parent's list
        const Ptr parent;
        Link * sibling;  // the child's next link
        Link * previous = nullptr;
        Link * next = nullptr;
    };

    // Takes `token`, which nobody else holds any more, out of its parents' lists; adds its links to `rest`.
    static void take_links(TokenCore & token, Link *& rest) noexcept {
        while (Link * const link = token.links_) {
            token.links_ = link->sibling;
            link->leave();
            link->sibling = rest;
            rest = link;
        }
    }

    explicit TokenCore(int64_t deadline_ns) : deadline_ns_(deadline_ns), verdict_(std::make_shared<Verdict>()) {}

    bool claim() noexcept {
        uint8_t live = kLive;
        return phase_.compare_exchange_strong(live, kClaimed, std::memory_order_acq_rel);
    }

    void publish() noexcept { phase_.store(kPublished, std::memory_order_release); }

    const std::shared_ptr<Verdict> & shared_verdict() const noexcept {
        while (phase_.load(std::memory_order_acquire) != kPublished) {
            std::this_thread::yield();
        }
        return verdict_;
    }

    // The deadline has passed. Descendants have the same deadline or an earlier one: nothing to push.
    void expire() noexcept {
        if (claim()) {
            verdict_->cause = Cause::Deadline;
            verdict_->at_ns = deadline_ns_;
            publish();
        }
    }

    void adopt(std::shared_ptr<Verdict> verdict) noexcept {
        if (claim()) {
            verdict_ = std::move(verdict);
            publish();
            push_down();
        }
    }

    // Marks every descendant, breadth first, through a queue that is threaded through the tokens
    // themselves; then wakes waiters and runs callbacks, once all work that is cancelled can see it.
    void push_down() noexcept {
        TokenCore * last = this;
        held_ = shared_from_this();
        for (TokenCore * token = this; token; token = token->queued_) {
            std::lock_guard<std::mutex> lock(token->children_mutex_);
            for (Link * link = token->children_; link; link = link->next) {
                // Claimed first, held second: what is held here is released below, never under the lock.
                // poll() lets a deadline that has passed already come first.
                if (link->raw->poll() || !link->raw->claim()) {
                    continue;
                }
                if (Ptr child = link->child.lock()) {  // else its destructor waits for the lock
                    child->verdict_ = verdict_;
                    child->publish();
                    last->queued_ = child.get();
                    last = child.get();
                    last->held_ = std::move(child);
                }
            }
        }
        for (TokenCore * token = this; token;) {
            const Ptr held = std::move(token->held_);
            token = held->queued_;
            held->run_callbacks();
        }
    }

    std::atomic<uint8_t> phase_{kLive};
    const int64_t deadline_ns_;
    Link * links_ = nullptr;  // to the parents; owned, and touched by derive() and destructors only

    std::mutex children_mutex_;  // children_; under it no other lock is taken and no token released
    Link * children_ = nullptr;

    std::shared_ptr<Verdict> verdict_;  // written by the thread that claimed the token; shared down the tree
    Ptr held_;                          // keeps a queued token alive during push_down()
    TokenCore * queued_ = nullptr;      // the next token in push_down()'s queue

    std::mutex mutex_;  // callbacks_ and changed_; never held while a callback runs
    std::condition_variable changed_;
    std::vector<Callback> callbacks_;
    uint64_t last_callback_ = 0;
};

}  // namespace llamacancel

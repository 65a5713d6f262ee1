// One native call under its tokens, and the slot through which llama.cpp asks whether to go on.
//
// A slot lives as long as its context and is registered once as the abort callback's data. Each call
// arms it with its own Call and disarms it on the way out, so a cancel can reach no other call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "cancel/token.hpp"

namespace llamacancel {

// What a call does once some of its rows are cancelled: it goes on for the others, or it stops where that costs them
// nothing.
enum class WhenShared : uint8_t { Finish, Stop };

// Asked on the calling thread at most every `kHookInterval`; true stops the call. Used for Ctrl-C.
using InterruptHook = bool (*)(void *);
constexpr int64_t kHookInterval = 50'000'000;

class alignas(64) Call {
public:
    // The token that speaks for some rows of the batch: all of them, where the rows belong to several.
    struct Watch {
        TokenCore::Ptr token;
        std::vector<TokenCore::Ptr> also = {};

        bool cancelled() const noexcept {
            if (!token->poll()) {
                return false;
            }
            for (const TokenCore::Ptr & other : also) {
                if (!other->poll()) {
                    return false;
                }
            }
            return true;
        }

        // The verdict with which the rows were cancelled; nullptr if they are not.
        const Verdict * last_verdict() const noexcept {
            if (!cancelled()) {
                return nullptr;
            }
            const Verdict * last = &token->verdict();
            for (const TokenCore::Ptr & other : also) {
                last = other->verdict().at_ns > last->at_ns ? &other->verdict() : last;
            }
            return last;
        }
    };

    Call() = default;

    // One token for the whole call, or none.
    explicit Call(TokenCore::Ptr token) {
        if (token) {
            only_ = token.get();
            watches_.push_back({std::move(token), {}});
        }
    }

    // A token for each group of rows. `every_row`: there is none that belongs to no group, which is never cancelled.
    // `keeps`: what is completed stays, so that those who stay lose nothing where a ubatch ends. Where nothing of it
    // stays, any place is as good, and a call that stops does so at once.
    Call(std::vector<Watch> watches, bool every_row, WhenShared when, bool keeps)
        : every_row_(every_row),
          needs_(when == WhenShared::Stop ? Needs::Any : Needs::All),
          needs_inside_(keeps ? Needs::All : needs_),
          watches_(std::move(watches)) {}

    Call(Call &&) = default;
    Call & operator=(Call &&) = default;

    void set_interrupt(InterruptHook hook, void * arg) noexcept {
        hook_ = hook;
        hook_arg_ = arg;
        next_hook_ns_ = now_ns() + kHookInterval;
    }

    // True once the call is to stop, and from then on. Called on the calling thread only, without the GIL.
    bool should_stop() noexcept {
        if (!stopped_) {
            stopped_ = (only_ ? only_->poll() : cancelled(needs_)) || (hook_ && interrupted());
        }
        return stopped_;
    }

    // A ubatch begins. Once all of `tokens` are cancelled nobody wants it, and it stops, whether the call does or not;
    // with no tokens it stops with the call alone. They are the caller's, until the next ubatch begins.
    void begin_ubatch(std::vector<TokenCore *> tokens) noexcept {
        ubatch_ = std::move(tokens);
        stopped_inside_ = stopped_;
    }

    // True once the ubatch that is being computed is to stop, and from then on. Called as should_stop(), in its graph.
    bool should_stop_inside() noexcept {
        if (!stopped_inside_) {
            // All rows of a call are cancelled no sooner than those of its ubatch: one of the two is looked at.
            const bool alone = ubatch_.empty() || needs_inside_ == Needs::Any;
            stopped_ = (only_ ? only_->poll() : alone && cancelled(needs_inside_)) || (hook_ && interrupted());
            stopped_inside_ = stopped_ || (!ubatch_.empty() && unwanted());
        }
        return stopped_inside_;
    }

    const bool & stopped() const noexcept { return stopped_; }
    const bool & stopped_inside() const noexcept { return stopped_inside_; }
    bool stopped_by_interrupt() const noexcept { return interrupted_; }
    int64_t interrupted_at_ns() const noexcept { return interrupted_at_ns_; }
    const std::vector<Watch> & watches() const noexcept { return watches_; }

    // The verdict that stopped the call: the first, or the one with which all rows were cancelled. nullptr if none did.
    const Verdict * verdict() const noexcept {
        if (!cancelled(needs_)) {
            return nullptr;
        }
        const Verdict * stopping = nullptr;
        for (const Watch & watch : watches_) {
            const Verdict * const last = watch.last_verdict();
            if (last &&
                (!stopping || (needs_ == Needs::Any ? last->at_ns < stopping->at_ns : last->at_ns > stopping->at_ns))) {
                stopping = last;
            }
        }
        return stopping;
    }

private:
    enum class Needs : uint8_t { Any, All };  // groups of rows that are cancelled before something stops

    bool cancelled(Needs needs) const noexcept {
        const auto gone = [](const Watch & watch) { return watch.cancelled(); };
        return needs == Needs::Any
                   ? std::any_of(watches_.begin(), watches_.end(), gone)
                   : every_row_ && !watches_.empty() && std::all_of(watches_.begin(), watches_.end(), gone);
    }

    bool unwanted() const noexcept {
        return std::all_of(ubatch_.begin(), ubatch_.end(), [](TokenCore * token) { return token->poll(); });
    }

    bool interrupted() noexcept {
        if (coarse_now_ns() >= next_hook_ns_) {
            interrupted_ = hook_(hook_arg_);
            interrupted_at_ns_ = now_ns();
            next_hook_ns_ = interrupted_at_ns_ + kHookInterval;
        }
        return interrupted_;
    }

    // What a poll reads comes first: the graph has pushed all of it out of the cache.
    bool stopped_ = false;
    bool interrupted_ = false;
    bool stopped_inside_ = false;
    bool every_row_ = true;
    Needs needs_ = Needs::All;
    Needs needs_inside_ = Needs::All;
    TokenCore * only_ = nullptr;  // the token, where the call has a single one
    InterruptHook hook_ = nullptr;
    int64_t next_hook_ns_ = kNever;
    std::vector<TokenCore *> ubatch_;  // who may want the ubatch that is being computed
    void * hook_arg_ = nullptr;
    int64_t interrupted_at_ns_ = 0;  // when the hook last returned
    std::vector<Watch> watches_;
};

class CallSlot {
public:
    CallSlot() = default;
    CallSlot(const CallSlot &) = delete;
    CallSlot & operator=(const CallSlot &) = delete;

    // Arms the slot for the life of this object. Calls of one context do not overlap.
    class Armed {
    public:
        Armed(CallSlot & slot, Call & call) noexcept : slot_(slot) {
            slot_.call_.store(&call, std::memory_order_release);
        }
        ~Armed() { slot_.call_.store(nullptr, std::memory_order_release); }
        Armed(const Armed &) = delete;
        Armed & operator=(const Armed &) = delete;

    private:
        CallSlot & slot_;
    };

    // The abort callback: true stops the graph. `data` is the slot.
    static bool trampoline(void * data) noexcept {
        Call * const call = static_cast<CallSlot *>(data)->call_.load(std::memory_order_acquire);
        return call && call->should_stop_inside();
    }

private:
    std::atomic<Call *> call_{nullptr};
};

}  // namespace llamacancel

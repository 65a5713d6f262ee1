#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cancel/call.hpp"
#include "check.hpp"
#include "fake_clock.hpp"

using namespace llamacancel;
using Ptr = TokenCore::Ptr;

// Four tokens, each of which speaks for some rows.
struct Rows {
    std::vector<Ptr> tokens;
    std::vector<Call::Watch> watches;
    Rows() {
        for (int i = 0; i < 4; ++i) {
            tokens.push_back(TokenCore::make());
            watches.push_back({tokens.back()});
        }
    }
    void cancel(int i) { tokens[i]->cancel(Cause::Client, std::to_string(i)); }
};

static bool answer(void * data) noexcept {
    auto & [asked, result] = *static_cast<std::pair<int, bool> *>(data);
    ++asked;
    return result;
}

TEST("a call without tokens goes on") {
    Call call;
    CHECK(!call.should_stop());
    Call none{Ptr()};
    CHECK(!none.should_stop());
    CHECK(none.verdict() == nullptr);
    Call empty({}, true, WhenShared::Finish, false);
    CHECK(!empty.should_stop());
}

TEST("a call stops when its token is cancelled") {
    const Ptr token = TokenCore::make();
    Call call(token);
    CHECK(!call.should_stop());
    CHECK(!call.stopped());
    token->cancel(Cause::Client, "gone");
    CHECK(call.should_stop());
    CHECK(call.stopped());
    CHECK(!call.stopped_by_interrupt());
    CHECK(call.verdict() == &token->verdict());
}

TEST("a call given a cancelled token stops before it starts") {
    const Ptr token = TokenCore::make();
    token->cancel(Cause::Client, "");
    CHECK(Call(token).should_stop());
}

TEST("a call stops at its token's deadline") {
    const Ptr token = TokenCore::make(fake_time + 100);
    Call call(token);
    CHECK(!call.should_stop());
    advance(100);
    CHECK(call.should_stop());
    CHECK(call.verdict()->cause == Cause::Deadline);
}

TEST("finish: the call stops with the last of its rows") {
    Rows rows;
    Call call(rows.watches, true, WhenShared::Finish, false);
    for (int i = 3; i > 0; --i) {
        rows.cancel(i);
        CHECK(!call.should_stop());
    }
    rows.cancel(0);
    CHECK(call.should_stop());
}

TEST("finish: rows without a token keep the call going") {
    Rows rows;
    Call call(rows.watches, false, WhenShared::Finish, false);
    for (int i = 0; i < 4; ++i) {
        rows.cancel(i);
    }
    CHECK(!call.should_stop());
}

TEST("stop: the call stops with the first row, and at once if it keeps nothing") {
    Rows rows;
    Call call(rows.watches, false, WhenShared::Stop, false);
    call.begin_ubatch({});
    CHECK(!call.should_stop_inside());
    rows.cancel(0);
    CHECK(call.should_stop_inside());
    CHECK(call.stopped());
}

TEST("stop: in a call that keeps, what some rows still want stops between two ubatches only, and all of it at once") {
    Rows rows;
    Call call(rows.watches, true, WhenShared::Stop, true);
    call.begin_ubatch({});
    for (int i = 0; i < 3; ++i) {
        rows.cancel(i);
        CHECK(!call.should_stop_inside());
    }
    rows.cancel(3);
    CHECK(call.should_stop_inside());
    CHECK(call.stopped());
    Rows others;
    Call between(others.watches, true, WhenShared::Stop, true);
    others.cancel(2);
    between.begin_ubatch({});
    CHECK(!between.should_stop_inside());
    CHECK(between.should_stop());
    CHECK(between.verdict()->reason == "2");
}

TEST("a ubatch stops once nobody wants it, and the call goes on") {
    Rows rows;
    Call call(rows.watches, true, WhenShared::Finish, true);
    call.begin_ubatch({rows.tokens[1].get(), rows.tokens[2].get()});
    rows.cancel(1);
    CHECK(!call.should_stop_inside());
    rows.cancel(2);
    CHECK(call.should_stop_inside());
    CHECK(call.stopped_inside());
    CHECK(!call.stopped());
    CHECK(!call.should_stop());
    call.begin_ubatch({rows.tokens[0].get(), rows.tokens[2].get()});
    CHECK(!call.stopped_inside());
    CHECK(!call.should_stop_inside());
    call.begin_ubatch({});
    rows.cancel(0);
    CHECK(!call.should_stop_inside());
    rows.cancel(3);
    CHECK(call.should_stop_inside());
    CHECK(call.stopped());
}

TEST("an interrupt stops a ubatch and with it the call") {
    std::pair<int, bool> hook{0, true};
    Rows rows;
    Call call(rows.watches, true, WhenShared::Stop, true);
    call.set_interrupt(answer, &hook);
    call.begin_ubatch({rows.tokens[0].get()});
    CHECK(!call.should_stop_inside());
    advance(kHookInterval);
    CHECK(call.should_stop_inside());
    CHECK(call.stopped());
    CHECK(call.stopped_by_interrupt());
}

TEST("a call's verdict is the first, or the one that left nobody, whatever their order in the list") {
    Rows rows;
    Call any(rows.watches, true, WhenShared::Stop, true), all(rows.watches, true, WhenShared::Finish, true);
    for (int i : {2, 3, 0, 1}) {
        CHECK(all.verdict() == nullptr);
        advance(1);
        rows.cancel(i);
    }
    CHECK(any.verdict()->reason == "2");
    CHECK(all.verdict()->reason == "1");
}

TEST("rows of several tokens are cancelled with the last of them") {
    Rows rows;
    Call call({{rows.tokens[0], {rows.tokens[1], rows.tokens[2]}}}, true, WhenShared::Finish, true);
    for (int i : {1, 2, 0}) {
        CHECK(call.verdict() == nullptr);
        advance(1);
        rows.cancel(i);
    }
    CHECK(call.verdict()->reason == "0");
}

TEST("the interrupt hook is asked once an interval") {
    std::pair<int, bool> hook{0, false};
    Call call;
    call.set_interrupt(answer, &hook);
    for (int i = 0; i < 100; ++i) {
        CHECK(!call.should_stop());
    }
    CHECK(hook.first == 0);
    advance(kHookInterval);
    CHECK(!call.should_stop());
    CHECK(!call.should_stop());
    CHECK(hook.first == 1);
    advance(kHookInterval - 1);
    CHECK(!call.should_stop());
    CHECK(hook.first == 1);
    advance(1);
    CHECK(!call.should_stop());
    CHECK(hook.first == 2);
}

TEST("an interrupt stops the call for good, and the hook is asked no more") {
    std::pair<int, bool> hook{0, true};
    const Ptr token = TokenCore::make();
    Call call(token);
    call.set_interrupt(answer, &hook);
    CHECK(!call.should_stop());
    advance(kHookInterval);
    CHECK(call.should_stop());
    CHECK(call.stopped_by_interrupt());
    hook.second = false;
    advance(kHookInterval);
    CHECK(call.should_stop());
    CHECK(hook.first == 1);
    CHECK(!token->poll());  // the token is the caller's; an interrupt does not cancel it
    CHECK(call.verdict() == nullptr);
}

TEST("a call that was stopped asks its tokens no more") {
    const Ptr token = TokenCore::make(fake_time + 10);
    Call call(token);
    advance(10);
    CHECK(call.should_stop());
    const int64_t reads = clock_reads;
    CHECK(call.should_stop());
    CHECK(clock_reads == reads);
}

TEST("a slot without a call says go on") {
    CallSlot slot;
    CHECK(!CallSlot::trampoline(&slot));
    const Ptr token = TokenCore::make();
    token->cancel(Cause::Client, "");
    {
        Call call(token);
        const CallSlot::Armed armed(slot, call);
        CHECK(CallSlot::trampoline(&slot));
    }
    CHECK(!CallSlot::trampoline(&slot));
}

TEST("the token of an earlier call cannot stop the next") {
    CallSlot slot;
    const Ptr first = TokenCore::make();
    const Ptr second = TokenCore::make();
    {
        Call call(first);
        const CallSlot::Armed armed(slot, call);
        CHECK(!CallSlot::trampoline(&slot));
    }
    first->cancel(Cause::Client, "late");
    {
        Call call(second);
        const CallSlot::Armed armed(slot, call);
        CHECK(!CallSlot::trampoline(&slot));
        second->cancel(Cause::Client, "its own");
        CHECK(CallSlot::trampoline(&slot));
    }
    Call unguarded;
    const CallSlot::Armed armed(slot, unguarded);
    CHECK(!CallSlot::trampoline(&slot));
}

TEST("calls end by their own tokens only while others cancel") {
    CallSlot slot;
    for (int round = 0; round < 300; ++round) {
        const Ptr stale = TokenCore::make();
        const Ptr current = TokenCore::make();
        const bool stop = round % 2;
        {
            Call call(stale);
            const CallSlot::Armed armed(slot, call);
            CallSlot::trampoline(&slot);
        }
        std::thread canceller([&] {
            stale->cancel(Cause::Client, "stale");
            if (stop) {
                current->cancel(Cause::Client, "current");
            }
        });
        Call call(current);
        {
            const CallSlot::Armed armed(slot, call);
            for (int poll = 0; poll < 200 || (stop && !call.stopped()); ++poll) {
                CallSlot::trampoline(&slot);
            }
        }
        canceller.join();
        CHECK(call.stopped() == stop);
        CHECK(!stop || call.verdict()->reason == "current");
    }
}

int main(int argc, char ** argv) { return check::run(argc, argv); }

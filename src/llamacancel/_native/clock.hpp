// The steady clock that tokens and calls read, in nanoseconds.
//
// On Linux this is CLOCK_MONOTONIC, the clock of Python's time.monotonic(), so that a deadline taken
// there can be compared here. Tests that define LLAMACANCEL_FAKE_CLOCK bring their own `fake_now()`.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>

namespace llamacancel {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

#ifdef LLAMACANCEL_FAKE_CLOCK
int64_t fake_now() noexcept;
inline int64_t now_ns() noexcept { return fake_now(); }
#else
inline int64_t now_ns() noexcept {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}
#endif

}  // namespace llamacancel

// The steady clock that tokens and calls read, in nanoseconds.
//
// On Linux this is CLOCK_MONOTONIC, the clock of Python's time.monotonic(), so that a deadline taken
// there can be compared here. Tests that define LLAMACANCEL_FAKE_CLOCK bring their own `fake_now()`.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>

#ifdef __linux__
#include <time.h>
#endif

namespace llamacancel {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

#ifdef LLAMACANCEL_FAKE_CLOCK
int64_t fake_now() noexcept;
inline int64_t now_ns() noexcept { return fake_now(); }
inline int64_t coarse_now_ns() noexcept { return fake_now(); }
#else
inline int64_t now_ns() noexcept {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// The same clock as of the kernel's last tick, some milliseconds ago: read in a quarter of the time.
inline int64_t coarse_now_ns() noexcept {
#ifdef __linux__
    timespec tick;
    if (clock_gettime(CLOCK_MONOTONIC_COARSE, &tick) == 0) {
        return int64_t{tick.tv_sec} * 1'000'000'000 + tick.tv_nsec;
    }
#endif
    return now_ns();
}
#endif

}  // namespace llamacancel

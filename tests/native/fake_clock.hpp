// The clock of these tests: it stands still until a test moves it. Include in one source per program.
#pragma once

#include <atomic>
#include <cstdint>

#include "cancel/clock.hpp"

inline std::atomic<int64_t> fake_time{1'000};
inline std::atomic<int64_t> clock_reads{0};

namespace llamacancel {
inline int64_t fake_now() noexcept {
    clock_reads.fetch_add(1, std::memory_order_relaxed);
    return fake_time.load(std::memory_order_relaxed);
}
}  // namespace llamacancel

inline void advance(int64_t ns) { fake_time += ns; }

// A copy that leaves the CPU's cache to the work that comes next.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace llamacancel {

// memcpy() for what is hardly ever read again: written around the cache, which stays with the graph that comes next.
inline void copy_past_cache(uint8_t * to, const uint8_t * from, size_t size) {
#ifdef __SSE2__
    constexpr size_t kLine = 64;
    const size_t head = std::min(size, -reinterpret_cast<uintptr_t>(to) % kLine);
    std::memcpy(to, from, head);
    size_t at = head;
    for (; at + kLine <= size; at += kLine) {
        for (size_t i = at; i < at + kLine; i += sizeof(__m128i)) {
            _mm_stream_si128(reinterpret_cast<__m128i *>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i)));
        }
    }
    std::memcpy(to + at, from + at, size - at);
    _mm_sfence();  // such writes become visible to other threads in no order of themselves
#else
    std::memcpy(to, from, size);
#endif
}

}  // namespace llamacancel

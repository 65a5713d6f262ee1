#include "allocations.hpp"

#include <cstdlib>
#include <new>

std::atomic<long> allocated{0};

void * operator new(std::size_t size) {
    if (void * memory = std::malloc(size ? size : 1)) {
        allocated.fetch_add(1, std::memory_order_relaxed);
        return memory;
    }
    throw std::bad_alloc();
}

void operator delete(void * memory) noexcept {
    if (memory) {
        allocated.fetch_sub(1, std::memory_order_relaxed);
        std::free(memory);
    }
}

void operator delete(void * memory, std::size_t) noexcept { operator delete(memory); }

// Clearing a context's caches, and copying from one to another, at the cost of the cells that were ever used.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "memory/memory.hpp"

namespace llamacancel {

// How far a context's caches may hold something, in cells that are in use or were: beyond lie zeros. What an empty cell
// holds is masked, but 0 times NaN is NaN, so that a cache is empty to the bit only where it is zero.
class Written {
public:
    explicit Written(const MemoryParts & memory);

    // To be called before cells that are in use may be freed. `ahead`: cells that are about to be written.
    void look(uint32_t ahead = 0);

    // Anything may have been written.
    void everywhere() noexcept;

    // Forgets all sequences, then zeroes what was written. Once `stop` says so the rest is left to the next time.
    void clear(const std::function<bool()> & stop);

private:
    const MemoryParts & memory_;
    std::vector<std::vector<uint32_t>> ends_;  // by cache and stream
};

// Gives `to` what `from` holds, each in a cache of its own; `to` holds nothing. Copies the cells that are held, and
// asks `poll` between them, which may throw: then `to` is to be removed.
void copy_streams(const MemoryParts & memory, llama_seq_id from, llama_seq_id to, const std::function<void()> & poll);

}  // namespace llamacancel

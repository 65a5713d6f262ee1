// A context's memory, taken apart into the classes that llama.cpp makes it of.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "llama-memory.h"
#include "memory/cells.hpp"

class llama_kv_cache;
class llama_memory_recurrent;

namespace llamacancel {

enum class MemoryKind : uint8_t { None, Attention, SlidingWindow, Recurrent, Hybrid, HybridSlidingWindow, Other };

const char * name_of(MemoryKind kind) noexcept;

// How llama.cpp cuts a batch into ubatches for this memory (its init_batch()).
enum class Split : uint8_t { Simple, Equal, EqualSequential, BySequence };

// A context's memory, taken apart. `caches` and `recurrent` are views that live as long as the context.
struct MemoryParts {
    explicit MemoryParts(llama_memory_i * memory, bool output_all);

    llama_memory_i * memory;  // null for an encoder, and for what computes all rows anew
    MemoryKind kind = MemoryKind::None;
    Split split = Split::Simple;
    std::vector<llama_kv_cache *> caches;
    llama_memory_recurrent * recurrent = nullptr;

    // False for memory classes that we cannot restore: what they held before a cancelled call is lost.
    bool restorable() const noexcept { return kind != MemoryKind::Other; }

    // True if a window slides over the sequences and drops what has left it.
    bool forgets() const noexcept {
        return kind == MemoryKind::SlidingWindow || kind == MemoryKind::HybridSlidingWindow;
    }

    llama_pos pos_min(llama_seq_id seq) const { return memory ? memory->seq_pos_min(seq) : -1; }
    llama_pos pos_max(llama_seq_id seq) const { return memory ? memory->seq_pos_max(seq) : -1; }
};

// Runs `change`, which forgets sequences, and zeroes the cells that it has emptied.
void forget_by(const MemoryParts & memory, const std::function<void()> & change);

// Marks the first `n_cells` of an empty cache as positions of sequence 0, as if they had been decoded: for measuring.
void pretend_to_hold(llama_kv_cache & cache, uint32_t n_cells);

// The K and V of a cache's cells in one stream.
CellData data_of(llama_kv_cache & cache, uint32_t stream);

}  // namespace llamacancel

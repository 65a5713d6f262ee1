#include "memory/memory.hpp"

#include <algorithm>
#include <utility>

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "memory/fields.hpp"

namespace llamacancel {

const char * name_of(MemoryKind kind) noexcept {
    switch (kind) {
        case MemoryKind::None:
            return "none";
        case MemoryKind::Attention:
            return "attention";
        case MemoryKind::SlidingWindow:
            return "sliding_window";
        case MemoryKind::Recurrent:
            return "recurrent";
        case MemoryKind::Hybrid:
            return "hybrid";
        case MemoryKind::HybridSlidingWindow:
            return "hybrid_sliding_window";
        case MemoryKind::Other:
            return "other";
    }
    return "other";
}

void pretend_to_hold(llama_kv_cache & cache, uint32_t n_cells) {
    llama_kv_cells & cells = cells_of(cache).at(0);
    for (uint32_t i = 0; i < std::min(n_cells, cells.size()); ++i) {
        cells.pos_set(i, i);
        cells.seq_add(i, 0);
    }
}

void forget_by(const MemoryParts & memory, const std::function<void()> & change) {
    std::vector<std::vector<uint32_t>> held;  // by cache and stream
    for (llama_kv_cache * cache : memory.caches) {
        for (const llama_kv_cells & cells : cells_of(*cache)) {
            held.emplace_back();
            for (uint32_t idx = cells.used_min(); idx < cells.used_max_p1(); ++idx) {
                if (!cells.is_empty(idx)) {
                    held.back().push_back(idx);
                }
            }
        }
    }
    change();
    auto of_stream = held.begin();
    for (llama_kv_cache * cache : memory.caches) {
        for (uint32_t stream = 0; stream < cache->get_n_stream(); ++stream, ++of_stream) {
            const llama_kv_cells & cells = cells_of(*cache)[stream];
            of_stream->erase(std::remove_if(of_stream->begin(), of_stream->end(),
                                            [&](uint32_t idx) { return !cells.is_empty(idx); }),
                             of_stream->end());
            if (!of_stream->empty()) {
                data_of(*cache, stream).clear(*of_stream);
            }
        }
    }
}

MemoryParts::MemoryParts(llama_memory_i * memory, bool output_all) : memory(memory) {
    if (!memory) {
        return;
    }
    kind = MemoryKind::Other;
    if (auto * cache = dynamic_cast<llama_kv_cache *>(memory)) {
        kind = MemoryKind::Attention;
        caches = {cache};
    } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        kind = MemoryKind::SlidingWindow;
        caches = {iswa->get_base(), iswa->get_swa()};
    } else if (auto * state = dynamic_cast<llama_memory_recurrent *>(memory)) {
        kind = MemoryKind::Recurrent;
        recurrent = state;
    } else if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        // has an index of its own beside the two
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        kind = MemoryKind::Hybrid;
        caches = {hybrid->get_mem_attn()};
        recurrent = hybrid->get_mem_recr();
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        kind = MemoryKind::HybridSlidingWindow;
        caches = {hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa()};
        recurrent = hybrid->get_mem_recr();
    }
    if (std::any_of(caches.begin(), caches.end(), [](llama_kv_cache * cache) { return shares_cells(*cache); })) {
        kind = MemoryKind::Other;
    }
    if (kind == MemoryKind::Other) {
        caches.clear();
        recurrent = nullptr;
        return;
    }
    const bool unified = caches.empty() || caches[0]->get_n_stream() == 1;
    if (recurrent) {
        split = output_all                                  ? Split::BySequence
                : kind == MemoryKind::Recurrent || !unified ? Split::EqualSequential
                                                            : Split::Equal;
    } else if (!unified) {
        split = Split::EqualSequential;
    }
}

CellData data_of(llama_kv_cache & cache, uint32_t stream) {
    std::vector<ggml_tensor *> k, v;
    for (const auto & layer : layers_of(cache)) {
        if (layer.k) {
            k.push_back(layer.k_stream[stream]);
        }
        if (layer.v) {
            v.push_back(layer.v_stream[stream]);
        }
    }
    return CellData(std::move(k), std::move(v), is_transposed(cache));
}

}  // namespace llamacancel

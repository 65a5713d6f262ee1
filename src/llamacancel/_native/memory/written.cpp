#include "memory/written.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "memory/fields.hpp"

namespace llamacancel {

namespace {

constexpr size_t kPiece = 4 << 20;  // bytes between two looks

bool is_host(const ggml_tensor * tensor) {
    return ggml_backend_buffer_is_host((tensor->view_src ? tensor->view_src : tensor)->buffer);
}

// Visits the bytes of cells first to last of a stream's tensor, as offsets and sizes.
template <typename Visit>
void for_each_part(const ggml_tensor * tensor, bool transposed, uint32_t first, uint32_t last, Visit && visit) {
    if (!transposed) {
        for (size_t at = first * tensor->nb[1], end = last * tensor->nb[1]; at < end; at += kPiece) {
            visit(at, std::min(kPiece, end - at));
        }
        return;
    }
    const size_t size = ggml_element_size(tensor), n_cells = tensor->ne[1];
    for (int64_t row = 0; row < tensor->ne[0]; ++row) {
        visit((row * n_cells + first) * size, (last - first) * size);
    }
}

}  // namespace

Written::Written(const MemoryParts & memory) : memory_(memory) {
    for (llama_kv_cache * cache : memory.caches) {
        ends_.emplace_back(cache->get_n_stream(), 0);
    }
}

void Written::look(uint32_t ahead) {
    for (size_t i = 0; i < ends_.size(); ++i) {
        for (uint32_t stream = 0; stream < ends_[i].size(); ++stream) {
            const llama_kv_cells & cells = cells_of(*memory_.caches[i])[stream];
            uint32_t & end = ends_[i][stream];
            end = std::min(std::max(end, cells.used_max_p1()) + ahead, cells.size());
        }
    }
}

void Written::everywhere() noexcept {
    for (size_t i = 0; i < ends_.size(); ++i) {
        std::fill(ends_[i].begin(), ends_[i].end(), memory_.caches[i]->get_size());
    }
}

void Written::clear(const std::function<bool()> & stop) {
    if (!memory_.restorable()) {
        return memory_.memory->clear(true);
    }
    look();
    if (memory_.recurrent) {
        memory_.recurrent->clear(true);
    }
    for (llama_kv_cache * cache : memory_.caches) {
        cache->clear(false);
    }
    for (size_t i = 0; i < ends_.size(); ++i) {
        llama_kv_cache & cache = *memory_.caches[i];
        if (std::all_of(ends_[i].begin(), ends_[i].end(), [](uint32_t end) { return end == 0; })) {
            continue;
        }
        const auto & layers = layers_of(cache);
        if (!std::all_of(layers.begin(), layers.end(), [](const auto & layer) { return is_host(layer.k); })) {
            if (stop()) {
                return;
            }
            cache.clear(true);  // a device does that faster than it is told of parts
            std::fill(ends_[i].begin(), ends_[i].end(), 0);
            continue;
        }
        for (uint32_t stream = 0; stream < ends_[i].size(); ++stream) {
            size_t done = kPiece;
            for (const auto & layer : layers) {
                for (const auto & [tensor, transposed] : {std::pair{layer.k_stream[stream], false},
                                                          std::pair{layer.v_stream[stream], is_transposed(cache)}}) {
                    if (!tensor) {
                        continue;
                    }
                    if (done >= kPiece && stop()) {
                        return;
                    }
                    done = done >= kPiece ? 0 : done;
                    for_each_part(tensor, transposed, 0, ends_[i][stream], [&](size_t offset, size_t size) {
                        std::memset(static_cast<uint8_t *>(tensor->data) + offset, 0, size);
                        done += size;
                    });
                }
            }
            ends_[i][stream] = 0;
        }
    }
}

void copy_streams(const MemoryParts & memory, llama_seq_id from, llama_seq_id to, const std::function<void()> & poll) {
    memory.memory->seq_cp(from, to, -1, -1);
    for (llama_kv_cache * cache : memory.caches) {
        drop_pending_copies(*cache);  // llama.cpp would copy the whole of both
    }
    for (llama_kv_cache * cache : memory.caches) {
        const uint32_t source = cache->get_stream(from), target = cache->get_stream(to);
        const llama_kv_cells & cells = cells_of(*cache)[source];
        std::vector<std::pair<uint32_t, uint32_t>> stretches;  // cells that follow one another, from and to
        for (uint32_t cell = cells.used_min(); cell < cells.used_max_p1(); ++cell) {
            if (!cells.seq_has(cell, from)) {
                continue;
            }
            if (stretches.empty() || stretches.back().second != cell) {
                stretches.push_back({cell, cell});
            }
            stretches.back().second = cell + 1;
        }
        const auto copy = [&](ggml_tensor * src, ggml_tensor * dst, bool transposed) {
            if (!src) {
                return;
            }
            if (!is_host(src)) {  // on the device itself, at once
                poll();
                return ggml_backend_tensor_copy(src, dst);
            }
            size_t done = kPiece;
            for (const auto & [first, last] : stretches) {
                for_each_part(src, transposed, first, last, [&](size_t offset, size_t size) {
                    if (done >= kPiece) {
                        poll();
                        done = 0;
                    }
                    std::memcpy(static_cast<uint8_t *>(dst->data) + offset,
                                static_cast<const uint8_t *>(src->data) + offset, size);
                    done += size;
                });
            }
        };
        for (const auto & layer : layers_of(*cache)) {
            copy(layer.k_stream[source], layer.k_stream[target], false);
            copy(layer.v_stream[source], layer.v_stream[target], is_transposed(*cache));
        }
    }
}

}  // namespace llamacancel

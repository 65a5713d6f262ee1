// The undo record of recurrent states: the bookkeeping, and the states of the cells that a ubatch computes or moves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-memory-recurrent.h"
#include "memory/copy.hpp"
#include "memory/undo.hpp"
#include "process/team.hpp"

namespace llamacancel {

inline constexpr size_t kLarge = 128 * 1024;  // bytes of a state that is copied by all threads, and around the cache

template <typename Tensors, typename Visit>
void for_each_row(const Tensors & tensors, uint32_t n_rows, uint32_t row, Visit && visit) {
    for (ggml_tensor * tensor : tensors) {
        if (tensor) {
            const size_t size = ggml_nbytes(tensor) / n_rows;
            visit(tensor, row * size, size);
        }
    }
}

struct Undo::Recurrent {
    explicit Recurrent(llama_memory_recurrent & memory) : memory(memory), n_rows(memory.size * (1 + memory.n_rs_seq)) {
        bool is_host = true;
        visit(0, [&](ggml_tensor * tensor, size_t, size_t size) {
            cell_bytes += size;
            is_host = is_host && ggml_backend_buffer_is_host(tensor->buffer);
        });
        is_large = is_host && cell_bytes >= kLarge;
    }

    // The bookkeeping, which is a few words for each sequence. llama.cpp's own prepare() copies it, too.
    struct Books {
        std::vector<llama_memory_recurrent::mem_cell> cells;
        std::vector<uint32_t> rs_idx;
        uint32_t used, head, n;
        int32_t rs_z;
    };

    // From or to the memory, or between books. Takes no memory that is not there already.
    template <typename From, typename To>
    static void assign(const From & from, To & to) {
        to.cells = from.cells;
        to.rs_idx = from.rs_idx;
        to.used = from.used;
        to.head = from.head;
        to.n = from.n;
        to.rs_z = from.rs_z;
    }

    // The place of the copies stays, as large as the states that one call has touched: a call for a single token takes
    // no memory. All of it goes with `all`.
    void forget(bool all) {
        rows.clear();
        if (all) {
            std::vector<uint8_t>().swap(data);
        }
    }

    void begin() {
        assign(memory, books);
        rows.clear();
        at_begin = true;
    }

    bool save(const llama_ubatch & ubatch, int n_threads) {
        if (!at_begin) {
            assign(memory, latest);
        }
        const bool found = memory.find_slot(ubatch);
        const uint32_t first = memory.head;
        const uint32_t last = memory.head + memory.n;
        zero = memory.rs_z;
        assign(at_begin ? books : latest, memory);
        at_begin = false;
        if (!found) {
            return false;
        }
        // The graph writes the states of all cells from the first to the last, those that it moves included.
        for (uint32_t cell = first; cell < last; ++cell) {
            if (!books.cells[cell].is_empty() && std::find(rows.begin(), rows.end(), cell) == rows.end()) {
                keep(cell, n_threads);
            }
        }
        return true;
    }

    // The graph begins new sequences with a cell that it multiplies by zero. What lay there would leave the signs of
    // its zeros, or NaN.
    void clear_zero() {
        if (zero >= 0) {
            visit(zero, [](ggml_tensor * tensor, size_t offset, size_t size) {
                llama_clear_tensor_data(tensor, offset, size);
            });
        }
    }

    void save_sequence(llama_seq_id seq) {
        if (books.cells[seq].tail >= 0) {
            keep(books.cells[seq].tail, 1);
        }
    }

    void keep(uint32_t cell, int n_threads) {
        // Grows and never shrinks, so that a call for a single token costs one copy and no more.
        if (data.size() < (rows.size() + 1) * cell_bytes) {
            data.resize((rows.size() + 1) * cell_bytes);
        }
        uint8_t * const to = data.data() + rows.size() * cell_bytes;
        rows.push_back(cell);
        const int n = is_large ? n_threads : 1;
        on_team(n, n, [&](int i) { copy_part(cell, to, cell_bytes * i / n, cell_bytes * (i + 1) / n); });
    }

    // Copies the bytes from `begin` to `end` of a cell's state, all tensors' in a row, to their place from `to` on.
    void copy_part(uint32_t cell, uint8_t * to, size_t begin, size_t end) const {
        size_t at = 0;  // where the tensor's part begins
        visit(cell, [&](ggml_tensor * tensor, size_t offset, size_t size) {
            const size_t first = std::max(begin, at), last = std::min(end, at + size);
            if (first < last && is_large) {
                copy_past_cache(to + first, static_cast<uint8_t *>(tensor->data) + offset + first - at, last - first);
            } else if (first < last) {
                ggml_backend_tensor_get(tensor, to + first, offset + first - at, last - first);
            }
            at += size;
        });
    }

    void restore() {
        assign(books, memory);
        for (uint32_t row : rows) {
            copy_back(row, row);
        }
        // In llama.cpp's books an empty cell whose `src` is itself holds zeros, and whoever takes it begins with them.
        // What was undone may have written there; a cell without a `src` is zeroed first.
        for (auto & cell : memory.cells) {
            if (cell.is_empty()) {
                cell.src = -1;
            }
        }
    }

    bool restore_sequence(llama_seq_id seq) {
        const int32_t home = books.cells[seq].tail;
        const bool written = std::find(rows.begin(), rows.end(), static_cast<uint32_t>(home)) != rows.end();
        if (home >= 0 && !written && memory.cells[seq].tail == home) {
            return true;  // none of its rows was computed
        }
        memory.seq_rm(seq, -1, -1);
        if (home < 0) {
            return true;
        }
        const auto & before = books.cells[home];
        uint32_t target = home;
        if (written) {
            target = 0;
            while (target < memory.size && !memory.cells[target].is_empty()) {
                ++target;
            }
            if (target == memory.size) {
                return false;
            }
        } else if (!memory.cells[home].is_empty()) {
            // The state was shared and left in place for the other sequences: share it again.
            for (llama_seq_id other : before.seq_id) {
                if (other != seq && memory.cells[other].tail == home) {
                    memory.seq_cp(other, seq, -1, -1);
                    return true;
                }
            }
            return false;
        }
        auto & cell = memory.cells[target];
        cell.pos = before.pos;
        cell.src = cell.src0 = target;
        cell.seq_id = {seq};
        memory.cells[seq].tail = target;
        memory.used += 1;
        if (written) {
            copy_back(home, target);
        }
        return true;
    }

    void copy_back(uint32_t saved_row, uint32_t to) {
        const size_t at = std::find(rows.begin(), rows.end(), saved_row) - rows.begin();
        const uint8_t * from = data.data() + at * cell_bytes;
        visit(to, [&](ggml_tensor * tensor, size_t offset, size_t size) {
            ggml_backend_tensor_set(tensor, from, offset, size);
            from += size;
        });
    }

    size_t bytes() const noexcept { return rows.size() * cell_bytes; }

    // All tensors' parts of one cell's state, the groups for rollback by n_rs_seq included.
    template <typename Visit>
    void visit(uint32_t cell, Visit && visit) const {
        for (uint32_t row = cell; row < n_rows; row += memory.size) {
            for_each_row(memory.r_l, n_rows, row, visit);
            for_each_row(memory.s_l, n_rows, row, visit);
            for_each_row(memory.p_l, n_rows, row, visit);
        }
    }

    llama_memory_recurrent & memory;
    const uint32_t n_rows;
    Books books;                 // as they were at begin()
    Books latest;                // before the ubatch that is saved
    bool at_begin = false;       // nothing was saved since, so the two are the same
    int32_t zero = -1;           // the cell that the ubatch's graph takes its zeros from
    size_t cell_bytes = 0;       // of one cell's state, over all layers
    bool is_large = false;       // and in memory that the CPU reads
    std::vector<uint32_t> rows;  // cells whose states are in `data`, in this order
    std::vector<uint8_t> data;
};

}  // namespace llamacancel

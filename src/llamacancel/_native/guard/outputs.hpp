// Logits and embeddings of a call's output rows.
//
// As long as they can be, logits stay in llama.cpp's own buffer; what a later ubatch would overwrite
// while its call may still be rolled back is copied first, so that a cancelled call leaves the outputs
// of the one before it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace llamacancel {

struct Outputs {
    static constexpr int32_t kNone = -1;       // no output was asked for
    static constexpr int32_t kCancelled = -2;  // the row was not computed, or rolled back with its sequences

    // Index of an output: the row of the batch, or negative from the last output. kNone or kCancelled if there is none.
    int32_t slot(int32_t i) const noexcept {
        const int32_t n = static_cast<int32_t>(rows.size());
        if (i < 0) {
            return i >= -n ? row_slot[rows[n + i]] : kNone;
        }
        return i < static_cast<int32_t>(row_slot.size()) ? row_slot[i] : kNone;
    }

    const float * logits(int32_t slot) const noexcept {
        const float * base = borrowed ? borrowed : own_logits.empty() ? nullptr : own_logits.data();
        return base ? base + size_t(slot) * n_vocab : nullptr;
    }

    const float * embeddings(int32_t slot) const noexcept {
        return own_embeddings.empty() ? nullptr : own_embeddings.data() + size_t(slot) * n_embd;
    }

    // Copies what still lies in llama.cpp's buffer.
    void own() {
        if (borrowed) {
            own_logits.assign(borrowed, borrowed + size_t(n_slots) * n_vocab);
            borrowed = nullptr;
        }
    }

    void add(int32_t row) {
        row_slot[row] = n_slots++;
        rows.push_back(row);
    }

    // Rows come in the order in which they were computed; indices count in the order of the batch. Those that were
    // cancelled do not count.
    void finish() {
        rows.erase(std::remove_if(rows.begin(), rows.end(), [&](int32_t row) { return row_slot[row] < 0; }),
                   rows.end());
        std::sort(rows.begin(), rows.end());
    }

    std::vector<int32_t> row_slot;  // of each row of the batch: its place among what was computed, or kNone, kCancelled
    std::vector<int32_t> rows;      // that have outputs
    int32_t n_slots = 0;            // that were computed
    int32_t n_vocab = 0;
    int32_t n_embd = 0;
    const float * borrowed = nullptr;  // llama.cpp's buffer; valid until it computes outputs again
    std::vector<float> own_logits;
    std::vector<float> own_embeddings;
    std::map<int32_t, std::vector<float>> pooled;  // by sequence id
};

}  // namespace llamacancel

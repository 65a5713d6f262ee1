// How a batch is cut into ubatches: small enough for the latency that was asked for, and always in the
// same way for the same batch, so that the same calls give the same bits.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "memory/memory.hpp"
#include "model/gap.hpp"

namespace llamacancel {

// The rows that decode() was given, as arrays that belong to the caller.
struct BatchView {
    int32_t n_rows = 0;
    const int32_t * token = nullptr;  // [n_rows], or null where embd is given
    const float * embd = nullptr;     // [n_rows, n_embd]
    int32_t n_embd = 0;
    const int32_t * pos = nullptr;         // [n_rows]
    const int32_t * seq_offset = nullptr;  // [n_rows + 1]: row i belongs to seq_id[seq_offset[i] .. seq_offset[i + 1])
    const int32_t * seq_id = nullptr;
    const int8_t * output = nullptr;  // [n_rows]

    const int32_t * seqs_begin(int32_t row) const { return seq_id + seq_offset[row]; }
    const int32_t * seqs_end(int32_t row) const { return seq_id + seq_offset[row + 1]; }
};

// The cut of one context, fixed when it is made.
struct Cut {
    double target = 0;         // seconds from cancel to return that were asked for
    uint32_t n_ubatch = 512;   // most rows in one ubatch
    uint32_t max_outputs = 0;  // most output rows in one ubatch
    bool fixed = false;        // n_ubatch was given: neither attention nor outputs cut it further
    bool on_device = false;    // not on the CPU: graphs are handed over in pieces, and the token is looked at between
    uint32_t n_pieces = 0;     // if not 0, always so many: for tests, as if the CPU were such a device
    GapCost cost;

    // Chooses for a CPU. `limit`: most rows that would ever be worth it.
    static Cut choose(double target, const GapCost & cost, uint32_t limit);
    static Cut exactly(uint32_t n_ubatch);
    static Cut for_device(double target, const GapCost & cost, uint32_t n_ubatch);

    // Most rows of a ubatch that looks at `n_kv` cells.
    uint32_t rows_at(uint32_t n_kv) const;

    // Pieces in which the graph of a ubatch is handed to the device; 0: as a whole.
    uint32_t pieces_at(uint32_t n_rows, uint32_t n_kv) const;

private:
    double budget() const;
};

// One ubatch: rows of the batch, in the order in which llama.cpp will compute them.
struct Ubatch {
    std::vector<int32_t> rows;
    uint32_t n_seqs = 1;  // sequence sets; each has rows.size() / n_seqs rows
    bool last = false;    // nothing is left after it
};

// Cuts a batch, one ubatch at a time: each is one that llama.cpp's own split leaves as it is.
class Cutter {
public:
    Cutter(const BatchView & batch, const Cut & cut, Split split, bool output_all, bool whole_sequences);

    // The next ubatch of the rows that are left and not dropped. False when there is none.
    bool next(Ubatch & ubatch);

    // Leaves out the rows for which `dropped` is true from now on.
    void drop(const std::function<bool(int32_t row)> & dropped);

private:
    bool is_output(int32_t row) const { return output_all_ || batch_.output[row] != 0; }
    uint32_t limit_from(int32_t row) const { return cut_.rows_at(batch_.pos[row] + 1); }
    bool same_set(int32_t a, int32_t b) const;
    bool overlaps(int32_t a, int32_t b) const;
    bool fewer_apart(const std::vector<std::vector<int32_t>> & sets) const;
    void take_in_order(Ubatch & ubatch);
    void take_whole_sequences(Ubatch & ubatch);
    void take_one_sequence(Ubatch & ubatch);
    void take_equal(Ubatch & ubatch, bool sequential);

    const BatchView batch_;
    const Cut & cut_;
    const Split split_;
    const bool output_all_;
    const bool whole_sequences_;
    std::vector<int32_t> left_;  // rows still to do, in the order of the batch
};

}  // namespace llamacancel

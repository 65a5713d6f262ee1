// How far apart a model's looks at its token lie: estimated where that is little, else measured.
#pragma once

#include <atomic>
#include <cstdint>

struct llama_model;

namespace llamacancel {

// How long a decode computes at most between two looks at its token, as a function of what it computes.
struct GapCost {
    double seconds = 0;             // however small the ubatch
    double seconds_per_row = 0;     // and more for each row
    double seconds_per_row_kv = 0;  // for each row and each cell that it looks at
    double seconds_of_one = 0;      // of a single row, on other devices than the CPU: weights are read for it alone
    double seconds_per_output = 0;  // for each row with logits, where a node is the least that can be stopped
};

// Of a CPU whose long kernels look inside (vendor/patches): what is left between two looks is a node that computes each
// element of its rows by itself. It follows from the model's shape, so that the cut never depends on a time.
GapCost estimate_gap_cost(const llama_model & model, int32_t n_threads);

// Runs some tokens through the first layers, a few times for at most 0.1 s each; on other devices than the CPU, which
// do not look inside a graph, through all of them, for at most a second each. `max_positions`: as many as the model
// has, or 0. Once `stop` is set it returns, with no measure.
GapCost measure_gap_cost(llama_model * model, int32_t n_threads, bool on_cpu, int32_t max_positions,
                         const std::atomic<bool> & stop);

}  // namespace llamacancel

#include "model/gap.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cancel/clock.hpp"
#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"
#include "memory/memory.hpp"
#include "process/log.hpp"

namespace llamacancel {

namespace {

// On one thread, of a GELU, the dearest of the nodes that are not looked into: 5.3 ms for 512 rows of 1,408 elements,
// where the others took 0.8 to 3.1 ms (`python -m benchmarks.gaps`).
constexpr double kSecondsPerElement = 8e-9;
constexpr uint32_t kProbeCells = 1024;
constexpr int64_t kPassNs = 100'000'000;  // at most, one pass over the first layers
constexpr int64_t kProbeNs = 60'000'000;  // cheap passes are repeated this long
constexpr int kPasses = 3, kMostPasses = 20;
// On another device than the CPU: at most, one pass, and what one is taken for that was stopped then; passes that take
// longer than a short one are handed over in pieces, so that they can be.
constexpr int64_t kDevicePassNs = 1'000'000'000, kShortNs = 100'000'000;
constexpr int kProbePieces = 64;

// A scratch context whose abort callback notes the longest times between two of its calls.
class Probe {
public:
    Probe(llama_model * model, int32_t n_threads, int32_t most_rows, bool on_cpu, const std::atomic<bool> & stop)
        : limit_ns_(on_cpu ? kPassNs : kDevicePassNs), stop_(stop) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = kProbeCells;
        params.n_batch = params.n_ubatch = most_rows;
        params.n_seq_max = 1;
        params.n_threads = params.n_threads_batch = n_threads;
        params.abort_callback = on_poll;
        params.abort_callback_data = this;
        params.no_perf = true;
        ctx_.reset(llama_init_from_model(model, params));
    }

    // Seconds, for rows that follow `n_past` positions. A machine that is busy with other things adds gaps of
    // its own: what a model does for long it does in every layer and every pass, so the third longest gap of
    // the calmest pass counts. 0 if the model does not decode.
    double longest_gap(int32_t n_rows, uint32_t n_past) {
        if (!ctx_ || stop_ || !pass(n_rows, n_past)) {  // the first one brings the weights into memory
            return 0;
        }
        int64_t calmest = INT64_MAX;
        const int64_t end_ns = now_ns() + kProbeNs;
        for (int i = 0; !stop_ && (i < kPasses || (i < kMostPasses && now_ns() < end_ns)); ++i) {
            pass(n_rows, n_past);
            calmest = std::min(calmest, longest_ns_.back() > 0 ? longest_ns_.back() : longest_ns_.front());
        }
        return calmest * 1e-9;
    }

    // Seconds of a whole pass, on other devices: those of its layers that are on the CPU look at the token there, which
    // says nothing of the rest. What a first pass has to bring (weights, and kernels that a driver compiles) is no
    // part of it.
    double whole_pass(int32_t n_rows, uint32_t n_past) {
        if (!ctx_) {
            return 0;
        }
        in_pieces(true);
        for (int i = 0; i == 0 || (stopped_ && i < kPasses); ++i) {
            if (stop_ || !pass(n_rows, n_past)) {
                return 0;
            }
        }
        in_pieces(pass_ns_ > kShortNs);
        int64_t calmest = pass_ns_;
        const int64_t end_ns = now_ns() + kDevicePassNs / 2;
        for (int i = 0; !stop_ && !stopped_ && i < kPasses && now_ns() < end_ns; ++i) {
            pass(n_rows, n_past);
            calmest = std::min(calmest, pass_ns_);
        }
        return calmest * 1e-9;
    }

    // Whether the last pass was stopped for taking too long.
    bool stopped() const { return stopped_; }

private:
    bool pass(int32_t n_rows, uint32_t n_past) {
        llama_memory_t memory = llama_get_memory(ctx_.get());
        if (memory) {
            llama_memory_clear(memory, false);
            for (llama_kv_cache * cache : MemoryParts(memory, false).caches) {
                pretend_to_hold(*cache, n_past);
            }
        }
        std::vector<llama_token> tokens(n_rows);
        std::iota(tokens.begin(), tokens.end(), 0);
        std::vector<llama_pos> pos(n_rows);
        std::iota(pos.begin(), pos.end(), llama_pos(n_past));
        llama_batch batch = llama_batch_get_one(tokens.data(), n_rows);
        batch.pos = pos.data();
        longest_ns_.fill(0);
        last_ns_ = now_ns();
        stop_ns_ = last_ns_ + limit_ns_;
        const int64_t start_ns = last_ns_;
        const int code = llama_decode(ctx_.get(), batch);
        llama_synchronize(ctx_.get());
        note();
        pass_ns_ = last_ns_ - start_ns;
        stopped_ = code == 2;
        return code == 0 || code == 2;
    }

    void in_pieces(bool yes) {
#ifdef LLAMACANCEL_PATCHED
        ctx_->n_abort_pieces = yes ? kProbePieces : 0;
#endif
    }

    void note() {
        const int64_t now = now_ns();
        int64_t gap = now - last_ns_;
        for (int64_t & longest : longest_ns_) {
            if (gap > longest) {
                std::swap(gap, longest);
            }
        }
        last_ns_ = now;
    }

    static bool on_poll(void * data) {
        Probe & probe = *static_cast<Probe *>(data);
        probe.note();
        return probe.stop_ || probe.last_ns_ >= probe.stop_ns_;
    }

    std::unique_ptr<llama_context, decltype(&llama_free)> ctx_{nullptr, llama_free};
    std::array<int64_t, 3> longest_ns_{};  // of a pass, the longest first
    int64_t last_ns_ = 0, stop_ns_ = 0;
    int64_t pass_ns_ = 0;  // of a pass, from its start to its end
    bool stopped_ = false;
    const int64_t limit_ns_;
    const std::atomic<bool> & stop_;
};

}  // namespace

GapCost estimate_gap_cost(const llama_model & model, int32_t n_threads) {
    const auto & experts = model.hparams.n_expert_used_arr;  // by layer
    const uint32_t most_experts = std::max(1u, *std::max_element(experts.begin(), experts.end()));
    double widest = llama_model_n_embd(&model);
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (name.rfind("blk.", 0) == 0) {
            widest = std::max(widest, double(tensor->ne[1]) * (tensor->ne[2] > 1 ? most_experts : 1));
        }
    }
    GapCost cost;
    cost.seconds_per_row = kSecondsPerElement * widest / n_threads;
    return cost;
}

GapCost measure_gap_cost(llama_model * model, int32_t n_threads, bool on_cpu, int32_t max_positions,
                         const std::atomic<bool> & stop) {
    const bool always = true;
    QuietLog quiet(always);  // each pass is stopped on its way
    const int32_t n_cells = max_positions > 0 ? std::min<int32_t>(kProbeCells, max_positions) : kProbeCells;
    const int32_t more_rows = std::min(on_cpu ? 128 : 512, n_cells), few_rows = std::max(more_rows / 4, 1);
    const uint32_t n_past = n_cells - more_rows;
    Probe probe(model, n_threads, more_rows, on_cpu, stop);
    const auto measure = on_cpu ? &Probe::longest_gap : &Probe::whole_pass;

    GapCost cost;
    cost.seconds_of_one = on_cpu ? 0 : probe.whole_pass(1, 0);
    const double few = (probe.*measure)(few_rows, 0);
    if (!on_cpu && probe.stopped()) {  // with more rows it would only be stopped sooner
        cost.seconds_per_row = few / few_rows;
        return cost;
    }
    const double more = (probe.*measure)(more_rows, 0);
    const double far = (probe.*measure)(more_rows, n_past);
    cost.seconds_per_row = more_rows > few_rows ? std::max(0.0, more - few) / (more_rows - few_rows) : 0;
    cost.seconds = std::max(0.0, more - more_rows * cost.seconds_per_row);
    cost.seconds_per_row_kv = n_past > 0 ? std::max(0.0, far - more) / (double(more_rows) * n_past) : 0;

#ifndef LLAMACANCEL_PATCHED
    // The output matrix is as wide as the vocabulary; its rows are as many as the outputs asked for.
    double largest = 0;
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.rfind("blk.", 0) == 0) {
            largest = std::max(largest, double(tensor->ne[0]) * tensor->ne[1]);
        }
    }
    const double output = double(llama_model_n_embd(model)) * llama_vocab_n_tokens(llama_model_get_vocab(model));
    cost.seconds_per_output = largest > 0 ? cost.seconds_per_row * output / largest : 0;
#endif
    return cost;
}

}  // namespace llamacancel

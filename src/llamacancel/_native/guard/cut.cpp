#include "guard/cut.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <memory>
#include <numeric>

#include "cancel/clock.hpp"
#include "process/guard.hpp"
#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"

namespace llamacancel {

namespace {

#ifdef LLAMACANCEL_PATCHED
constexpr uint32_t kFewestRows =
    64;  // the token is looked at inside a node: fewer would cost throughput and gain little
#else
constexpr uint32_t kFewestRows = 8;
#endif
constexpr uint32_t kProbeCells = 1024;
constexpr int64_t kPassNs = 100'000'000;  // at most, one pass over the first layers
constexpr int64_t kProbeNs = 60'000'000;  // cheap passes are repeated this long
constexpr int kPasses = 3, kMostPasses = 20;
// On another device than the CPU: at most, one pass, and what one is taken for that was stopped then; passes that take
// longer than a short one are handed over in pieces, so that they can be.
constexpr int64_t kDevicePassNs = 1'000'000'000, kShortNs = 100'000'000;
constexpr int kProbePieces = 64;
// The share of the target that may pass between two looks at the token. The rest is for the look that has
// just missed the cancel, for the repair, and for a machine that is busier than it was when we measured.
constexpr double kGapShare = 0.8;
// A cancel waits for what is left of two pieces of a graph, and pieces of as many nodes differ in what they cost.
constexpr double kPiecesPerGap = 3;
constexpr uint32_t kMostPieces = 256;

uint32_t round_down(double rows) {
    if (!(rows < 4096)) {
        return 4096;
    }
    const uint32_t whole = rows > 0 ? static_cast<uint32_t>(rows) : 0;
    const uint32_t step = whole >= 64 ? 16 : 8;  // kernels work on blocks of rows
    return std::max(kFewestRows, whole / step * step);
}

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
            for (llama_kv_cache * cache : Memory(memory, false).caches) {
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
        const int status = llama_decode(ctx_.get(), batch);
        llama_synchronize(ctx_.get());
        note();
        pass_ns_ = last_ns_ - start_ns;
        stopped_ = status == 2;
        return status == 0 || status == 2;
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

double Cut::budget() const { return target * kGapShare - cost.seconds; }

Cut Cut::choose(double target, const GapCost & cost, uint32_t limit) {
    Cut cut;
    cut.target = target;
    cut.cost = cost;
    cut.n_ubatch = std::min(limit, round_down(cut.budget() / cost.seconds_per_row));
    cut.max_outputs = std::min(limit, round_down(cut.budget() / cost.seconds_per_output));
    return cut;
}

Cut Cut::exactly(uint32_t n_ubatch) {
    Cut cut;
    cut.n_ubatch = cut.max_outputs = n_ubatch;
    cut.fixed = true;
    return cut;
}

Cut Cut::for_device(double target, const GapCost & cost, uint32_t n_ubatch) {
    Cut cut = exactly(n_ubatch);
    cut.target = target;
    cut.cost = cost;
    cut.on_device = true;
    return cut;
}

uint32_t Cut::pieces_at(uint32_t n_rows, uint32_t n_kv) const {
    if (n_pieces > 0) {
        return n_pieces;
    }
    if (!on_device) {
        return 0;
    }
    const double rows = std::max(cost.seconds_of_one, cost.seconds + n_rows * cost.seconds_per_row);
    const double gap = rows + n_rows * cost.seconds_per_row_kv * n_kv;
    const double share = gap / (target * kGapShare);
    return share <= 1 ? 0 : std::min(kMostPieces, static_cast<uint32_t>(std::ceil(kPiecesPerGap * share)));
}

uint32_t Cut::rows_at(uint32_t n_kv) const {
    if (fixed) {
        return n_ubatch;
    }
    return std::min(n_ubatch, round_down(budget() / (cost.seconds_per_row + cost.seconds_per_row_kv * n_kv)));
}

Cutter::Cutter(const BatchView & batch, const Cut & cut, Split split, bool output_all, bool whole_sequences)
    : batch_(batch),
      cut_(cut),
      split_(split),
      output_all_(output_all),
      whole_sequences_(whole_sequences),
      left_(batch.n_rows) {
    std::iota(left_.begin(), left_.end(), 0);
}

void Cutter::drop(const std::function<bool(int32_t)> & dropped) {
    left_.erase(std::remove_if(left_.begin(), left_.end(), dropped), left_.end());
}

bool Cutter::next(Chunk & chunk) {
    chunk.rows.clear();
    if (left_.empty()) {
        return false;
    }
    if (whole_sequences_) {
        take_whole_sequences(chunk);
    } else {
        switch (split_) {
            case Split::Simple:
                take_in_order(chunk);
                break;
            case Split::BySequence:
                take_one_sequence(chunk);
                break;
            case Split::Equal:
                take_equal(chunk, false);
                break;
            case Split::EqualSequential:
                take_equal(chunk, true);
                break;
        }
    }
    std::vector<int32_t> sorted = chunk.rows;
    std::sort(sorted.begin(), sorted.end());
    left_.erase(std::remove_if(left_.begin(), left_.end(),
                               [&](int32_t row) { return std::binary_search(sorted.begin(), sorted.end(), row); }),
                left_.end());
    chunk.last = left_.empty();
    return true;
}

bool Cutter::same_set(int32_t a, int32_t b) const {
    return std::equal(batch_.seqs_begin(a), batch_.seqs_end(a), batch_.seqs_begin(b), batch_.seqs_end(b));
}

bool Cutter::overlaps(int32_t a, int32_t b) const {
    return std::find_first_of(batch_.seqs_begin(a), batch_.seqs_end(a), batch_.seqs_begin(b), batch_.seqs_end(b)) !=
           batch_.seqs_end(a);
}

// split_simple(): rows as they come.
void Cutter::take_in_order(Chunk & chunk) {
    uint32_t limit = cut_.n_ubatch;
    uint32_t outputs = 0;
    for (int32_t row : left_) {
        limit = std::min(limit, limit_from(row));
        outputs += is_output(row);
        if (!chunk.rows.empty() && (chunk.rows.size() >= limit || outputs > cut_.max_outputs)) {
            break;
        }
        chunk.rows.push_back(row);
    }
    chunk.n_seqs = chunk.rows.size();
}

// Pooling reads a whole sequence in one ubatch: as many whole sequences as fit.
void Cutter::take_whole_sequences(Chunk & chunk) {
    std::vector<int32_t> rest = left_;
    while (!rest.empty()) {
        std::vector<int32_t> sequence, others;
        for (int32_t row : rest) {
            (overlaps(row, rest.front()) ? sequence : others).push_back(row);
        }
        if (!chunk.rows.empty() && chunk.rows.size() + sequence.size() > cut_.n_ubatch) {
            break;
        }
        chunk.rows.insert(chunk.rows.end(), sequence.begin(), sequence.end());
        rest = std::move(others);
        if (split_ != Split::Simple) {
            break;  // llama.cpp would cut several sequences apart here
        }
    }
    chunk.n_seqs = split_ == Split::Simple ? chunk.rows.size() : 1;
}

// split_seq(): rows of the first row's sequence set.
void Cutter::take_one_sequence(Chunk & chunk) {
    uint32_t limit = std::min(cut_.n_ubatch, cut_.max_outputs);
    for (int32_t row : left_) {
        if (!same_set(row, left_.front())) {
            continue;
        }
        limit = std::min(limit, limit_from(row));
        if (!chunk.rows.empty() && chunk.rows.size() >= limit) {
            break;
        }
        chunk.rows.push_back(row);
    }
    chunk.n_seqs = 1;
}

// Whether the sets take fewer ubatches if each is computed by itself. Together as many rows of each are computed as
// the shortest has, and the others leave scraps.
bool Cutter::fewer_apart(const std::vector<std::vector<int32_t>> & sets) const {
    size_t limit = cut_.n_ubatch;
    std::vector<size_t> lengths;
    for (const auto & set : sets) {
        limit = std::min<size_t>(limit, limit_from(set.back()));
        lengths.push_back(set.size());
    }
    std::sort(lengths.begin(), lengths.end());
    size_t together = 0, apart = 0, done = 0;
    for (size_t i = 0; i < lengths.size(); ++i) {
        const size_t of_each = std::max<size_t>(limit / (lengths.size() - i), 1);
        together += (lengths[i] - done + of_each - 1) / of_each;
        apart += (lengths[i] + limit - 1) / limit;
        done = lengths[i];
    }
    return apart < together;
}

// split_equal(): as many rows of each of several sequence sets as all of them have left. `sequential`:
// only sets whose ids follow one another. But one set alone if that makes fewer ubatches, which llama.cpp does not do.
void Cutter::take_equal(Chunk & chunk, bool sequential) {
    std::vector<std::vector<int32_t>> sets;
    for (int32_t row : left_) {
        if (sets.size() == cut_.n_ubatch ||
            std::any_of(sets.begin(), sets.end(), [&](const auto & set) { return overlaps(set[0], row); }) ||
            (sequential && !sets.empty() && *batch_.seqs_begin(row) != *batch_.seqs_begin(sets.back()[0]) + 1)) {
            continue;
        }
        sets.emplace_back();
        std::copy_if(left_.begin(), left_.end(), std::back_inserter(sets.back()),
                     [&](int32_t other) { return same_set(row, other); });
    }
    if (fewer_apart(sets)) {
        sets.resize(1);
    }
    size_t length = sets[0].size();
    for (const auto & set : sets) {
        length = std::min(length, set.size());
    }
    uint32_t limit = cut_.n_ubatch;
    uint32_t outputs = 0;
    size_t taken = 0;
    for (; taken < length; ++taken) {
        for (const auto & set : sets) {
            limit = std::min(limit, limit_from(set[taken]));
            outputs += is_output(set[taken]);
        }
        if (taken > 0 && ((taken + 1) * sets.size() > limit || outputs > cut_.max_outputs)) {
            break;
        }
    }
    for (const auto & set : sets) {
        chunk.rows.insert(chunk.rows.end(), set.begin(), set.begin() + taken);
    }
    chunk.n_seqs = sets.size();
}

}  // namespace llamacancel

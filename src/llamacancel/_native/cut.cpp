#include "cut.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>

#include "clock.hpp"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "guard.hpp"
#include "llama-model.h"
#include "llama.h"

namespace llamacancel {

namespace {

constexpr uint32_t kFewestRows = 8;
constexpr int32_t kProbeRows = 32;
constexpr int64_t kPassNs = 60'000'000;  // one pass over the first layers
constexpr int kPasses = 3, kMostPasses = 20;
// The share of the target that one node may take. The rest is for the poll that has just missed the
// cancel, for the repair, and for a machine that is busier than it was when we measured.
constexpr double kNodeShare = 0.8;

uint32_t round_down(double rows) {
    if (!(rows < 4096)) {
        return 4096;
    }
    const uint32_t whole = static_cast<uint32_t>(rows);
    const uint32_t step = whole >= 64 ? 16 : 8;  // kernels work on blocks of rows
    return std::max(kFewestRows, whole / step * step);
}

// Times each node of a graph through the scheduler's evaluation callback, which computes node by node. Of
// nodes that are alike (those of the layers, and of several passes) the fastest counts: on a machine that
// is busy with other things, the others tell of these things.
struct Probe {
    using Likeness = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t>;

    int64_t stop_ns = 0;
    int64_t node_ns = 0;
    std::map<Likeness, double> seconds;     // of nodes that depend on the rows alone
    std::map<Likeness, double> kv_seconds;  // for each row and cell, where attention is done by matrix products
    ggml_tensor * flash = nullptr;

    static bool on_node(ggml_tensor * node, bool ask, void * data) {
        Probe & probe = *static_cast<Probe *>(data);
        if (ask) {
            probe.node_ns = now_ns();
            return true;
        }
        const double seconds = (now_ns() - probe.node_ns) * 1e-9;
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            probe.flash = node;
        } else if (node->op == GGML_OP_MUL_MAT && strncmp(node->name, "kq", 2) == 0) {
            keep_least(probe.kv_seconds, node, seconds / (double(node->ne[0]) * node->ne[1]));
        } else if (ggml_nrows(node) >= kProbeRows) {
            keep_least(probe.seconds, node, seconds);
        }
        return !probe.over();
    }

    static void keep_least(std::map<Likeness, double> & least, const ggml_tensor * node, double seconds) {
        const ggml_tensor * from = node->src[0] ? node->src[0] : node;
        const Likeness key(node->op, node->ne[0], ggml_nrows(node), from->type, from->ne[0], from->ne[1]);
        const auto known = least.try_emplace(key, seconds).first;
        known->second = std::min(known->second, seconds);
    }

    static double costliest(const std::map<Likeness, double> & least) {
        double most = 0;
        for (const auto & [likeness, seconds] : least) {
            most = std::max(most, seconds);
        }
        return most;
    }

    bool over() const { return now_ns() >= stop_ns; }
    static bool on_abort(void * data) { return static_cast<Probe *>(data)->over(); }
};

// Seconds that flash attention takes for each row and each cell it looks at, for heads of the node's shape.
double time_flash_attention(const ggml_tensor * like, int32_t n_threads) {
    constexpr int64_t n_kv = 512;
    ggml_init_params params = {64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true};
    std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init(params), ggml_free);
    std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu(ggml_backend_cpu_init(), ggml_backend_free);
    ggml_backend_cpu_set_n_threads(cpu.get(), n_threads);

    const ggml_tensor * q0 = like->src[0];
    const ggml_tensor * k0 = like->src[1];
    const ggml_tensor * v0 = like->src[2];
    ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, q0->ne[0], kProbeRows, q0->ne[2]);
    ggml_tensor * k = ggml_new_tensor_3d(ctx.get(), k0->type, k0->ne[0], n_kv, k0->ne[2]);
    ggml_tensor * v = ggml_new_tensor_3d(ctx.get(), v0->type, v0->ne[0], n_kv, v0->ne[2]);
    ggml_tensor * out = ggml_flash_attn_ext(ctx.get(), q, k, v, nullptr, 1.0f, 0.0f, 0.0f);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);
    std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer(
        ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.get()), ggml_backend_buffer_free);
    if (!buffer) {
        return 0;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    double best = HUGE_VAL;
    for (int i = 0; i < 3; ++i) {
        const int64_t start = now_ns();
        ggml_backend_graph_compute(cpu.get(), graph);
        best = std::min(best, (now_ns() - start) * 1e-9);
    }
    return best / (double(kProbeRows) * n_kv);
}

}  // namespace

NodeCost measure_node_cost(llama_model * model, int32_t n_threads) {
    NodeCost cost;
    Probe probe;
    const bool always = true;
    QuietLog quiet(always);  // each pass is stopped on its way
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_batch = params.n_ubatch = kProbeRows;
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = n_threads;
    params.cb_eval = Probe::on_node;
    params.cb_eval_user_data = &probe;
    params.abort_callback = Probe::on_abort;
    params.abort_callback_data = &probe;
    params.no_perf = true;
    std::unique_ptr<llama_context, decltype(&llama_free)> ctx(llama_init_from_model(model, params), llama_free);
    if (!ctx) {
        return cost;
    }
    std::vector<llama_token> tokens(kProbeRows, 0);
    std::iota(tokens.begin(), tokens.end(), 0);
    const int64_t end_ns = now_ns() + kPasses * kPassNs;
    for (int pass = 0; pass < 2 || (pass < kMostPasses && now_ns() < end_ns); ++pass) {
        if (pass == 1) {
            probe.seconds.clear();  // the first pass brought the weights into memory
            probe.kv_seconds.clear();
        }
        probe.stop_ns = now_ns() + kPassNs;
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), kProbeRows));
    }
    cost.seconds_per_row = Probe::costliest(probe.seconds) / kProbeRows;
    cost.seconds_per_row_kv = Probe::costliest(probe.kv_seconds);
    if (probe.flash) {
        cost.seconds_per_row_kv = std::max(cost.seconds_per_row_kv, time_flash_attention(probe.flash, n_threads));
    }

    // The output matrix is as wide as the vocabulary; its rows are as many as the outputs asked for.
    double largest = 0;
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.rfind("blk.", 0) == 0) {
            largest = std::max(largest, double(tensor->ne[0]) * tensor->ne[1]);
        }
    }
    const double output = double(llama_model_n_embd(model)) * llama_vocab_n_tokens(llama_model_get_vocab(model));
    cost.seconds_per_output = largest > 0 ? cost.seconds_per_row * output / largest : 0;
    return cost;
}

double Cut::budget() const { return target * kNodeShare; }

Cut Cut::choose(double target, const NodeCost & cost, uint32_t limit) {
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

uint32_t Cut::rows_at(uint32_t n_kv) const {
    if (fixed || cost.seconds_per_row_kv <= 0) {
        return n_ubatch;
    }
    return std::min(n_ubatch, round_down(budget() / (cost.seconds_per_row_kv * n_kv)));
}

Cutter::Cutter(const BatchView & batch, const Cut & cut, Split split, bool output_all, bool whole_sequences)
    : batch_(batch), cut_(cut), split_(split), output_all_(output_all), whole_sequences_(whole_sequences), left_(batch.n_rows) {
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
            case Split::Simple: take_in_order(chunk); break;
            case Split::BySequence: take_one_sequence(chunk); break;
            case Split::Equal: take_equal(chunk, false); break;
            case Split::EqualSequential: take_equal(chunk, true); break;
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

// split_equal(): as many rows of each of several sequence sets as all of them have left. `sequential`:
// only sets whose ids follow one another.
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

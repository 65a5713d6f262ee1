#include "guard/cut.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>

namespace llamacancel {

namespace {

#ifdef LLAMACANCEL_PATCHED
constexpr uint32_t kFewestRows =
    64;  // the token is looked at inside a node: fewer would cost throughput and gain little
#else
constexpr uint32_t kFewestRows = 8;
#endif
// The part of the target that may pass between two looks at the token. The rest is for the look that has
// just missed the cancel, for the repair, and for a machine that is busier than it was when we measured.
constexpr double kGapPart = 0.8;
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

}  // namespace

double Cut::budget() const { return target * kGapPart - cost.seconds; }

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
    const double targets = gap / (target * kGapPart);
    return targets <= 1 ? 0 : std::min(kMostPieces, static_cast<uint32_t>(std::ceil(kPiecesPerGap * targets)));
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

bool Cutter::next(Ubatch & ubatch) {
    ubatch.rows.clear();
    if (left_.empty()) {
        return false;
    }
    if (whole_sequences_) {
        take_whole_sequences(ubatch);
    } else {
        switch (split_) {
            case Split::Simple:
                take_in_order(ubatch);
                break;
            case Split::BySequence:
                take_one_sequence(ubatch);
                break;
            case Split::Equal:
                take_equal(ubatch, false);
                break;
            case Split::EqualSequential:
                take_equal(ubatch, true);
                break;
        }
    }
    std::vector<int32_t> sorted = ubatch.rows;
    std::sort(sorted.begin(), sorted.end());
    left_.erase(std::remove_if(left_.begin(), left_.end(),
                               [&](int32_t row) { return std::binary_search(sorted.begin(), sorted.end(), row); }),
                left_.end());
    ubatch.last = left_.empty();
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
void Cutter::take_in_order(Ubatch & ubatch) {
    uint32_t limit = cut_.n_ubatch;
    uint32_t outputs = 0;
    for (int32_t row : left_) {
        limit = std::min(limit, limit_from(row));
        outputs += is_output(row);
        if (!ubatch.rows.empty() && (ubatch.rows.size() >= limit || outputs > cut_.max_outputs)) {
            break;
        }
        ubatch.rows.push_back(row);
    }
    ubatch.n_seqs = ubatch.rows.size();
}

// Pooling reads a whole sequence in one ubatch: as many whole sequences as fit.
void Cutter::take_whole_sequences(Ubatch & ubatch) {
    std::vector<int32_t> rest = left_;
    while (!rest.empty()) {
        std::vector<int32_t> sequence, others;
        for (int32_t row : rest) {
            (overlaps(row, rest.front()) ? sequence : others).push_back(row);
        }
        if (!ubatch.rows.empty() && ubatch.rows.size() + sequence.size() > cut_.n_ubatch) {
            break;
        }
        ubatch.rows.insert(ubatch.rows.end(), sequence.begin(), sequence.end());
        rest = std::move(others);
        if (split_ != Split::Simple) {
            break;  // llama.cpp would cut several sequences apart here
        }
    }
    ubatch.n_seqs = split_ == Split::Simple ? ubatch.rows.size() : 1;
}

// split_seq(): rows of the first row's sequence set.
void Cutter::take_one_sequence(Ubatch & ubatch) {
    uint32_t limit = std::min(cut_.n_ubatch, cut_.max_outputs);
    for (int32_t row : left_) {
        if (!same_set(row, left_.front())) {
            continue;
        }
        limit = std::min(limit, limit_from(row));
        if (!ubatch.rows.empty() && ubatch.rows.size() >= limit) {
            break;
        }
        ubatch.rows.push_back(row);
    }
    ubatch.n_seqs = 1;
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
void Cutter::take_equal(Ubatch & ubatch, bool sequential) {
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
        ubatch.rows.insert(ubatch.rows.end(), set.begin(), set.begin() + taken);
    }
    ubatch.n_seqs = sets.size();
}

}  // namespace llamacancel

#include "memory/memory.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <new>
#include <optional>

#include "memory/cells.hpp"
#include "ggml-backend.h"
#include "llama-hparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "memory/undo_recurrent.hpp"

namespace llamacancel {

namespace {

// Some fields of llama_kv_cache have no getter. Explicit instantiation may name private members
// ([temp.spec]/6), so we read them without a patch, and a rename upstream fails to compile here.
template <typename Tag, auto Member>
struct Expose {
    friend constexpr auto expose(Tag) { return Member; }
};
struct Heads {
    friend constexpr auto expose(Heads);
};
struct Layers {
    friend constexpr auto expose(Layers);
};
struct VTrans {
    friend constexpr auto expose(VTrans);
};
struct Cells {
    friend constexpr auto expose(Cells);
};
struct Other {
    friend constexpr auto expose(Other);
};
struct Window {
    friend constexpr auto expose(Window);
};
struct WindowType {
    friend constexpr auto expose(WindowType);
};
template struct Expose<Heads, &llama_kv_cache::v_heads>;
template struct Expose<Layers, &llama_kv_cache::layers>;
template struct Expose<VTrans, &llama_kv_cache::v_trans>;
template struct Expose<Cells, &llama_kv_cache::v_cells_impl>;
template struct Expose<Other, &llama_kv_cache::other>;
template struct Expose<Window, &llama_kv_cache::n_swa>;
template struct Expose<WindowType, &llama_kv_cache::swa_type>;

std::vector<uint32_t> & heads_of(llama_kv_cache & cache) { return cache.*expose(Heads{}); }
llama_kv_cells_vec & cells_of(llama_kv_cache & cache) { return *(cache.*expose(Cells{})); }
// True if no token from position `next` on looks at position `pos` any more.
bool has_left_window(llama_kv_cache & cache, llama_pos pos, llama_pos next) {
    return llama_hparams::is_masked_swa(cache.*expose(Window{}), cache.*expose(WindowType{}), pos, next);
}

constexpr size_t kCellsBetweenLooks = 1024;  // are copied at once: on an RPC server each copy is a round trip

bool shares_cells(llama_kv_cache & cache) { return (cache.*expose(Other{})) != nullptr; }

CellData data_of(llama_kv_cache & cache, uint32_t stream) {
    std::vector<ggml_tensor *> k, v;
    for (const auto & layer : cache.*expose(Layers{})) {
        if (layer.k) {
            k.push_back(layer.k_stream[stream]);
        }
        if (layer.v) {
            v.push_back(layer.v_stream[stream]);
        }
    }
    return CellData(std::move(k), std::move(v), cache.*expose(VTrans{}));
}

}  // namespace

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

void forget_by(const Memory & memory, const std::function<void()> & change) {
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

Memory::Memory(llama_memory_i * memory, bool output_all) : memory(memory) {
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

// ---- caches of keys and values ---------------------------------------------------------------------------

struct Undo::Cache {
    explicit Cache(llama_kv_cache & cache) : cache(cache), saved(cache.get_n_stream()) {
        for (auto & marks : saved) {
            marks.resize(cache.get_size(), Untouched);
        }
        for (uint32_t s = 0; s < cache.get_n_stream(); ++s) {
            data.push_back(data_of(cache, s));
        }
    }

    enum Mark : uint8_t { Untouched = 0, Described, Copied };  // what is saved of a cell: nothing, no K and V, all

    // Cells of one stream as they were: empty, or as `cells` has them, and the K and V of some.
    struct Group {
        uint32_t stream;
        std::vector<uint32_t> empty;
        std::vector<uint32_t> idxs;
        std::optional<llama_kv_cells> cells;  // of idxs; making one is not cheap, and mostly there is no need
        std::vector<uint32_t> copied;
        std::vector<uint8_t> bytes;
    };

    void begin() {
        forget();
        heads = heads_of(cache);
    }

    void forget() {
        for (const Group & group : groups) {
            for (const auto * touched : {&group.empty, &group.idxs}) {
                for (uint32_t idx : *touched) {
                    saved[group.stream][idx] = Untouched;
                }
            }
        }
        groups.clear();
    }

    bool save(const llama_ubatch & ubatch) {
        const auto slot = cache.find_slot(ubatch, false);
        if (slot.empty()) {
            return false;
        }
        for (size_t s = 0; s < slot.n_stream(); ++s) {
            save(slot.strm[s], slot.idxs[s]);
        }
        return true;
    }

    // `slot`: the cells that will be written. Those in use there are overwritten, and apply_ubatch() then
    // forgets every older position of the sequences that lost a cell.
    void save(uint32_t stream, const std::vector<uint32_t> & slot) {
        groups.emplace_back().stream = stream;
        try {
            note(groups.back(), slot);
            copy(groups.back());
        } catch (const std::bad_alloc &) {
            for (uint32_t idx : groups.back().copied) {
                saved[stream][idx] = Described;
            }
            for (const auto * touched : {&groups.back().empty, &groups.back().idxs}) {
                for (uint32_t idx : *touched) {
                    saved[stream][idx] = Untouched;
                }
            }
            groups.pop_back();
            throw;
        }
    }

    void note(Group & group, const std::vector<uint32_t> & slot) {
        const llama_kv_cells & cells = cells_of(cache)[group.stream];
        auto & marks = saved[group.stream];
        std::map<llama_seq_id, llama_pos> purged_to;
        for (uint32_t idx : slot) {
            if (!cells.is_empty(idx)) {
                llama_pos & to = purged_to.try_emplace(cells.seq_get(idx), -1).first->second;
                to = std::max(to, cells.pos_get(idx));
            }
            if (marks[idx] == Untouched && cells.is_empty(idx)) {
                group.empty.push_back(idx);
            } else if (marks[idx] == Untouched) {
                group.idxs.push_back(idx);
                group.copied.push_back(idx);
            } else if (marks[idx] == Described) {
                group.copied.push_back(idx);
            }
            marks[idx] = Copied;
        }
        if (!purged_to.empty()) {
            for (uint32_t idx = 0; idx < cells.size(); ++idx) {
                if (marks[idx] != Untouched || cells.is_empty(idx)) {
                    continue;
                }
                for (const auto & [seq, to] : purged_to) {
                    if (cells.pos_get(idx) <= to && cells.seq_has(idx, seq)) {
                        group.idxs.push_back(idx);
                        marks[idx] = Described;
                        break;
                    }
                }
            }
        }
    }

    // Cells that `seq` holds, and in a sliding window all, since a search for room may take any there.
    void save_sequence(llama_seq_id seq, const std::function<void()> & poll) {
        Group & group = groups.emplace_back();
        group.stream = cache.get_stream(seq);
        const llama_kv_cells & cells = cells_of(cache)[group.stream];
        const bool slides = cache.*expose(WindowType{}) != LLAMA_SWA_TYPE_NONE;
        for (uint32_t idx = 0; idx < cells.size(); ++idx) {
            if (cells.is_empty(idx)) {
                group.empty.push_back(idx);
            } else if (slides || cells.seq_has(idx, seq)) {
                group.idxs.push_back(idx);
            }
        }
        group.copied = group.idxs;
        copy(group, poll);
    }

    void copy(Group & group, const std::function<void()> & poll = {}) {
        const CellData & cell_data = data[group.stream];
        if (!group.idxs.empty()) {
            group.cells = cells_of(cache)[group.stream].cp(group.idxs);
        }
        group.bytes.resize(group.copied.size() * cell_data.bytes());
        for (size_t first = 0; first < group.copied.size(); first += kCellsBetweenLooks) {
            if (poll) {
                poll();
            }
            const size_t last = std::min(first + kCellsBetweenLooks, group.copied.size());
            cell_data.get({group.copied.begin() + first, group.copied.begin() + last},
                          group.bytes.data() + first * cell_data.bytes());
        }
    }

    void restore() {
        for (const Group & group : groups) {
            llama_kv_cells & cells = cells_of(cache)[group.stream];
            for (uint32_t idx : group.empty) {
                if (!cells.is_empty(idx)) {
                    cells.rm(idx);
                }
            }
            if (group.cells) {
                cells.set(group.idxs, *group.cells);
            }
            data[group.stream].set(group.copied, group.bytes.data());
        }
        heads_of(cache) = heads;
    }

    // Gives a sequence, whose new positions are gone, its saved cells back where they were, from the newest on. One
    // whose place another sequence has taken ends that: what is older is gone, too, since positions have no gaps.
    // False if a token at `next` would look at what is gone.
    bool restore_sequence(llama_seq_id seq, llama_pos next) {
        const uint32_t stream = cache.get_stream(seq);
        llama_kv_cells & cells = cells_of(cache)[stream];
        std::multimap<llama_pos, std::pair<const Group *, uint32_t>, std::greater<>> lost;
        for (const Group & group : groups) {
            for (uint32_t i = 0; i < group.idxs.size(); ++i) {
                if (group.stream == stream && group.cells->seq_has(i, seq)) {
                    lost.emplace(group.cells->pos_get(i), std::make_pair(&group, i));
                }
            }
        }
        bool whole = true;
        std::vector<bool> emptied(cells.size());
        for (const auto & [pos, where] : lost) {
            const auto & [group, i] = where;
            const uint32_t home = group->idxs[i];
            if (cells.is_empty(home)) {
                cells.pos_set(home, pos);
                cells.ext_set(home, group->cells->ext_get(i));
                emptied[home] = true;
            } else if (cells.pos_get(home) != pos ||
                       (cells.seq_get_all(home) & ~group->cells->seq_get_all(i)).any()) {
                cache.seq_rm(seq, -1, pos + 1);
                whole = has_left_window(cache, pos, next);
                break;
            }
            if (!cells.seq_has(home, seq)) {  // else it was never lost, or only by others that shared it
                cells.seq_add(home, seq);
            }
        }
        put_back(stream, emptied);
        return whole;
    }

    // Puts the K and V back of those cells of a stream that were overwritten.
    void put_back(uint32_t stream, const std::vector<bool> & wanted) {
        const size_t size = data[stream].bytes();
        for (const Group & group : groups) {
            std::vector<uint32_t> idxs;
            std::vector<uint8_t> bytes;
            for (size_t at = 0; group.stream == stream && at < group.copied.size(); ++at) {
                if (wanted[group.copied[at]]) {
                    idxs.push_back(group.copied[at]);
                    bytes.insert(bytes.end(), group.bytes.begin() + at * size, group.bytes.begin() + (at + 1) * size);
                }
            }
            data[stream].set(idxs, bytes.data());
        }
    }

    void scrub(bool written) {
        std::vector<uint32_t> emptied;
        for (const Group & group : groups) {
            const llama_kv_cells & cells = cells_of(cache)[group.stream];
            emptied.clear();
            for (const auto * touched : {&group.empty, &group.idxs}) {
                if (written || touched == &group.idxs) {
                    std::copy_if(touched->begin(), touched->end(), std::back_inserter(emptied),
                                 [&](uint32_t idx) { return cells.is_empty(idx); });
                }
            }
            data[group.stream].clear(emptied);
        }
    }

    size_t bytes() const noexcept {
        size_t total = 0;
        for (const Group & group : groups) {
            total += group.bytes.size();
        }
        return total;
    }

    llama_kv_cache & cache;
    std::vector<CellData> data;               // per stream
    std::vector<std::vector<uint8_t>> saved;  // per stream and cell: a Mark
    std::vector<uint32_t> heads;              // where the search for a slot began
    std::vector<Group> groups;
};

// ---- both ------------------------------------------------------------------------------------------------

Undo::Undo(const Memory & memory) {
    for (llama_kv_cache * cache : memory.caches) {
        caches_.push_back(std::make_unique<Cache>(*cache));
    }
    if (memory.recurrent) {
        recurrent_ = std::make_unique<Recurrent>(*memory.recurrent);
    }
}

Undo::~Undo() = default;

void Undo::begin() {
    for (auto & cache : caches_) cache->begin();
    if (recurrent_) recurrent_->begin();
}

void Undo::forget(bool all) {
    for (auto & cache : caches_) cache->forget();
    if (recurrent_) recurrent_->forget(all);
}

bool Undo::save(const llama_ubatch & ubatch, int n_threads) {
    for (auto & cache : caches_) {
        if (!cache->save(ubatch)) {
            return false;
        }
    }
    return !recurrent_ || recurrent_->save(ubatch, n_threads);
}

void Undo::clear_zero() {
    if (recurrent_) recurrent_->clear_zero();
}

void Undo::save_sequence(llama_seq_id seq, const std::function<void()> & poll) {
    for (auto & cache : caches_) cache->save_sequence(seq, poll);
    if (recurrent_) recurrent_->save_sequence(seq);
}

void Undo::restore() {
    for (auto & cache : caches_) cache->restore();
    if (recurrent_) recurrent_->restore();
}

void Undo::scrub(bool written) {
    for (auto & cache : caches_) cache->scrub(written);
}

bool Undo::restore_sequence(llama_seq_id seq, llama_pos next) {
    bool whole = !recurrent_ || recurrent_->restore_sequence(seq);
    for (auto & cache : caches_) {
        whole = whole && cache->restore_sequence(seq, next);
    }
    return whole;
}

size_t Undo::bytes() const noexcept {
    size_t total = recurrent_ ? recurrent_->bytes() : 0;
    for (const auto & cache : caches_) {
        total += cache->bytes();
    }
    return total;
}

void Journal::begin(std::vector<llama_seq_id> seqs, bool keep) {
    seqs_ = std::move(seqs);
    keep_ = keep;
    n_ubatches_ = 0;
    touched = false;
    look(held_at_start_, used_at_start_);
    origin_.begin();
}

void Journal::scrub() {
    if (memory_.forgets()) {
        origin_.scrub(false);
    }
}

void Journal::end() {
    origin_.forget(false);
    latest_.forget(true);
}

bool Journal::before(const llama_ubatch & ubatch, int n_threads) {
    if (keep_ && n_ubatches_++ > 0) {
        look(held_, used_);
        latest_.begin();
        if (!latest_.save(ubatch, n_threads)) {
            return false;
        }
    }
    if (!origin_.save(ubatch, n_threads)) {
        return false;
    }
    origin_.clear_zero();
    return true;
}

std::vector<llama_seq_id> Journal::rollback() { return repair(origin_, held_at_start_, used_at_start_); }

std::vector<llama_seq_id> Journal::rollback_last() {
    return n_ubatches_ > 1 ? repair(latest_, held_, used_) : rollback();
}

std::optional<std::vector<llama_seq_id>> Journal::rollback_beside(const std::vector<Added> & cancelled) {
    std::vector<llama_seq_id> dirty;
    if (!memory_.memory) {
        return dirty;
    }
    const auto held_of = [&](llama_seq_id seq) {
        return std::find_if(held_at_start_.begin(), held_at_start_.end(), [&](const Held & h) { return h.seq == seq; });
    };
    for (const Added & added : cancelled) {
        const bool was_empty = held_of(added.seq)->pos_max < 0;
        if (memory_.restorable()) {
            for (llama_kv_cache * cache : memory_.caches) cache->seq_rm(added.seq, added.from, -1);
        } else {
            memory_.memory->seq_rm(added.seq, was_empty ? -1 : added.from, -1);
            if (!was_empty) {
                dirty.push_back(added.seq);
            }
        }
    }
    for (const Added & added : cancelled) {  // all of them have made room
        if (memory_.restorable() && !(origin_.restore_sequence(added.seq, added.from) &&
                                      memory_.pos_max(added.seq) == held_of(added.seq)->pos_max)) {
            return std::nullopt;
        }
    }
    origin_.scrub(true);
    return dirty;
}

void Journal::look(std::vector<Held> & held, std::vector<uint32_t> & used) const {
    held.clear();
    used.clear();
    for (llama_seq_id seq : seqs_) {
        held.push_back({seq, memory_.pos_min(seq), memory_.pos_max(seq)});
    }
    for (llama_kv_cache * cache : memory_.caches) {
        for (const llama_kv_cells & cells : cells_of(*cache)) {
            used.push_back(cells.get_used());
        }
    }
}

std::vector<llama_seq_id> Journal::repair(Undo & undo, const std::vector<Held> & held,
                                          const std::vector<uint32_t> & used) {
    std::vector<llama_seq_id> dirty;
    if (!memory_.memory || (!memory_.restorable() && !touched)) {
        return dirty;
    }
    if (memory_.restorable()) {
        undo.restore();
        undo.scrub(true);
    }
    std::vector<Held> held_now;
    std::vector<uint32_t> used_now;
    look(held_now, used_now);
    for (size_t i = 0; i < held.size(); ++i) {
        if (memory_.restorable()) {
            if (used_now != used || held_now[i].pos_min != held[i].pos_min || held_now[i].pos_max != held[i].pos_max) {
                dirty.push_back(held[i].seq);
            }
        } else if (held[i].pos_max < 0) {
            memory_.memory->seq_rm(held[i].seq, -1, -1);  // was empty: removing all of it never fails
        } else {
            dirty.push_back(held[i].seq);
        }
    }
    return dirty;
}

}  // namespace llamacancel

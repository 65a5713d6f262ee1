#include "memory/journal.hpp"

#include <algorithm>
#include <utility>

#include "memory/fields.hpp"

namespace llamacancel {

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

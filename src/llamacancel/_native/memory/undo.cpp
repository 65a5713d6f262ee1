#include "memory/undo.hpp"

#include "memory/undo_cache.hpp"
#include "memory/undo_recurrent.hpp"

namespace llamacancel {

Undo::Undo(const MemoryParts & memory) {
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

}  // namespace llamacancel

// The journal of one call, and what its repairs came to.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "memory/undo.hpp"

namespace llamacancel {

// The journal of one call: back to its start, or to the last ubatch that was completed.
class Journal {
public:
    explicit Journal(const MemoryParts & memory) : memory_(memory), origin_(memory), latest_(memory) {}

    // `keep`: rollback_last() may be asked for; costs a second copy of what each ubatch but the first overwrites.
    void begin(std::vector<llama_seq_id> seqs, bool keep);
    void scrub();  // zeroes what the window has dropped; before end(), when the call will not be rolled back any more
    void end();    // the call will not be rolled back any more
    bool before(const llama_ubatch & ubatch, int n_threads);

    // True once a graph that writes to the memory was begun: before, nobody is dirty, whatever happened.
    bool touched = false;

    // Each returns the sequences that it could not repair. What it did was looked at afterwards.
    std::vector<llama_seq_id> rollback();
    std::vector<llama_seq_id> rollback_last();

    // Puts single sequences of a call back that went on for others, nothing of which moves. Nothing comes back if that
    // cannot be: others have taken cells that they need. Then rollback() is due.
    struct Added {
        llama_seq_id seq;
        llama_pos from;  // the first position that the call added
    };
    std::optional<std::vector<llama_seq_id>> rollback_beside(const std::vector<Added> & cancelled);

    size_t bytes() const noexcept { return origin_.bytes() + latest_.bytes(); }

private:
    struct Held {
        llama_seq_id seq;
        llama_pos pos_min;
        llama_pos pos_max;
    };
    void look(std::vector<Held> & held, std::vector<uint32_t> & used) const;
    std::vector<llama_seq_id> repair(Undo & undo, const std::vector<Held> & held, const std::vector<uint32_t> & used);

    const MemoryParts & memory_;
    Undo origin_;
    Undo latest_;
    bool keep_ = false;
    uint32_t n_ubatches_ = 0;  // begun; to go back before the first is to go back to the start
    std::vector<llama_seq_id> seqs_;
    std::vector<Held> held_at_start_, held_;      // what the sequences held, to compare after a repair
    std::vector<uint32_t> used_at_start_, used_;  // used cells of each cache
};

}  // namespace llamacancel

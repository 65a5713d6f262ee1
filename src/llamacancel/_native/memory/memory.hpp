// What a decode may change in a context's memory, saved before it and put back exactly.
//
// llama.cpp's public interface cannot restore a memory: seq_rm() forgets where the search for a slot
// stood, a sliding window overwrites old cells, and a recurrent state moves on in place. A Journal looks
// at the memory classes themselves: before each ubatch it asks them where the ubatch will go (with their
// own find_slot()) and keeps the cells and rows that will be overwritten there. Restored, a memory is the
// same to the cell, so that a call done again gives the same bits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llama-kv-cells.h"
#include "llama-memory.h"

struct llama_ubatch;
class llama_kv_cache;
class llama_memory_recurrent;

namespace llamacancel {

enum class MemoryKind : uint8_t { None, Attention, SlidingWindow, Recurrent, Hybrid, HybridSlidingWindow, Other };

const char * name_of(MemoryKind kind) noexcept;

// How llama.cpp cuts a batch into ubatches for this memory (its init_batch()).
enum class Split : uint8_t { Simple, Equal, EqualSequential, BySequence };

// A context's memory, taken apart. `caches` and `recurrent` are views that live as long as the context.
struct Memory {
    explicit Memory(llama_memory_i * memory, bool output_all);

    llama_memory_i * memory;  // null for an encoder, and for what computes all rows anew
    MemoryKind kind = MemoryKind::None;
    Split split = Split::Simple;
    std::vector<llama_kv_cache *> caches;
    llama_memory_recurrent * recurrent = nullptr;

    // False for memory classes that we cannot restore: what they held before a cancelled call is lost.
    bool restorable() const noexcept { return kind != MemoryKind::Other; }

    // True if a window slides over the sequences and drops what has left it.
    bool forgets() const noexcept {
        return kind == MemoryKind::SlidingWindow || kind == MemoryKind::HybridSlidingWindow;
    }

    llama_pos pos_min(llama_seq_id seq) const { return memory ? memory->seq_pos_min(seq) : -1; }
    llama_pos pos_max(llama_seq_id seq) const { return memory ? memory->seq_pos_max(seq) : -1; }
};

// Runs `change`, which forgets sequences, and zeroes the cells that it has emptied.
void forget_by(const Memory & memory, const std::function<void()> & change);

// Marks the first `n_cells` of an empty cache as positions of sequence 0, as if they had been decoded: for measuring.
void pretend_to_hold(llama_kv_cache & cache, uint32_t n_cells);

// The undo record of one stretch of work: the first content of every cell and row touched since begin().
class Undo {
public:
    explicit Undo(const Memory & memory);
    ~Undo();

    void begin();

    // Lets go of what was saved; with `all`, also of the memory that a recurrent state's copy lay in.
    void forget(bool all);

    // Saves what `ubatch` will overwrite and was not saved since begin(), with the threads that will compute it. False if
    // there is no slot for it.
    bool save(const llama_ubatch & ubatch, int n_threads);

    // Has the sequences that begin with the ubatch begin with zeros; after save().
    void clear_zero();

    // Saves all that a sequence holds, before it is replaced as a whole; restore() puts it back. `poll` is called
    // between cells, and may throw.
    void save_sequence(llama_seq_id seq, const std::function<void()> & poll);

    // Puts everything back as it was at begin().
    void restore();

    // Puts back one sequence, whose new positions are gone from the caches, and leaves the others. False if what a
    // token at `next` would look at cannot go back where it was; restore() still can.
    bool restore_sequence(llama_seq_id seq, llama_pos next);

    // Zeroes what cells that were saved hold, where they are empty now; those that were empty before, too, if `written`.
    // What an empty cell holds is masked, but a NaN spoils whoever computes with it: 0 times NaN is NaN.
    void scrub(bool written);

    size_t bytes() const noexcept;  // saved since begin()

private:
    struct Cache;
    struct Recurrent;
    std::vector<std::unique_ptr<Cache>> caches_;
    std::unique_ptr<Recurrent> recurrent_;
};

// The journal of one call: back to its start, or to the last ubatch that was completed.
class Journal {
public:
    explicit Journal(const Memory & memory) : memory_(memory), origin_(memory), latest_(memory) {}

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

    const Memory & memory_;
    Undo origin_;
    Undo latest_;
    bool keep_ = false;
    uint32_t n_ubatches_ = 0;  // begun; to go back before the first is to go back to the start
    std::vector<llama_seq_id> seqs_;
    std::vector<Held> held_at_start_, held_;      // what the sequences held, to compare after a repair
    std::vector<uint32_t> used_at_start_, used_;  // used cells of each cache
};

}  // namespace llamacancel

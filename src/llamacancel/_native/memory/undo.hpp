// What a stretch of work overwrites in a context's memory, saved before it and put back exactly.
//
// llama.cpp's public interface cannot restore a memory: seq_rm() forgets where the search for a slot stood, a sliding
// window overwrites old cells, and a recurrent state moves on in place. An Undo looks at the memory classes themselves:
// before each ubatch it asks them where the ubatch will go (with their own find_slot()) and keeps the cells and rows
// that will be overwritten there. Restored, a memory is the same to the cell, so that a call done again gives the same
// bits.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "memory/memory.hpp"

struct llama_ubatch;

namespace llamacancel {

// The undo record of one stretch of work: the first content of every cell and row touched since begin().
class Undo {
public:
    explicit Undo(const MemoryParts & memory);
    ~Undo();

    void begin();

    // Lets go of what was saved; with `all`, also of the memory that a recurrent state's copy lay in.
    void forget(bool all);

    // Saves what `ubatch` will overwrite and was not saved since begin(), with the threads that will compute it. False
    // if there is no slot for it.
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

    // Zeroes what cells that were saved hold, where they are empty now; those that were empty before, too, if
    // `written`. What an empty cell holds is masked, but a NaN spoils whoever computes with it: 0 times NaN is NaN.
    void scrub(bool written);

    size_t bytes() const noexcept;  // saved since begin()

private:
    struct Cache;
    struct Recurrent;
    std::vector<std::unique_ptr<Cache>> caches_;
    std::unique_ptr<Recurrent> recurrent_;
};

}  // namespace llamacancel

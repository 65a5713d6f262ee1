// The owning box of a context, with its guarded decode.
//
// It holds the model's box: whoever has a ContextBox has a valid model. Implemented in context.cpp (use, checks, memory
// operations), decode.cpp and state.cpp; DESIGN.md tells how a call is run, stopped and repaired.
#pragma once

#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cancel/call.hpp"
#include "guard/cut.hpp"
#include "guard/outputs.hpp"
#include "llama.h"
#include "memory/journal.hpp"
#include "memory/memory.hpp"
#include "memory/written.hpp"
#include "model/model.hpp"
#include "process/status.hpp"

namespace llamacancel {

enum class OnCancel : uint8_t { Rollback, Keep };
enum class Fate : uint8_t { Completed, RolledBack, Kept, Dirty };

using SequenceTokens = std::map<llama_seq_id, TokenCore::Ptr>;

// The call of a batch whose sequences have tokens of their own. A row is cancelled when all its sequences are;
// a row with a sequence that has no token never is.
Call shared_call(const BatchView & batch, const SequenceTokens & tokens, WhenShared when, OnCancel on_cancel);

// Says for which sequence a token is given that the batch has no row of; "" if there is none.
std::string check_tokens(const BatchView & batch, const SequenceTokens & tokens);

struct SequenceResult {
    llama_seq_id seq;
    Fate fate;
    llama_pos start;  // of its first row in the batch
    llama_pos end;    // follows the last position that the context holds
    bool cancelled;   // its own token was cancelled
};

struct DecodeReport {
    Status status = Status::Done;
    std::string message;
    std::vector<SequenceResult> sequences;
    int32_t rows_done = 0;      // rows that the context holds now
    int32_t n_ubatches = 0;     // that were computed to their ends
    size_t snapshot_bytes = 0;  // saved for the rollback
    double repair_seconds = 0;
    double seconds = 0;
    Verdict verdict;           // of a cancelled call
    double latency = 0;        // seconds from the cancel to the end of the repair
    bool interrupted = false;  // stopped by the interrupt hook, not by a token
};

class ContextBox {
public:
    static Status make(std::shared_ptr<ModelBox> model, llama_context_params params, const Cut & cut, Call & call,
                       std::shared_ptr<ContextBox> & box, std::string & message);
    ~ContextBox();
    ContextBox(const ContextBox &) = delete;
    ContextBox & operator=(const ContextBox &) = delete;

    // One call at a time. With a call that can be cancelled, waits for its turn until then, in the order in which the
    // calls came; else Status::Busy at once. A thread that holds the context already gets Busy, too. Without a call it
    // is for a moment only, and takes a context that is free before those who wait. After Status::Done the caller owes
    // a release().
    Status acquire(Call * call);
    void release() noexcept;

    // All of these want the context acquired.

    // Why nothing can be computed here any more; "" if something can. To be asked before check().
    std::string unusable() const;

    // Says what is wrong with the batch, or "" if llama.cpp can take it.
    std::string check(const BatchView & batch, bool encoding) const;
    std::vector<llama_seq_id> dirty_among(const BatchView & batch) const;

    // `tokens`: those of single sequences, in a batch that several requests share. Their rows are dropped
    // when they are cancelled and the call goes on.
    DecodeReport decode(const BatchView & batch, Call & call, const SequenceTokens & tokens, OnCancel on_cancel);
    DecodeReport encode(const BatchView & batch, Call & call);
    int32_t decode_bare(const BatchView & batch);  // llama_decode() itself, for comparison

    // Status::Invalid with a message, and nothing changed, where part of a sequence cannot go. All of it always can.
    Status remove(llama_seq_id seq, llama_pos p0, llama_pos p1, std::string & message);
    // A copy that is cancelled leaves `to` as it was.
    Status copy(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1, Call & call, std::string & message);
    void keep(llama_seq_id seq);
    // Forgets all sequences, and zeroes what they held; a call that is cancelled meanwhile leaves the rest to the next.
    Status clear(Call & call, std::string & message);

    // After a state was loaded in part: the next clear() has to zero all.
    void wrote_everywhere() noexcept { written_.everywhere(); }

    // The state of one sequence as bytes, and back; polls `call` between tensors. A load that fails or is
    // cancelled leaves the sequence as it was.
    // What a state saved here depends on, as "name=value" in lines: it is of use only where they are the same.
    std::string description() const;
    Status save_state(llama_seq_id seq, Call & call, std::vector<uint8_t> & bytes, std::string & message);
    Status load_state(llama_seq_id seq, const uint8_t * bytes, size_t size, Call & call, std::string & message);

    llama_context * get() const noexcept { return ctx_; }
    const MemoryParts & memory() const noexcept { return memory_; }
    const Cut & cut() const noexcept { return cut_; }
    const Outputs & outputs() const noexcept { return outputs_; }
    const std::set<llama_seq_id> & dirty() const noexcept { return dirty_; }
    bool pooled() const noexcept;
    bool output_all() const noexcept { return output_all_; }
    const std::shared_ptr<ModelBox> & model() const noexcept { return model_; }

private:
    ContextBox(std::shared_ptr<ModelBox> model, llama_context * ctx, const Cut & cut,
               const llama_context_params & params);

    class Decoding;

    // True if a sliding window has dropped what a token at `next` would look back on: going on there would be wrong.
    bool forgot(llama_seq_id seq, llama_pos next) const;

    // Runs `change`, which removes from the memory, and leaves nothing in the cells that it empties.
    void forget(const std::function<void()> & change);

    // Waits until what was written to the memory has arrived; throws if a device that holds some of it is gone.
    void confirm() const;

    // What to say of an exception that came out of llama.cpp.
    std::string explain(const std::exception & error) const;

    // Has the next graph handed over in pieces, see Cut::pieces_at().
    void stop_between(uint32_t n_pieces);

    // Destroyed from the last to the first: the context before its slot, both before the model.
    const std::shared_ptr<ModelBox> model_;
    CallSlot slot_;
    llama_context * const ctx_;
    const Cut cut_;
    const bool output_all_;
    const ggml_type type_k_, type_v_;
    const MemoryParts memory_;
    Journal journal_;
    Written written_;
    Outputs outputs_;
    int32_t reserved_outputs_ = 0;  // for which llama.cpp's buffer has room
    std::set<llama_seq_id> dirty_;
    bool encoded_ = false;  // an encoder's output is there for the decoder
    std::string broken_;    // the assertion of llama.cpp's that failed in here; "" if none did

    struct Waiter {
        const std::thread::id thread;
        std::condition_variable turn;
    };

    std::mutex use_mutex_;
    std::list<Waiter *> line_;  // who waits, in order
    std::thread::id user_;
};

}  // namespace llamacancel

#include "guard/context.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "process/assertions.hpp"
#include "process/exit.hpp"
#include "process/log.hpp"
#include "process/steps.hpp"

namespace llamacancel {

Status ContextBox::make(std::shared_ptr<ModelBox> model, llama_context_params params, const Cut & cut, Call & call,
                        std::shared_ptr<ContextBox> & box, std::string & message) {
    clear_errors();
    message = model->lost_server();
    if (!message.empty()) {
        return Status::Failed;
    }
    try {
        AssertionsThrow net;
        params.n_ubatch = cut.n_ubatch;
        if (llama_context * ctx = model->make_context(params, call)) {
            box.reset(new ContextBox(model, ctx, cut, params));
        } else {
            message = last_errors();
        }
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = error.what();
    }
    const std::string lost = model->lost_server();
    if (!lost.empty()) {
        message = lost;
        box.reset();
    }
    if (call.should_stop()) {
        box.reset();
        return Status::Cancelled;
    }
    return box ? Status::Done : Status::Failed;
}

ContextBox::ContextBox(std::shared_ptr<ModelBox> model, llama_context * ctx, const Cut & cut,
                       const llama_context_params & params)
    : model_(std::move(model)),
      ctx_(ctx),
      cut_(cut),
      output_all_(params.embeddings),
      type_k_(params.type_k),
      type_v_(params.type_v),
      memory_(llama_get_memory(ctx), output_all_),
      journal_(memory_),
      written_(memory_) {
    llama_set_abort_callback(ctx_, [](void * slot) { return CallSlot::trampoline(slot) || exiting(); }, &slot_);
}

ContextBox::~ContextBox() { llama_free(ctx_); }

void ContextBox::stop_between([[maybe_unused]] uint32_t n_pieces) {
    written_.look(cut_.n_ubatch);
#ifdef LLAMACANCEL_PATCHED
    ctx_->n_abort_pieces = static_cast<int>(n_pieces);
    if (cut_.n_pieces > 0 && ctx_->get_sched()) {  // a test: the CPU must not look inside a piece
        for (int i = 0; i < ggml_backend_sched_get_n_backends(ctx_->get_sched()); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(ctx_->get_sched(), i);
            if (ggml_backend_is_cpu(backend)) {
                ggml_backend_cpu_set_abort_callback(backend, nullptr, nullptr);
            }
        }
    }
#endif
}

std::string ContextBox::unusable() const {
    const std::string lost = model_->lost_server();
    if (!lost.empty() || broken_.empty()) {
        return lost;
    }
    return "the context is unusable since an assertion failed in it: " + broken_;
}

void ContextBox::confirm() const {
    model_->confirm();
    const std::string lost = model_->lost_server();
    if (!lost.empty()) {
        throw AssertionFailed(lost);
    }
}

std::string ContextBox::explain(const std::exception & error) const {
    const std::string lost = model_->lost_server();
    return lost.empty() ? error.what() : lost;
}

bool ContextBox::pooled() const noexcept { return output_all_ && llama_pooling_type(ctx_) != LLAMA_POOLING_TYPE_NONE; }

// ---- one call at a time ----------------------------------------------------------------------------------

Status ContextBox::acquire(Call * call) {
    const std::thread::id me = std::this_thread::get_id();
    std::unique_lock<std::mutex> lock(use_mutex_);
    const auto is_free = [&] {
        if (user_ != std::thread::id() && parked(user_)) {
            user_ = std::thread::id();  // the interpreter exits, and that thread uses nothing any more
        }
        return user_ == std::thread::id();
    };
    // A signal handler runs on a thread that waits itself: its call goes first, or each would wait for the other.
    const auto place =
        std::find_if(line_.begin(), line_.end(), [&](const Waiter * waiter) { return waiter->thread == me; });
    if (!is_free() || (call && place != line_.begin())) {
        if (!call || call->watches().empty() || user_ == me) {
            return Status::Busy;
        }
        Waiter waiter{me, {}};
        const auto self = line_.insert(place, &waiter);
        bool stop = false;
        while (!stop && (!is_free() || line_.front() != &waiter)) {
            // Unlocked: on the main thread the call may want the GIL, which another thread may hold in release().
            lock.unlock();
            stop = call->should_stop();
            lock.lock();
            if (!stop && (!is_free() || line_.front() != &waiter)) {
                waiter.turn.wait_for(lock, std::chrono::milliseconds(2));
            }
        }
        line_.erase(self);
        if (stop) {
            if (is_free() && !line_.empty()) {
                line_.front()->turn.notify_one();
            }
            return Status::Cancelled;
        }
    }
    user_ = me;
    if (call) {
        written_.look();
    }
    return Status::Done;
}

void ContextBox::release() noexcept {
    std::lock_guard<std::mutex> lock(use_mutex_);
    user_ = std::thread::id();
    if (!line_.empty()) {
        line_.front()->turn.notify_one();  // locked: it lies on the stack of a thread that may leave
    }
}

// ---- checks ----------------------------------------------------------------------------------------------

namespace {

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

std::string ContextBox::check(const BatchView & batch, bool encoding) const {
    const int32_t n_vocab = llama_vocab_n_tokens(model_->vocab());
    const int32_t n_seq_max = llama_n_seq_max(ctx_);
    const int32_t n_batch = llama_n_batch(ctx_);
    const int32_t n_ubatch = llama_n_ubatch(ctx_);
    const bool has_encoder = llama_model_has_encoder(model_->get());

    if (batch.n_rows == 0) {
        return "the batch is empty";
    }
    if (batch.n_rows > n_batch) {
        return "the batch has " + text(batch.n_rows) + " rows, and the context's n_batch is " + text(n_batch);
    }
    if (batch.embd) {
        const int32_t n_embd = llama_model_n_embd_inp(model_->get());
        if (batch.n_embd != n_embd) {
            return "the batch's embeddings have " + text(batch.n_embd) + " elements a row; the model takes " +
                   text(n_embd);
        }
        if (model_->positions_per_embd() > 1) {
            return "the model wants " + text(model_->positions_per_embd()) +
                   " positions for each embedding (M-RoPE), which a batch does not carry";
        }
    }
    if (encoding && memory_.memory && !has_encoder) {
        return "the model has no encoder: use decode()";
    }
    if (!encoding && has_encoder && memory_.memory && !encoded_) {
        return "the decoder has no encoder output to attend to: call encode() first";
    }
    const bool one_ubatch = encoding || !memory_.memory || !llama_get_causal_attn(ctx_);
    if (one_ubatch && batch.n_rows > n_ubatch) {
        return "attention that is not causal needs the batch in one piece: it has " + text(batch.n_rows) +
               " rows, and the context's n_ubatch is " + text(n_ubatch);
    }

    struct Sequence {
        int32_t last_row = -1;
        int32_t n_rows = 0;
        int32_t named_in = -1;  // the last row that names it
        llama_pos held_from = -1, held_to = -1;
    };
    std::vector<Sequence> sequences(n_seq_max);
    const bool may_share = memory_.split == Split::Simple || memory_.split == Split::Equal;
    const bool mrope = model_->positions_per_embd() > 1;
    const int32_t max_positions = model_->max_positions();
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        const auto in_row = [row](const std::string & what) { return "row " + text(row) + ": " + what; };
        const llama_pos pos = batch.pos[row];
        if (batch.token && (batch.token[row] < 0 || batch.token[row] >= n_vocab)) {
            return in_row("token " + text(batch.token[row]) + " is outside of the vocabulary (0 to " +
                          text(n_vocab - 1) + ")");
        }
        if (pos < 0) {
            return in_row("position " + text(pos) + " is negative");
        }
        if (max_positions > 0 && pos >= max_positions) {
            return in_row("position " + text(pos) + " is none that the model has learned (0 to " +
                          text(max_positions - 1) + ")");
        }
        const int32_t * const begin = batch.seqs_begin(row);
        const int32_t * const end = batch.seqs_end(row);
        if (begin == end) {
            return in_row("it belongs to no sequence");
        }
        if (end - begin > 1 && !may_share) {
            return in_row(
                std::string("a row of several sequences needs a cache that they share (") +
                (memory_.recurrent ? "this model's state is recurrent" : "make the context with kv_unified=True") +
                ")");
        }
        for (const int32_t * seq = begin; seq != end; ++seq) {
            if (*seq < 0 || *seq >= n_seq_max) {
                return in_row("sequence id " + text(*seq) + " is outside of 0 to " + text(n_seq_max - 1) +
                              " (n_seq_max is " + text(n_seq_max) + ")");
            }
            Sequence & sequence = sequences[*seq];
            if (sequence.named_in == row) {
                return in_row("sequence id " + text(*seq) + " is named twice");
            }
            if (sequence.named_in < 0) {
                sequence.held_from = memory_.pos_min(*seq);
                sequence.held_to = memory_.pos_max(*seq);
            }
            sequence.named_in = row;
        }
        // Sequences may part from one another in a batch and never join: those of a row had their last row in common,
        // or none had one.
        const Sequence & first = sequences[*begin];
        const int32_t last_row = first.last_row;
        const int32_t * const joins =
            std::find_if(begin, end, [&](int32_t seq) { return sequences[seq].last_row != last_row; });
        for (const int32_t * seq = begin; seq != end; ++seq) {
            const Sequence & sequence = sequences[*seq];
            const llama_pos held = sequence.held_to;
            if (encoding && held >= 0) {
                return in_row("the decoder holds positions of sequence " + text(*seq) +
                              ": remove them from the memory before encoding anew");
            }
            if (sequence.last_row >= 0) {
                const llama_pos before = batch.pos[sequence.last_row];
                if (mrope ? pos < before : pos != before + 1) {
                    return in_row("position " + text(pos) + " of sequence " + text(*seq) +
                                  " does not follow on position " + text(before) + " in row " +
                                  text(sequence.last_row));
                }
                if (joins != end) {
                    return in_row("sequence " + text(*seq) + " joins a row of sequences that it did not share row " +
                                  text(sequence.last_row) + " with");
                }
            } else {
                if (held >= 0 && (mrope ? pos <= held : pos != held + 1)) {
                    return in_row("position " + text(pos) + " of sequence " + text(*seq) +
                                  " does not follow on what the context holds (up to position " + text(held) + ")");
                }
                if (first.held_from != sequence.held_from || first.held_to != sequence.held_to) {
                    return in_row("sequences " + text(*begin) + " and " + text(*seq) +
                                  " share the row, but the context holds different positions of them");
                }
            }
        }
        for (const int32_t * seq = begin; seq != end; ++seq) {
            sequences[*seq].last_row = row;
            sequences[*seq].n_rows += 1;
        }
        if (pos == std::numeric_limits<int32_t>::max()) {
            return in_row("position " + text(pos) + " leaves none to go on from");
        }
    }
    if (pooled()) {
        for (int32_t seq = 0; seq < n_seq_max; ++seq) {
            if (sequences[seq].n_rows > n_ubatch) {
                return "sequence " + text(seq) + " has " + text(sequences[seq].n_rows) +
                       " rows, and pooling needs it in one ubatch (n_ubatch is " + text(n_ubatch) + ")";
            }
        }
    }
    return "";
}

std::string check_tokens(const BatchView & batch, const SequenceTokens & tokens) {
    std::set<llama_seq_id> absent;
    for (const auto & [seq, token] : tokens) {
        absent.insert(seq);
    }
    for (int32_t row = 0; row < batch.n_rows && !absent.empty(); ++row) {
        for (const int32_t * seq = batch.seqs_begin(row); seq != batch.seqs_end(row); ++seq) {
            absent.erase(*seq);
        }
    }
    return absent.empty()
               ? ""
               : "a token is given for sequence " + text(*absent.begin()) + ", which has no row in the batch";
}

std::vector<llama_seq_id> ContextBox::dirty_among(const BatchView & batch) const {
    std::set<llama_seq_id> found;
    for (const int32_t * seq = batch.seq_id; !dirty_.empty() && seq != batch.seqs_end(batch.n_rows - 1); ++seq) {
        if (dirty_.count(*seq)) {
            found.insert(*seq);
        }
    }
    return {found.begin(), found.end()};
}

std::string ContextBox::description() const {
    const llama_cparams & params = ctx_->get_cparams();
    std::string said;
    const auto say = [&](const char * name, const std::string & value) { said += name + ("=" + value) + "\n"; };
    const auto say_number = [&](const char * name, double value) {
        char number[32];
        std::snprintf(number, sizeof(number), "%.9g", value);
        say(name, number);
    };
    say("model", model_->identity());
    say("memory", name_of(memory_.kind));
    if (memory_.kind != MemoryKind::Recurrent) {
        say("type_k", ggml_type_name(type_k_));
        say("type_v", ggml_type_name(type_v_));
        say("flash_attn", params.flash_attn ? "on" : "off");  // how values lie in the cache
        say("causal_attn", params.causal_attn ? "on" : "off");
        say_number("rope_freq_base", params.rope_freq_base);
        say_number("rope_freq_scale", params.rope_freq_scale);
        say_number("yarn_ext_factor", params.yarn_ext_factor);
        say_number("yarn_attn_factor", params.yarn_attn_factor);
        say_number("yarn_beta_fast", params.yarn_beta_fast);
        say_number("yarn_beta_slow", params.yarn_beta_slow);
        say_number("yarn_orig_ctx", params.n_ctx_orig_yarn);
        const llama_hparams & hparams = model_->get()->hparams;
        const auto & layers = model_->get()->layers;
        if (std::any_of(layers.begin(), layers.end(), [](const llama_layer & layer) { return layer.rope_long; })) {
            say("rope_factors", params.n_ctx_seq > hparams.n_ctx_orig_yarn ? "long" : "short");
        }
    }
    return said;
}

// ---- memory ----------------------------------------------------------------------------------------------

bool ContextBox::forgot(llama_seq_id seq, llama_pos next) const {
    const llama_pos looks_back_to = std::max(0, next - llama_model_n_swa(model_->get()) + 1);
    return memory_.forgets() && looks_back_to < memory_.pos_min(seq);
}

void ContextBox::forget(const std::function<void()> & change) {
    written_.look();
    try {
        AssertionsThrow net;
        forget_by(memory_, change);
    } catch (const AssertionFailed & error) {  // on a device that is gone
        broken_ = error.what();
    }
}

Status ContextBox::remove(llama_seq_id seq, llama_pos p0, llama_pos p1, std::string & message) {
    const InFlight in_flight;
    const llama_pos last = memory_.pos_max(seq);
    const bool whole = p0 <= 0 && (p1 < 0 || p1 > last);
    if (!whole && p0 <= last && forgot(seq, p0)) {
        message = "a sliding window has forgotten what position " + std::to_string(p0) +
                  " would look back on: remove the whole of the sequence";
        return Status::Invalid;
    }
    // llama.cpp takes the middle of a recurrent sequence for removed, and removes it from the attention part alone.
    const bool middle = !whole && memory_.recurrent && p0 <= last && p1 >= 0 && p0 < p1;
    bool removed = false;
    if (!middle) {
        forget([&] { removed = memory_.memory->seq_rm(seq, whole ? -1 : p0, whole ? -1 : p1); });
    }
    if (removed) {
        if (whole) {
            dirty_.erase(seq);
        }
        return Status::Done;
    }
    message = unusable();
    if (!message.empty()) {
        return Status::Failed;
    }
    message = "part of a recurrent state cannot be removed: remove the whole of the sequence";
    return Status::Invalid;
}

Status ContextBox::copy(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1, Call & call,
                        std::string & message) {
    const InFlight in_flight;
    const auto refused = [&](std::string why) {
        message = std::move(why);
        return Status::Invalid;
    };
    const llama_pos first = memory_.pos_min(from), last = memory_.pos_max(from);
    if (from == to || last < 0) {
        return Status::Done;
    }
    const bool whole = p0 <= first && (p1 < 0 || p1 > last);
    if (!whole && memory_.recurrent) {
        return refused("a recurrent state can be copied as a whole only");
    }
    const bool streams = !memory_.caches.empty() && memory_.caches[0]->get_n_stream() > 1;
    if (!whole && streams) {
        return refused(
            "sequences with a cache of their own can be copied as a whole only (make the context with "
            "kv_unified=True)");
    }
    if (!whole && p1 >= 0 && p1 <= last && forgot(from, p1)) {
        return refused("a sliding window has forgotten what position " + std::to_string(p1) +
                       " would look back on: copy the whole of the sequence");
    }
    const llama_pos held = memory_.pos_max(to);
    if (held >= 0 && (whole || held + 1 != std::max(p0, first))) {
        return refused("sequence " + std::to_string(to) + " holds positions up to " + std::to_string(held) +
                       "; remove it first");
    }
    try {
        AssertionsThrow net;
        if (streams) {
            llama_synchronize(ctx_);
            copy_streams(memory_, from, to, [&] {
                if (call.should_stop() || exiting()) {
                    throw Stopped{};
                }
            });
        } else {
            memory_.memory->seq_cp(from, to, whole ? -1 : p0, whole ? -1 : p1);
        }
        confirm();
        return Status::Done;
    } catch (const Stopped &) {
        forget([&] { memory_.memory->seq_rm(to, -1, -1); });
        return Status::Cancelled;
    } catch (const AssertionFailed & error) {
        broken_ = error.what();
        message = explain(error);
        memory_.memory->seq_rm(to, -1, -1);
        return Status::Failed;
    }
}

void ContextBox::keep(llama_seq_id seq) {
    const InFlight in_flight;
    forget([&] {
        memory_.memory->seq_keep(seq);
        // With a cache for each sequence, llama.cpp looks at that of `seq` alone.
        for (llama_seq_id other = 0; other < llama_seq_id(llama_n_seq_max(ctx_)); ++other) {
            if (other != seq) {
                memory_.memory->seq_rm(other, -1, -1);
            }
        }
    });
    const bool dirty = dirty_.count(seq) != 0;
    dirty_.clear();
    if (dirty) {
        dirty_.insert(seq);
    }
}

Status ContextBox::clear(Call & call, std::string & message) {
    const InFlight in_flight;
    if (call.should_stop() || exiting()) {
        return Status::Cancelled;
    }
    try {
        AssertionsThrow net;
        llama_synchronize(ctx_);
        written_.clear([&] { return call.should_stop() || exiting(); });
        confirm();
    } catch (const AssertionFailed & error) {
        broken_ = error.what();
        message = explain(error);
        return Status::Failed;
    }
    dirty_.clear();
    return Status::Done;
}

}  // namespace llamacancel

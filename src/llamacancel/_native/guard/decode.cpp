#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "guard/context.hpp"
#include "llama-batch.h"
#include "process/assertions.hpp"
#include "process/exit.hpp"
#include "process/log.hpp"

namespace llamacancel {

namespace {

double seconds_since(int64_t start_ns) { return (now_ns() - start_ns) * 1e-9; }

// The rows of one ubatch as the arrays that llama.cpp takes, in both of its shapes.
class UbatchArrays {
public:
    UbatchArrays(const BatchView & batch, const Ubatch & ubatch) {
        const size_t n = ubatch.rows.size();
        pos_.reserve(n);
        for (int32_t row : ubatch.rows) {
            if (batch.token) {
                token_.push_back(batch.token[row]);
            } else {
                embd_.insert(embd_.end(), batch.embd + size_t(row) * batch.n_embd,
                             batch.embd + size_t(row + 1) * batch.n_embd);
            }
            pos_.push_back(batch.pos[row]);
            n_seq_id_.push_back(batch.seqs_end(row) - batch.seqs_begin(row));
            seq_id_.push_back(const_cast<llama_seq_id *>(batch.seqs_begin(row)));
            output_.push_back(batch.output[row]);
            unique_.insert(unique_.end(), batch.seqs_begin(row), batch.seqs_end(row));
        }
        std::sort(unique_.begin(), unique_.end());
        unique_.erase(std::unique(unique_.begin(), unique_.end()), unique_.end());
        n_seqs_ = ubatch.n_seqs;
    }

    llama_batch as_batch() {
        return {static_cast<int32_t>(pos_.size()),
                token_.empty() ? nullptr : token_.data(),
                embd_.empty() ? nullptr : embd_.data(),
                pos_.data(),
                n_seq_id_.data(),
                seq_id_.data(),
                output_.data()};
    }

    // What find_slot() reads of a ubatch.
    llama_ubatch as_ubatch() {
        llama_ubatch ubatch = {};
        ubatch.b_equal_seqs = true;
        ubatch.n_tokens = pos_.size();
        ubatch.n_seq_tokens = pos_.size() / n_seqs_;
        ubatch.n_seqs = n_seqs_;
        ubatch.n_seqs_unq = unique_.size();
        ubatch.n_pos = 1;
        ubatch.pos = pos_.data();
        ubatch.n_seq_id = n_seq_id_.data();
        ubatch.seq_id = seq_id_.data();
        ubatch.seq_id_unq = unique_.data();
        return ubatch;
    }

    const std::vector<llama_seq_id> & sequences() const { return unique_; }

private:
    std::vector<llama_token> token_;
    std::vector<float> embd_;
    std::vector<llama_pos> pos_;
    std::vector<int32_t> n_seq_id_;
    std::vector<llama_seq_id *> seq_id_;
    std::vector<int8_t> output_;
    std::vector<llama_seq_id> unique_;
    uint32_t n_seqs_;
};

Ubatch whole(const BatchView & batch) {
    Ubatch ubatch;
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        ubatch.rows.push_back(row);
    }
    ubatch.n_seqs = batch.n_rows;
    ubatch.last = true;
    return ubatch;
}

}  // namespace

Call shared_call(const BatchView & batch, const SequenceTokens & tokens, WhenShared when, OnCancel on_cancel) {
    std::set<std::vector<llama_seq_id>> groups;  // sequences that rows belong to
    for (int32_t row = 0; row < batch.n_rows; ++row) {
        groups.emplace(batch.seqs_begin(row), batch.seqs_end(row));
    }
    std::vector<Call::Watch> watches;
    for (const auto & seqs : groups) {
        Call::Watch watch{nullptr, {}};
        for (llama_seq_id seq : seqs) {
            const auto token = tokens.find(seq);
            if (token == tokens.end()) {
                watch.token = nullptr;
                break;
            }
            (watch.token ? watch.also.emplace_back() : watch.token) = token->second;
        }
        if (watch.token) {
            watches.push_back(std::move(watch));
        }
    }
    const bool every_row = watches.size() == groups.size();
    return Call(std::move(watches), every_row, when, on_cancel == OnCancel::Keep);
}

// One call from its first ubatch to its report.
class ContextBox::Decoding {
public:
    Decoding(ContextBox & box, const BatchView & batch, Call & call, const SequenceTokens & tokens, OnCancel on_cancel,
             bool encoding)
        : box_(box),
          batch_(batch),
          call_(call),
          tokens_(tokens),
          keep_(on_cancel == OnCancel::Keep),
          encoding_(encoding) {
        for (int32_t row = 0; row < batch.n_rows; ++row) {
            for (const int32_t * seq = batch.seqs_begin(row); seq != batch.seqs_end(row); ++seq) {
                sequences_.try_emplace(*seq, Sequence{batch.pos[row], batch.pos[row], false});
            }
        }
    }

    DecodeReport run() {
        const int64_t start = now_ns();
        if (call_.should_stop()) {
            stopped(false);
        } else {
            std::vector<llama_seq_id> seqs;
            for (const auto & [seq, sequence] : sequences_) {
                seqs.push_back(seq);
            }
            if (!encoding_) {
                box_.journal_.begin(std::move(seqs), keep_);  // once: what it saved stays true when it was put back
            }
            clear_errors();
            try {
                AssertionsThrow net;
                CallSlot::Armed armed(box_.slot_, call_);
                do {
                    begin();
                } while (compute_all() && runs_again());
                box_.journal_.scrub();
            } catch (const std::bad_alloc &) {
                outputs_ = {};
                failed(Status::NoMemory, "out of memory");
            } catch (const std::exception & error) {
                broken(error);
                failed(Status::Failed, box_.explain(error));
            }
        }
        report_.seconds = seconds_since(start);
        describe();
        box_.journal_.end();
        return std::move(report_);
    }

private:
    struct Sequence {
        llama_pos start;
        llama_pos end;
        bool cancelled;
        bool dirty = false;
        bool rolled_back = false;
    };

    void begin() {
        any_done_ = false;
        outputs_ = {};
        outputs_.row_slot.assign(batch_.n_rows, -1);
        outputs_.n_vocab = llama_vocab_n_tokens(box_.model_->vocab());
        outputs_.n_embd = llama_model_n_embd_out(box_.model_->get());
    }

    // False if the call was stopped or failed, and has been repaired.
    bool compute_all() {
        Cutter cutter(batch_, box_.cut_, encoding_ ? Split::Simple : box_.memory_.split, box_.output_all_,
                      box_.pooled() && !encoding_);
        cutter.drop([&](int32_t row) { return batch_.seqs_begin(row) == batch_.seqs_end(row); });
        Ubatch ubatch;
        while (true) {
            drop_cancelled(cutter);  // first: whose rows are all dropped is told to stop
            if (call_.should_stop() || exiting()) {
                return stopped(false);
            }
            if (!cutter.next(ubatch)) {
                break;
            }
            UbatchArrays arrays(batch_, ubatch);
            if (!encoding_ && !box_.journal_.before(arrays.as_ubatch(), n_threads(ubatch))) {
                return failed(Status::Full, "the context's memory has no room for the batch");
            }
            protect_outputs(ubatch);
            call_.begin_ubatch(tokens_of(arrays.sequences()));
            const int32_t code = compute(arrays.as_batch());
            if (code == 2 && (call_.stopped() || exiting())) {
                return stopped(true);
            }
            if (code == 2 && call_.stopped_inside()) {
                repair(true);
                const std::string why = box_.unusable();
                if (any_dirty() || !why.empty()) {
                    return failed(Status::Failed, why.empty() ? "a stopped ubatch could not be repaired" : why);
                }
                continue;
            }
            if (code == 1) {
                return failed(Status::Full, "the context's memory has no room for the batch");
            }
            if (code != 0) {
                return failed(Status::Failed, explain(code));
            }
            collect(ubatch, arrays);
            if (ubatch.last) {
                cancelled_meanwhile();
                break;
            }
        }
        return true;
    }

    // Those who may want a ubatch, if it can be undone by itself.
    std::vector<TokenCore *> tokens_of(const std::vector<llama_seq_id> & seqs) const {
        std::vector<TokenCore *> tokens;
        if (!keep_ || encoding_ || !box_.memory_.restorable()) {
            return tokens;
        }
        tokens.reserve(seqs.size());
        for (llama_seq_id seq : seqs) {
            const auto token = tokens_.find(seq);
            if (token == tokens_.end()) {
                return {};
            }
            tokens.push_back(token->second.get());
        }
        return tokens;
    }

    bool any_dirty() const {
        return std::any_of(sequences_.begin(), sequences_.end(), [](const auto & entry) { return entry.second.dirty; });
    }

    // With which llama.cpp computes so many rows.
    int n_threads(const Ubatch & ubatch) const {
        return ubatch.rows.size() > 1 ? llama_n_threads_batch(box_.ctx_) : llama_n_threads(box_.ctx_);
    }

    int32_t compute(llama_batch batch) {
        QuietLog quiet(call_.stopped_inside());
        box_.stop_between(box_.cut_.pieces_at(batch.n_tokens, batch.pos[batch.n_tokens - 1] + 1));
        const bool touched = std::exchange(box_.journal_.touched, true);
        const int32_t code = encoding_ ? llama_encode(box_.ctx_, batch) : llama_decode(box_.ctx_, batch);
        if (code == 1) {  // no room: found before the graph
            box_.journal_.touched = touched;
        }
        llama_synchronize(box_.ctx_);
        const std::string lost = box_.model_->lost_server();
        if (!lost.empty()) {
            throw AssertionFailed(lost);  // whatever the code says: outputs never came
        }
        return code;
    }

    void broken(const std::exception & error) { box_.broken_ = error.what(); }

    std::string explain(int32_t code) const {
        const std::string errors = last_errors();
        return "llama.cpp returned " + std::to_string(code) + (errors.empty() ? "" : ": " + errors);
    }

    // A token for each sequence: rows whose sequences are all cancelled are left out from now on.
    void drop_cancelled(Cutter & cutter) {
        bool any = false;
        for (const auto & [seq, token] : tokens_) {
            const auto sequence = sequences_.find(seq);
            if (sequence != sequences_.end() && !sequence->second.cancelled && token->poll()) {
                sequence->second.cancelled = any = true;
            }
        }
        if (any) {
            cutter.drop([&](int32_t row) {
                return std::all_of(batch_.seqs_begin(row), batch_.seqs_end(row),
                                   [&](llama_seq_id seq) { return sequences_.at(seq).cancelled; });
            });
        }
    }

    // The last ubatch is through, and its outputs are where those of the call before were: the call is not stopped any
    // more. Sequences that were cancelled meanwhile are put back beside a survivor; without one, it came too late.
    void cancelled_meanwhile() {
        std::vector<Sequence *> cancelled;
        bool survivor = false;
        for (auto & [seq, sequence] : sequences_) {
            const auto token = tokens_.find(seq);
            if (!sequence.cancelled && token != tokens_.end() && token->second->poll()) {
                cancelled.push_back(&sequence);
            } else {
                survivor = survivor || !sequence.cancelled;
            }
        }
        for (Sequence * sequence : cancelled) {
            sequence->cancelled = survivor;
        }
    }

    // True if the call may yet be run again, and cancelled in that.
    bool may_run_again() const { return !keep_ && !tokens_.empty() && box_.memory_.forgets(); }

    // The outputs of the call before stay readable until this one is sure to succeed.
    void protect_outputs(const Ubatch & ubatch) {
        int32_t n = 0;
        for (int32_t row : ubatch.rows) {
            n += is_output(row);
        }
        n = std::max<int32_t>(n, llama_n_seq_max(box_.ctx_));
        if (((!ubatch.last || may_run_again()) && n > 0) || n > box_.reserved_outputs_) {
            box_.outputs_.own();
        }
        box_.reserved_outputs_ = std::max(box_.reserved_outputs_, n);
    }

    bool is_output(int32_t row) const { return encoding_ || box_.output_all_ || batch_.output[row] != 0; }

    void collect(const Ubatch & ubatch, const UbatchArrays & arrays) {
        ++report_.n_ubatches;
        for (int32_t row : ubatch.rows) {
            for (const int32_t * seq = batch_.seqs_begin(row); seq != batch_.seqs_end(row); ++seq) {
                sequences_.at(*seq).end = batch_.pos[row] + 1;
            }
        }
        any_done_ = true;

        const size_t before = outputs_.rows.size();
        for (int32_t row : ubatch.rows) {
            if (is_output(row)) {
                outputs_.add(row);
            }
        }
        const size_t added = outputs_.rows.size() - before;
        if (added == 0) {
            return;
        }
        if (box_.pooled()) {
            const bool rank = llama_pooling_type(box_.ctx_) == LLAMA_POOLING_TYPE_RANK;
            const size_t width = rank ? llama_model_n_cls_out(box_.model_->get()) : outputs_.n_embd;
            for (llama_seq_id seq : arrays.sequences()) {
                if (const float * values = llama_get_embeddings_seq(box_.ctx_, seq)) {
                    outputs_.pooled[seq].assign(values, values + width);
                }
            }
            return;
        }
        if (box_.output_all_) {
            const float * values = llama_get_embeddings(box_.ctx_);
            outputs_.own_embeddings.insert(outputs_.own_embeddings.end(), values, values + added * outputs_.n_embd);
        }
        if (encoding_ && !llama_model_is_diffusion(box_.model_->get())) {
            return;  // an encoder has no logits; a model that computes without a memory may have some
        }
        const float * logits = llama_get_logits(box_.ctx_);
        if (ubatch.last && before == 0) {
            outputs_.borrowed = logits;
        } else {
            outputs_.own_logits.insert(outputs_.own_logits.end(), logits, logits + added * outputs_.n_vocab);
        }
    }

    void adopt_outputs() {
        for (int32_t row = 0; row < batch_.n_rows; ++row) {
            const bool gone = std::all_of(batch_.seqs_begin(row), batch_.seqs_end(row),
                                          [&](llama_seq_id seq) { return sequences_.at(seq).rolled_back; });
            if (is_output(row) && (gone || outputs_.row_slot[row] < 0)) {
                outputs_.row_slot[row] = Outputs::kCancelled;
            }
        }
        for (const auto & [seq, sequence] : sequences_) {
            if (sequence.rolled_back) {
                outputs_.pooled.erase(seq);
            }
        }
        outputs_.finish();
        box_.outputs_ = std::move(outputs_);
    }

    // The last ubatch is through. True if the call was rolled back and is to be run again, without the cancelled ones.
    bool runs_again() {
        std::vector<Journal::Added> cancelled;
        for (auto & [seq, sequence] : sequences_) {
            if (sequence.cancelled && !keep_) {
                sequence.rolled_back = true;
                if (sequence.end > sequence.start) {
                    cancelled.push_back({seq, sequence.start});
                }
            }
        }
        if (!cancelled.empty()) {
            const int64_t start = now_ns();
            const auto dirty = box_.journal_.rollback_beside(cancelled);
            if (dirty) {
                for (llama_seq_id seq : *dirty) {
                    sequences_.at(seq).dirty = true;
                }
                box_.confirm();
            }
            report_.repair_seconds += seconds_since(start);
            if (!dirty) {
                repair(false);
                if (any_dirty()) {
                    return failed(Status::Failed, "a sequence that was cancelled could not be put back");
                }
                leave_out_cancelled();
                return true;
            }
        }
        adopt_outputs();
        box_.encoded_ = box_.encoded_ || encoding_;
        return false;
    }

    // From here on the batch is as if the cancelled sequences had never been in it.
    void leave_out_cancelled() {
        seq_offset_.assign(1, 0);
        std::vector<int32_t> left;
        for (int32_t row = 0; row < batch_.n_rows; ++row) {
            std::copy_if(batch_.seqs_begin(row), batch_.seqs_end(row), std::back_inserter(left),
                         [&](llama_seq_id seq) { return !sequences_.at(seq).cancelled; });
            seq_offset_.push_back(left.size());
        }
        seq_id_ = std::move(left);
        batch_.seq_offset = seq_offset_.data();
        batch_.seq_id = seq_id_.data();
        for (auto & [seq, sequence] : sequences_) {
            sequence.end = sequence.start;
        }
    }

    // The call stops here; `inside`: in the middle of a ubatch, of which llama.cpp has left something.
    bool stopped(bool inside) {
        report_.status = Status::Cancelled;
        for (auto & [seq, sequence] : sequences_) {
            const auto token = tokens_.find(seq);
            sequence.cancelled = tokens_.empty() || (token != tokens_.end() && token->second->poll());
        }
        if (!encoding_ && (inside || (any_done_ && !keep_))) {
            repair(keep_);
        }
        if (const std::string why = box_.unusable(); !why.empty()) {
            report_.status = Status::Failed;
            report_.message = why;
            rolled_back();
            return false;
        }
        if (keep_ && any_done_) {
            adopt_outputs();
        }
        if (!keep_) {
            rolled_back();
        }
        report_.interrupted = call_.stopped_by_interrupt();
        if (report_.interrupted) {
            report_.verdict.cause = Cause::Interrupt;
            report_.verdict.at_ns = call_.interrupted_at_ns();
        } else if (const Verdict * verdict = call_.verdict()) {
            report_.verdict = *verdict;
        } else {
            report_.verdict = {Cause::Shutdown, "the interpreter exits", now_ns()};
        }
        report_.latency = seconds_since(report_.verdict.at_ns);
        return false;
    }

    bool failed(Status status, std::string message) {
        report_.status = status;
        report_.message = std::move(message);
        if (!encoding_) {
            repair(false);
        }
        rolled_back();
        return false;
    }

    void repair(bool last_ubatch_only) {
        const int64_t start = now_ns();
        try {
            AssertionsThrow net;
            for (llama_seq_id seq : last_ubatch_only ? box_.journal_.rollback_last() : box_.journal_.rollback()) {
                sequences_.at(seq).dirty = true;
            }
            box_.confirm();
        } catch (const std::exception & error) {
            // No room is left for it, or what the context holds is on a device that is gone.
            if (!dynamic_cast<const std::bad_alloc *>(&error)) {
                broken(error);
            }
            for (auto & [seq, sequence] : sequences_) {
                sequence.dirty = true;
            }
        }
        report_.repair_seconds += seconds_since(start);
    }

    void rolled_back() {
        for (auto & [seq, sequence] : sequences_) {
            sequence.rolled_back = true;
        }
    }

    void describe() {
        for (const auto & [seq, sequence] : sequences_) {
            if (sequence.dirty) {
                box_.dirty_.insert(seq);
            }
            const Fate fate = sequence.dirty                                              ? Fate::Dirty
                              : sequence.rolled_back                                      ? Fate::RolledBack
                              : report_.status == Status::Cancelled || sequence.cancelled ? Fate::Kept
                                                                                          : Fate::Completed;
            const llama_pos end =
                sequence.rolled_back ? std::min(sequence.start, box_.memory_.pos_max(seq) + 1) : sequence.end;
            report_.sequences.push_back({seq, fate, sequence.start, end, sequence.cancelled});
        }
        for (int32_t row = 0; row < batch_.n_rows; ++row) {
            report_.rows_done += std::any_of(batch_.seqs_begin(row), batch_.seqs_end(row), [&](llama_seq_id seq) {
                const Sequence & sequence = sequences_.at(seq);
                return !sequence.rolled_back && batch_.pos[row] < sequence.end;
            });
        }
        report_.snapshot_bytes = box_.journal_.bytes();
    }

    ContextBox & box_;
    BatchView batch_;
    std::vector<int32_t> seq_offset_, seq_id_;  // of batch_, where some sequences were left out
    Call & call_;
    const SequenceTokens & tokens_;
    const bool keep_;
    const bool encoding_;
    std::map<llama_seq_id, Sequence> sequences_;
    Outputs outputs_;
    bool any_done_ = false;
    DecodeReport report_;
};

DecodeReport ContextBox::decode(const BatchView & batch, Call & call, const SequenceTokens & tokens,
                                OnCancel on_cancel) {
    const InFlight in_flight;
    return Decoding(*this, batch, call, tokens, on_cancel, !memory_.memory).run();
}

DecodeReport ContextBox::encode(const BatchView & batch, Call & call) {
    const InFlight in_flight;
    return Decoding(*this, batch, call, {}, OnCancel::Rollback, true).run();
}

int32_t ContextBox::decode_bare(const BatchView & batch) {
    const InFlight in_flight;
    UbatchArrays arrays(batch, whole(batch));
    stop_between(0);  // as a call before may have left it
    const int32_t code = llama_decode(ctx_, arrays.as_batch());
    llama_synchronize(ctx_);
    return code;
}

}  // namespace llamacancel

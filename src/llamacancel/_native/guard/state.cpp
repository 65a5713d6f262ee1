#include <algorithm>
#include <cstring>

#include "ggml-backend.h"
#include "guard/context.hpp"
#include "llama-io.h"
#include "memory/undo.hpp"
#include "process/assertions.hpp"
#include "process/exit.hpp"
#include "process/log.hpp"

namespace llamacancel {

namespace {

constexpr size_t kPiece = 4 << 20;  // bytes copied between two polls

struct Cancelled {};

void poll(Call & call) {
    if (call.should_stop() || exiting()) {
        throw Cancelled();
    }
}

class Writer : public llama_io_write_i {
public:
    Writer(Call & call, std::vector<uint8_t> & bytes) : call_(call), bytes_(bytes) {}

    void write(const void * src, size_t size) override {
        const uint8_t * from = static_cast<const uint8_t *>(src);
        bytes_.insert(bytes_.end(), from, from + size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        for (size_t done = 0; done < size; done += kPiece) {
            poll(call_);
            const size_t piece = std::min(kPiece, size - done);
            bytes_.resize(bytes_.size() + piece);
            ggml_backend_tensor_get(tensor, bytes_.data() + bytes_.size() - piece, offset + done, piece);
        }
    }

    size_t n_bytes() override { return bytes_.size(); }

private:
    Call & call_;
    std::vector<uint8_t> & bytes_;
};

class Reader : public llama_io_read_i {
public:
    Reader(Call & call, const uint8_t * bytes, size_t size) : call_(call), bytes_(bytes), size_(size) {}

    void read(void * dst, size_t size) override { std::memcpy(dst, take(size), size); }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        for (size_t done = 0; done < size; done += kPiece) {
            poll(call_);
            const size_t piece = std::min(kPiece, size - done);
            ggml_backend_tensor_set(tensor, take(piece), offset + done, piece);
        }
    }

    size_t n_bytes() override { return at_; }
    bool at_end() const { return at_ == size_; }

private:
    const uint8_t * take(size_t size) {
        if (size > size_ - at_) {
            throw std::runtime_error("the state ends too early");
        }
        at_ += size;
        return bytes_ + at_ - size;
    }

    Call & call_;
    const uint8_t * bytes_;
    size_t size_;
    size_t at_ = 0;
};

// Such a state would be of no use: the decoder attends to what the encoder made of its text.
bool leaves_out_encoded(const ModelBox & model, std::string & message) {
    if (!llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get())) {
        return false;
    }
    message = "the model has an encoder, whose output is no part of a sequence: encode and decode the text again";
    return true;
}

}  // namespace

Status ContextBox::save_state(llama_seq_id seq, Call & call, std::vector<uint8_t> & bytes, std::string & message) {
    const InFlight in_flight;
    if (leaves_out_encoded(*model_, message)) {
        return Status::Failed;
    }
    try {
        AssertionsThrow net;
        poll(call);
        bytes.reserve(llama_state_seq_get_size_ext(ctx_, seq, 0));
        llama_synchronize(ctx_);
        Writer writer(call, bytes);
        memory_.memory->state_write(writer, seq, 0);
        return Status::Done;
    } catch (const Cancelled &) {
        bytes.clear();
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = explain(error);
        return Status::Failed;
    }
}

Status ContextBox::load_state(llama_seq_id seq, const uint8_t * bytes, size_t size, Call & call,
                              std::string & message) {
    const InFlight in_flight;
    if (leaves_out_encoded(*model_, message)) {
        return Status::Failed;
    }
    const bool held = memory_.pos_max(seq) >= 0;
    Undo undo(memory_);
    Status status = Status::Done;
    clear_errors();
    try {
        AssertionsThrow net;
        undo.begin();
        undo.save_sequence(seq, [&] { poll(call); });
    } catch (const Cancelled &) {
        return Status::Cancelled;
    } catch (const AssertionFailed & error) {
        message = explain(error);
        return Status::Failed;
    }
    try {
        AssertionsThrow net;
        poll(call);
        Reader reader(call, bytes, size);
        memory_.memory->seq_rm(seq, -1, -1);
        memory_.memory->state_read(reader, seq, 0);
        if (!reader.at_end()) {
            throw std::runtime_error("the state has bytes left over");
        }
        undo.scrub(false);
        confirm();
        dirty_.erase(seq);
        return Status::Done;
    } catch (const Cancelled &) {
        status = Status::Cancelled;
    } catch (const std::exception & error) {
        // llama.cpp's reader may have turned our Cancelled into an error of its own.
        status = call.stopped() || exiting() ? Status::Cancelled : Status::Failed;
        const std::string lost = model_->lost_server();
        message = !lost.empty() ? lost : last_errors().empty() ? error.what() : last_errors();
    }
    // llama.cpp has cleared the sequence, in whole or in part: give it back what it held.
    memory_.memory->seq_rm(seq, -1, -1);
    try {
        AssertionsThrow net;
        if (memory_.restorable()) {
            undo.restore();
            undo.scrub(true);
            confirm();
        } else if (held) {
            dirty_.insert(seq);
        }
    } catch (const AssertionFailed & error) {
        broken_ = error.what();
        dirty_.insert(seq);
        message = explain(error);
        status = Status::Failed;
    }
    return status;
}

}  // namespace llamacancel

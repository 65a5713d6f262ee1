#include "model/model.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>

#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"
#include "llama-vocab.h"
#include "model/files.hpp"
#include "process/assertions.hpp"
#include "process/exit.hpp"
#include "process/log.hpp"
#include "process/steps.hpp"
#include "words/vocabulary.hpp"

namespace llamacancel {

namespace {

constexpr std::chrono::milliseconds kBetweenLooks{2};  // at the call, while another thread works

// What the CPU kernels assert of a node, or never end on. They run on threads without a guard, where an
// assert would end the process.
std::string check_node(const ggml_tensor * node) {
    const ggml_tensor * a = node->src[0];
    const ggml_tensor * b = node->src[1];
    const auto number = [&](int i) {
        float value;
        std::memcpy(&value, node->op_params + i, sizeof(value));
        return value;
    };
    const auto is_f32 = [](const ggml_tensor * t) { return !t || t->type == GGML_TYPE_F32; };
    const auto is_half = [](const ggml_tensor * t) { return t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16; };
    const auto said = [&](const std::string & what) {
        const ggml_tensor * operand = b && b->name[0] ? b : a;
        return std::string(ggml_op_name(node->op)) + " of '" + (operand ? operand->name : node->name) + "': " + what;
    };
    switch (node->op) {
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV: {
            const bool alike = a->type == b->type && node->type == a->type && (is_f32(a) || is_half(a));
            const bool mixed = is_f32(b) && is_half(a) && (node->type == a->type || is_f32(node));
            const bool quantized = node->op == GGML_OP_ADD && ggml_is_quantized(a->type) && is_f32(b);
            if (!alike && !mixed && !quantized) {
                return said(std::string("no kernel for ") + ggml_type_name(a->type) + " with " +
                            ggml_type_name(b->type));
            }
            break;
        }
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
            if (!(number(0) >= 0)) {
                return said("its epsilon is " + std::to_string(number(0)));
            }
            break;
        case GGML_OP_GROUP_NORM:
            if (!(number(1) >= 0) || node->op_params[0] < 1) {
                return said("its epsilon or its number of groups is wrong");
            }
            break;
        case GGML_OP_ROPE: {
            const int32_t n_dims = node->op_params[1];
            const int32_t * sections = node->op_params + 11;
            if (n_dims < 2 || n_dims % 2 != 0 || n_dims > a->ne[0]) {
                return said(std::to_string(n_dims) + " rotated dimensions of " + std::to_string(a->ne[0]));
            }
            if ((node->op_params[2] & GGML_ROPE_TYPE_MROPE) &&
                ((sections[0] <= 0 && sections[1] <= 0 && sections[2] <= 0) ||
                 sections[0] + sections[1] + sections[2] + sections[3] > a->ne[0])) {
                return said("its sections do not fit");
            }
            if (node->src[2] && (!is_f32(node->src[2]) || node->src[2]->ne[0] < n_dims / 2)) {
                return said("its frequency factors are too few");
            }
            break;
        }
        case GGML_OP_SSM_CONV:
        case GGML_OP_SSM_SCAN:
            for (int i = 0; i < 6; ++i) {
                if (!is_f32(node->src[i])) {
                    return said(std::string("no kernel for ") + ggml_type_name(node->src[i]->type));
                }
            }
            break;
        default:
            break;
    }
    return "";
}

std::string lost_among(const std::vector<std::shared_ptr<RpcServer>> & servers) {
    for (const auto & server : servers) {
        if (server->lost()) {
            return "the connection to the RPC server " + server->endpoint() + " was lost";
        }
    }
    return "";
}

// Locks the mutex, or throws Stopped.
std::unique_lock<std::timed_mutex> lock_under(std::timed_mutex & mutex, Call & call) {
    std::unique_lock<std::timed_mutex> lock(mutex, std::defer_lock);
    while (!lock.try_lock_for(kBetweenLooks)) {
        if (call.should_stop()) {
            throw Stopped{};
        }
    }
    return lock;
}

struct LoadProgress {
    Call & call;
    llama_progress_callback report;
    void * report_arg;
    bool stopped = false;

    static bool callback(float fraction, void * data) {
        LoadProgress & self = *static_cast<LoadProgress *>(data);
        self.stopped = self.stopped || exiting() || self.call.should_stop() ||
                       (self.report && !self.report(fraction, self.report_arg));
        return !self.stopped;
    }
};

}  // namespace

Status ModelBox::load(const std::string & path, llama_model_params params, const std::vector<std::string> & rpc_servers,
                      Call & call, llama_progress_callback progress, void * progress_arg,
                      std::shared_ptr<ModelBox> & box, std::string & message) {
    const InFlight in_flight;
    LoadProgress loading{call, progress, progress_arg};
    if (!LoadProgress::callback(0.0f, &loading)) {
        return Status::Cancelled;
    }
    Files files;
    try {
        message = files.check(path, false, call);
    } catch (const Stopped &) {
        return Status::Cancelled;
    }
    if (!message.empty()) {
        return Status::Invalid;
    }
    Servers servers;
    std::vector<ggml_backend_dev_t> devices;
    for (const std::string & endpoint : rpc_servers) {
        std::shared_ptr<RpcServer> server;
        const Status status = RpcServer::connect(endpoint, call, server, message);
        if (status != Status::Done) {
            return status;
        }
        if (std::find(servers.begin(), servers.end(), server) != servers.end()) {
            continue;  // under another name
        }
        devices.insert(devices.end(), server->devices().begin(), server->devices().end());
        servers.push_back(std::move(server));
    }
    if (!servers.empty()) {
        // after them this machine's own, as llama.cpp orders them
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            if (ggml_backend_dev_type(ggml_backend_dev_get(i)) == GGML_BACKEND_DEVICE_TYPE_GPU) {
                devices.push_back(ggml_backend_dev_get(i));
            }
        }
        devices.push_back(nullptr);
        params.devices = devices.data();
    }
    params.progress_callback = LoadProgress::callback;
    params.progress_callback_user_data = &loading;
    clear_errors();
    llama_model * model = nullptr;
    try {
        const CountedSteps counted(call);
        model = llama_model_load_from_file(path.c_str(), params);
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
    if (model) {
        // llama.cpp has devices compute large ubatches even of layers that are on the CPU (`op_offload`).
        box.reset(new ModelBox(model, model->devices.empty(), servers));
    }
    if (loading.stopped || call.should_stop()) {
        box.reset();
        return Status::Cancelled;
    }
    if (!model) {
        message = lost_among(servers);
        if (message.empty()) {
            message = last_errors();
        }
        return Status::Failed;
    }
    try {
        const CountedSteps counted(call);
        message = check_vocabulary(box->vocab(), call);
        if (message.empty() && !params.vocab_only) {
            message = box->try_out();
            box->identity_ = files.identity(call);
        }
    } catch (const Stopped &) {
        box.reset();
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = error.what();
    }
    if (!box->lost_server().empty()) {
        message = box->lost_server();
    }
    if (!message.empty()) {
        box.reset();
        return Status::Invalid;
    }
    return Status::Done;
}

std::string ModelBox::try_out() {
    llama_context_params small = llama_context_default_params();
    small.n_ctx = 32;
    small.n_batch = small.n_ubatch = 8;
    const std::unique_ptr<llama_context, decltype(&llama_free)> ctx(llama_init_from_model(model_, small), llama_free);
    if (!ctx) {
        return "";  // making a context will say why
    }
    memory_kind_ = MemoryParts(llama_get_memory(ctx.get()), false).kind;
    ggml_cgraph * graph = ctx->get_gf_res_reserve()->get_gf();
    for (int i = 0; graph && i < ggml_graph_n_nodes(graph); ++i) {
        const std::string problem = check_node(ggml_graph_node(graph, i));
        if (!problem.empty()) {
            return problem;
        }
    }
    return "";
}

ModelBox::~ModelBox() { llama_model_free(model_); }

std::string ModelBox::lost_server() const {
    const std::string lost = lost_among(servers_);
    return lost.empty() ? "" : lost + ": close the model's contexts, and load it again";
}

void ModelBox::confirm() const noexcept {
    for (const auto & server : servers_) {
        server->confirm();
    }
}

uint32_t ModelBox::positions_per_embd() const noexcept { return model_->hparams.n_pos_per_embd(); }

bool ModelBox::has_weights() const noexcept { return !model_->hparams.vocab_only; }

int32_t ModelBox::max_positions() const noexcept {
    return model_->pos_embd ? static_cast<int32_t>(model_->pos_embd->ne[1]) : 0;
}

bool ModelBox::causal() const noexcept { return model_->hparams.causal_attn; }

Status ModelBox::load_adapter(const std::string & path, Call & call, llama_adapter_lora *& adapter,
                              std::string & identity, std::string & message) {
    Files files;
    try {
        message = files.check(path, true, call);
        if (!message.empty()) {
            return Status::Invalid;
        }
        identity = files.identity(call);
        clear_errors();
        const CountedSteps counted(call);
        const auto lock = lock_under(making_, call);
        adapter = llama_adapter_lora_init(model_, path.c_str());
        if (adapter && call.should_stop()) {
            llama_adapter_lora_free(adapter);
            adapter = nullptr;
            return Status::Cancelled;
        }
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
    if (!adapter) {
        message = last_errors();
        return Status::Invalid;
    }
    return Status::Done;
}

void ModelBox::free_adapter(llama_adapter_lora * adapter) {
    std::lock_guard<std::timed_mutex> lock(making_);
    llama_adapter_lora_free(adapter);
}

llama_context * ModelBox::make_context(const llama_context_params & params, Call & call) {
    const CountedSteps counted(call);
    const auto lock = lock_under(making_, call);
    struct Restore {
        uint32_t & value;
        const uint32_t before = value;
        ~Restore() { value = before; }
    } n_ctx_train{model_->hparams.n_ctx_train};
    return llama_init_from_model(model_, params);
}

Status ModelBox::gap_cost(int32_t n_threads, [[maybe_unused]] bool device, Call & call, GapCost & cost) {
#ifdef LLAMACANCEL_PATCHED
    if (on_cpu_ && !device) {
        cost = estimate_gap_cost(*model_, n_threads);
        return Status::Done;
    }
#endif
    const InFlight in_flight;
    try {
        const auto lock = lock_under(cost_mutex_, call);
        const auto known = cost_.find(n_threads);
        if (known != cost_.end()) {
            cost = known->second;
            return Status::Done;
        }
        // OpenMP keeps a team of threads for each thread that has computed, until that one ends. Where one thread makes
        // the context and another decodes, a team that is left behind slows down the other.
        std::atomic<bool> stop{false};
        std::future<GapCost> measured = std::async(std::launch::async, [&] {
            const AssertionsThrow net;
            return measure_gap_cost(model_, n_threads, on_cpu_, max_positions(), stop);
        });
        while (measured.wait_for(kBetweenLooks) != std::future_status::ready) {
            stop = stop || exiting() || call.should_stop();
        }
        cost = measured.get();
        if (stop || call.should_stop()) {
            return Status::Cancelled;
        }
        cost_[n_threads] = cost;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const AssertionFailed &) {
        cost = {};  // making a context will say why
    }
    return Status::Done;
}

}  // namespace llamacancel

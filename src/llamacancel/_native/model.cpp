#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <future>
#include <initializer_list>

#include "box.hpp"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"
#include "steps.hpp"

namespace llamacancel {

namespace {

constexpr std::chrono::milliseconds kBetweenLooks{2};  // at the call, while another thread works

using Gguf = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// The value of an integer key, whatever its width; -1 if there is none (or it is an array).
int64_t int_value(const gguf_context * gguf, const std::string & key) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        return -1;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8:
            return gguf_get_val_u8(gguf, id);
        case GGUF_TYPE_INT8:
            return gguf_get_val_i8(gguf, id);
        case GGUF_TYPE_UINT16:
            return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_INT16:
            return gguf_get_val_i16(gguf, id);
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_INT32:
            return gguf_get_val_i32(gguf, id);
        case GGUF_TYPE_UINT64:
            return static_cast<int64_t>(gguf_get_val_u64(gguf, id));
        case GGUF_TYPE_INT64:
            return gguf_get_val_i64(gguf, id);
        default:
            return -1;
    }
}

bool has_kernel(ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits_cpu(type)->vec_dot != nullptr; }

std::string check_tensors(const gguf_context * gguf, ggml_context * tensors, int64_t file_size) {
    const int64_t n = gguf_get_n_tensors(gguf);
    for (int64_t i = 0; i < n; ++i) {
        const std::string name = gguf_get_tensor_name(gguf, i);
        const ggml_type type = gguf_get_tensor_type(gguf, i);
        const int64_t end =
            gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) + gguf_get_tensor_size(gguf, i);
        if (end > file_size) {
            return "the file is truncated: tensor '" + name + "' ends at byte " + std::to_string(end) + " of " +
                   std::to_string(file_size);
        }
        if (!has_kernel(type)) {
            return "tensor '" + name + "' has type " + ggml_type_name(type) +
                   ", which the CPU backend cannot compute with";
        }
        // Norms, biases and the like are operands of elementwise operations, whose kernels want F32.
        if (ggml_n_dims(ggml_get_tensor(tensors, name.c_str())) == 1 && type != GGML_TYPE_F32) {
            return "tensor '" + name + "' has one dimension and type " + ggml_type_name(type) +
                   "; such tensors are f32";
        }
    }
    return "";
}

// What llama.cpp divides by without looking, where the key is missing.
std::string check_divisors(const gguf_context * gguf, const std::string & arch) {
    const auto is_one_of = [&](std::initializer_list<const char *> names) {
        return std::find(names.begin(), names.end(), arch) != names.end();
    };
    const auto contains = [&](const char * part) { return arch.find(part) != std::string::npos; };
    const bool rwkv = contains("rwkv");
    const bool attends = !rwkv && !is_one_of({"mamba", "mamba2", "wavtokenizer-dec"});
    const bool grouped = is_one_of(
        {"mamba2", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe", "qwen3next", "qwen35", "qwen35moe"});
    const bool experts = contains("moe") || is_one_of({"qwen3next", "qwen4exp", "mellum", "rnd1"});
    const std::pair<const char *, bool> divisors[] = {
        {"attention.head_count", attends},
        {"wkv.head_size", rwkv},
        {"ssm.group_count", grouped},
        {"expert_used_count", experts},
    };
    for (const auto & [name, needed] : divisors) {
        const std::string key = arch + "." + name;
        const int64_t id = gguf_find_key(gguf, key.c_str());
        const bool is_array = id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY;
        if (needed && !is_array && int_value(gguf, key) < 1) {
            return "'" + key + "' is missing or 0";
        }
    }
    return "";
}

std::string check_shape(const gguf_context * gguf, const std::string & arch) {
    struct Limit {
        const char * key;
        int64_t low, high;
        bool needed;
    };
    const Limit limits[] = {
        {"block_count", 1, 100'000, true},
        {"embedding_length", 1, 1 << 24, true},
        {"context_length", 1, int64_t(1) << 31, true},
        {"feed_forward_length", 0, 1 << 24, false},
        {"attention.head_count", 0, 1 << 16, false},
        {"attention.head_count_kv", 0, 1 << 16, false},
        {"attention.key_length", 1, 1 << 16, false},
        {"attention.value_length", 1, 1 << 16, false},
        {"attention.sliding_window", 0, int64_t(1) << 31, false},
        {"rope.dimension_count", 0, 1 << 16, false},
        {"expert_count", 0, 1 << 12, false},
        {"expert_used_count", 0, 1 << 12, false},
        {"ssm.conv_kernel", 1, 1 << 10, false},
        {"ssm.inner_size", 1, 1 << 24, false},
        {"ssm.state_size", 1, 1 << 16, false},
        {"ssm.time_step_rank", 1, 1 << 24, false},
        {"wkv.head_size", 1, 1 << 16, false},
        {"experts_per_group", 1, 1 << 16, false},
        {"expert_group_count", 0, 1 << 12, false},
        {"conv_group_size", 1, 1 << 24, false},
        {"interleave_moe_layer_step", arch == "llama4" ? 0 : 1, 1 << 16, false},
    };
    for (const Limit & limit : limits) {
        const std::string key = arch + "." + limit.key;
        if (gguf_find_key(gguf, key.c_str()) < 0) {
            if (limit.needed) {
                return "the file has no key '" + key + "'";
            }
            continue;
        }
        if (gguf_get_kv_type(gguf, gguf_find_key(gguf, key.c_str())) == GGUF_TYPE_ARRAY) {
            continue;  // a value for each layer
        }
        const int64_t value = int_value(gguf, key);
        if (value < limit.low || value > limit.high) {
            return "'" + key + "' is " + std::to_string(value) + ", outside of " + std::to_string(limit.low) + " to " +
                   std::to_string(limit.high);
        }
    }
    for (const char * name : {"layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"}) {
        const std::string key = arch + ".attention." + name;
        const int64_t id = gguf_find_key(gguf, key.c_str());
        if (id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_FLOAT32) {
            const float value = gguf_get_val_f32(gguf, id);
            if (!(value >= 0 && std::isfinite(value))) {
                return "'" + key + "' is " + std::to_string(value) + ", which is no epsilon";
            }
        }
    }
    const int64_t heads = int_value(gguf, arch + ".attention.head_count");
    const int64_t kv_heads = int_value(gguf, arch + ".attention.head_count_kv");
    if (heads > 0 && kv_heads > 0 && heads % kv_heads != 0) {
        return "'" + arch + ".attention.head_count' (" + std::to_string(heads) + ") is no multiple of head_count_kv (" +
               std::to_string(kv_heads) + ")";
    }
    const int64_t embd = int_value(gguf, arch + ".embedding_length");
    if (heads > 0 && embd % heads != 0 && int_value(gguf, arch + ".attention.key_length") < 0) {
        return "'" + arch + ".embedding_length' (" + std::to_string(embd) + ") is no multiple of head_count (" +
               std::to_string(heads) + ")";
    }
    const int64_t experts = int_value(gguf, arch + ".expert_count");
    const int64_t experts_used = int_value(gguf, arch + ".expert_used_count");
    if (experts > 0 && (experts_used < 1 || experts_used > experts)) {
        return "'" + arch + ".expert_used_count' is " + std::to_string(experts_used) + " of " + std::to_string(experts);
    }
    return check_divisors(gguf, arch);
}

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

// llama.cpp's RWKV tokenizer never ends at a byte that begins a token and is none itself.
std::string check_vocab(const ModelBox & box) {
    if (llama_vocab_type(box.vocab()) != LLAMA_VOCAB_TYPE_RWKV) {
        return "";
    }
    bool begins[256] = {}, alone[256] = {};
    for (llama_token token = 0; token < llama_vocab_n_tokens(box.vocab()); ++token) {
        const std::string piece = box.piece(token, true);
        if (!piece.empty()) {
            const uint8_t first = piece[0];
            begins[first] = true;
            alone[first] = alone[first] || piece.size() == 1;
        }
    }
    for (int byte = 0; byte < 256; ++byte) {
        if (begins[byte] && !alone[byte]) {
            return "the RWKV vocabulary has no token for the single byte " + std::to_string(byte);
        }
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

    static bool callback(float share, void * data) {
        LoadProgress & self = *static_cast<LoadProgress *>(data);
        self.stopped = self.stopped || exiting() || self.call.should_stop() ||
                       (self.report && !self.report(share, self.report_arg));
        return !self.stopped;
    }
};

}  // namespace

std::string check_gguf(const std::string & path, bool adapter) {
    struct stat info;
    if (stat(path.c_str(), &info) != 0) {
        return std::strerror(errno);
    }
    if (!S_ISREG(info.st_mode)) {
        return "not a file";
    }
    char magic[4] = {};
    if (FILE * file = std::fopen(path.c_str(), "rb")) {
        const size_t n = std::fread(magic, 1, sizeof(magic), file);
        std::fclose(file);
        if (n < sizeof(magic) || std::memcmp(magic, "GGUF", 4) != 0) {
            return "not a GGUF file (it does not begin with 'GGUF')";
        }
    } else {
        return std::strerror(errno);
    }
    clear_errors();
    try {
        AssertionGuard guard;
        ggml_context * descriptions = nullptr;
        const Gguf gguf(gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, /*ctx=*/&descriptions}), gguf_free);
        const std::unique_ptr<ggml_context, decltype(&ggml_free)> tensors(descriptions, ggml_free);
        if (!gguf) {
            return "not a sound GGUF file: " + last_errors();
        }
        const int64_t arch_id = gguf_find_key(gguf.get(), "general.architecture");
        if (arch_id < 0 || gguf_get_kv_type(gguf.get(), arch_id) != GGUF_TYPE_STRING) {
            return "the file has no key 'general.architecture'";
        }
        std::string problem = check_tensors(gguf.get(), tensors.get(), info.st_size);
        if (problem.empty() && !adapter) {
            problem = check_shape(gguf.get(), gguf_get_val_str(gguf.get(), arch_id));
        }
        return problem;
    } catch (const std::exception & error) {
        return std::string("not a sound GGUF file: ") + error.what();
    }
}

Status ModelBox::load(const std::string & path, llama_model_params params, const std::vector<std::string> & rpc_servers,
                      Call & call, llama_progress_callback progress, void * progress_arg,
                      std::shared_ptr<ModelBox> & box, std::string & message) {
    const InFlight in_flight;
    LoadProgress state{call, progress, progress_arg};
    if (!LoadProgress::callback(0.0f, &state)) {
        return Status::Cancelled;
    }
    message = check_gguf(path, false);
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
    params.progress_callback_user_data = &state;
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
    if (state.stopped || call.should_stop()) {
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
        AssertionGuard guard;
        message = check_vocab(*box);
        if (message.empty() && !params.vocab_only) {
            message = box->try_out();
        }
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
    memory_kind_ = Memory(llama_get_memory(ctx.get()), false).kind;
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

Status ModelBox::tokenize(const std::string & text, bool add_special, bool parse_special, Call & call,
                          std::vector<llama_token> & tokens, std::string & message) const {
    try {
        const CountedSteps counted(call);
        tokens.resize(text.size() + 2);
        int32_t n =
            llama_tokenize(vocab(), text.data(), text.size(), tokens.data(), tokens.size(), add_special, parse_special);
        if (n < 0) {
            tokens.resize(-n);
            n = llama_tokenize(vocab(), text.data(), text.size(), tokens.data(), tokens.size(), add_special,
                               parse_special);
        }
        tokens.resize(std::max(n, 0));
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const StackTooSmall &) {
        message = "a run of characters that the vocabulary's pattern takes as one is too long for this thread's stack";
        return Status::Invalid;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
}

Status ModelBox::detokenize(const llama_token * tokens, int32_t n, bool remove_special, bool unparse_special,
                            std::string & text, std::string & message) const {
    try {
        AssertionGuard guard;
        text.resize(size_t(n) * 8 + 16);
        int32_t size = llama_detokenize(vocab(), tokens, n, text.data(), text.size(), remove_special, unparse_special);
        if (size < 0) {
            text.resize(-size);
            size = llama_detokenize(vocab(), tokens, n, text.data(), text.size(), remove_special, unparse_special);
        }
        text.resize(std::max(size, 0));
        return Status::Done;
    } catch (const std::exception & error) {
        message = error.what();
        return Status::Failed;
    }
}

std::string ModelBox::piece(llama_token token, bool special) const {
    std::string text(64, '\0');
    int32_t size = llama_token_to_piece(vocab(), token, text.data(), text.size(), 0, special);
    if (size < 0) {
        text.resize(-size);
        size = llama_token_to_piece(vocab(), token, text.data(), text.size(), 0, special);
    }
    text.resize(std::max(size, 0));
    return text;
}

Status ModelBox::load_adapter(const std::string & path, Call & call, llama_adapter_lora *& adapter,
                              std::string & message) {
    message = check_gguf(path, true);
    if (!message.empty()) {
        return Status::Invalid;
    }
    clear_errors();
    try {
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

Status ModelBox::gap_cost(int32_t n_threads, Call & call, GapCost & cost) {
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
            const AssertionGuard guard;
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

// The owning box of a model: its weights, its vocabulary, its adapters. Contexts hold it, too.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cancel/call.hpp"
#include "far/rpc.hpp"
#include "llama.h"
#include "memory/memory.hpp"
#include "model/gap.hpp"
#include "process/status.hpp"

namespace llamacancel {

class ModelBox {
public:
    // Loads under `call`; `progress`, if any, is called with a fraction of 0 to 1 and stops the load by returning
    // false. `rpc_servers`: "host:port" of workers that get layers before this machine's GPUs do.
    static Status load(const std::string & path, llama_model_params params,
                       const std::vector<std::string> & rpc_servers, Call & call, llama_progress_callback progress,
                       void * progress_arg, std::shared_ptr<ModelBox> & box, std::string & message);
    ~ModelBox();
    ModelBox(const ModelBox &) = delete;
    ModelBox & operator=(const ModelBox &) = delete;

    llama_model * get() const noexcept { return model_; }
    const llama_vocab * vocab() const noexcept { return llama_model_get_vocab(model_); }
    bool on_cpu() const noexcept { return on_cpu_; }
    std::string lost_server() const;  // what to say when the connection to a worker was lost; "" while none was
    void confirm() const noexcept;    // waits until the workers have done what they were sent
    MemoryKind memory_kind() const noexcept { return memory_kind_; }     // of its contexts
    const std::string & identity() const noexcept { return identity_; }  // of its weights, see Files::identity()
    uint32_t positions_per_embd() const noexcept;                        // more than one for M-RoPE
    bool has_weights() const noexcept;                                   // false if loaded with vocab_only
    int32_t max_positions() const noexcept;                              // in a learned table of them; 0 without one
    bool causal() const noexcept;  // false for encoders, whose batches are computed in one piece

    // A LoRA adapter, to be freed before the model; `identity` tells it from others as identity() does models.
    Status load_adapter(const std::string & path, Call & call, llama_adapter_lora *& adapter, std::string & identity,
                        std::string & message);
    void free_adapter(llama_adapter_lora * adapter);

    // llama_init_from_model(), which for YaRN writes into the model: that is undone, and contexts are made one by one.
    // Throws Stopped once `call` is to stop.
    llama_context * make_context(const llama_context_params & params, Call & call);

    // Measured on first use for a number of threads, so that all contexts of a model are cut alike; estimated on a CPU
    // that looks inside its kernels, unless it stands in for a `device`.
    Status gap_cost(int32_t n_threads, bool device, Call & call, GapCost & cost);

private:
    using Servers = std::vector<std::shared_ptr<RpcServer>>;
    ModelBox(llama_model * model, bool on_cpu, Servers servers)
        : servers_(std::move(servers)), model_(model), on_cpu_(on_cpu) {}

    // Makes a small context and looks at its graph, for what the kernels would end the process on.
    std::string try_out();

    const Servers servers_;  // outlive the model
    llama_model * model_;
    const bool on_cpu_;
    MemoryKind memory_kind_ = MemoryKind::None;
    std::string identity_;
    std::timed_mutex making_;  // held while a context or an adapter is made, which llama.cpp writes down in the model
    std::timed_mutex cost_mutex_;
    std::map<int32_t, GapCost> cost_;
};

}  // namespace llamacancel

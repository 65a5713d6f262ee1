// Worker processes of llama.cpp's RPC backend: reached within a bounded time, held while a model uses them, and
// looked at for whether they are still there.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cancel/call.hpp"
#include "ggml-backend.h"
#include "process/status.hpp"

namespace llamacancel {

// The connection to one worker, which all models of this process share: a worker serves one client at a time.
class RpcServer {
public:
    // Connects to "host:port" under `call`. Status::Failed with a message where nobody answers, or not as a worker
    // does.
    static Status connect(const std::string & endpoint, Call & call, std::shared_ptr<RpcServer> & server,
                          std::string & message);
    ~RpcServer();

    // In a forked child nobody connects, and no name is being resolved.
    static void after_fork_in_child();

    RpcServer(const RpcServer &) = delete;
    RpcServer & operator=(const RpcServer &) = delete;

    const std::string & endpoint() const noexcept { return endpoint_; }
    const std::vector<ggml_backend_dev_t> & devices() const noexcept { return devices_; }

    // True once the worker did not answer. A llama.cpp without our patch ends the process instead.
    bool lost() const noexcept;

    // Waits until the worker has done what it was sent: what is written to it has no answer. See lost() then.
    void confirm() const noexcept;

private:
    explicit RpcServer(const std::string & endpoint) : endpoint_(endpoint) {}

    const std::string endpoint_;
    std::vector<ggml_backend_dev_t> devices_;
    std::vector<ggml_backend_t> backends_;  // of the devices: they keep the connection open
};

// Serves this machine's GPUs, or its CPU if it has none, to one client after the other. Does not return unless it
// cannot listen or there is no RPC backend; then it says why.
std::string serve_rpc(const std::string & endpoint, size_t n_threads);

}  // namespace llamacancel

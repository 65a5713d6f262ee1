#include "far/rpc.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "cancel/clock.hpp"
#include "ggml-rpc.h"
#include "process/assertions.hpp"
#include "process/exit.hpp"

namespace llamacancel {

namespace {

constexpr int64_t kAnswerNs = 5'000'000'000;  // a worker that says nothing for so long is taken for none
constexpr int kLookMs = 10;                   // between two looks at the token
constexpr uint8_t kHello = 14;                // RPC_CMD_HELLO, which stays the same for all versions
constexpr size_t kCapsSize = 24;
constexpr int kMostLookUps = 8;  // of names, at a time: one that nobody waits for any more still has its thread

struct Cancelled {};

struct Unreachable : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What all connections of this process have in common.
struct Directory {
    std::timed_mutex connecting;  // one connects at a time
    std::map<std::string, std::weak_ptr<RpcServer>> known;
    std::mutex mutex;  // of the look-ups
    std::condition_variable ended;
    int n_look_ups = 0;
};

Directory * directory = new Directory;  // never destroyed: a look-up may outlive main()

// Throws Cancelled once the call is to stop, and Unreachable when the time is up.
void look(Call & call, int64_t end_ns, const std::string & otherwise) {
    if (call.should_stop() || exiting()) {
        throw Cancelled();
    }
    if (now_ns() >= end_ns) {
        throw Unreachable(otherwise + " within " + std::to_string(kAnswerNs / 1'000'000'000) + " seconds");
    }
}

// The address of "host:port". A resolver can neither be stopped nor be told how long to take: it works on a thread of
// its own, which is left behind when the call stops or the time is up.
sockaddr_in resolve(const std::string & endpoint, Call & call, int64_t end_ns) {
    struct LookUp {
        const std::string host, port;
        bool done = false;
        int code = 0;
        sockaddr_in address = {};

        void run(int flags) {
            addrinfo hints = {};
            hints.ai_family = AF_INET;  // llama.cpp knows no other
            hints.ai_socktype = SOCK_STREAM;
            hints.ai_flags = flags;
            addrinfo * found = nullptr;
            code = getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
            if (code == 0) {
                std::memcpy(&address, found->ai_addr, sizeof(address));
                freeaddrinfo(found);
            }
        }
    };
    const size_t colon = endpoint.find(':');
    const auto look_up = std::make_shared<LookUp>(LookUp{endpoint.substr(0, colon), endpoint.substr(colon + 1)});
    look_up->run(AI_NUMERICHOST);
    if (look_up->code != 0) {
        std::unique_lock<std::mutex> lock(directory->mutex);
        const auto wait = [&](auto && until, const char * otherwise) {
            while (!directory->ended.wait_for(lock, std::chrono::milliseconds(kLookMs), until)) {
                lock.unlock();  // the look may want the GIL
                look(call, end_ns, otherwise);
                lock.lock();
            }
        };
        wait([] { return directory->n_look_ups < kMostLookUps; }, "no name is resolved");
        std::thread([look_up, here = directory] {
            LookUp answer{look_up->host, look_up->port};
            answer.run(0);
            std::lock_guard<std::mutex> lock(here->mutex);
            look_up->code = answer.code;
            look_up->address = answer.address;
            look_up->done = true;
            here->n_look_ups -= 1;
            here->ended.notify_all();
        }).detach();
        directory->n_look_ups += 1;
        wait([&] { return look_up->done; }, "its name was not resolved");
    }
    if (look_up->code != 0) {
        throw Unreachable(gai_strerror(look_up->code));
    }
    return look_up->address;
}

std::string text_of(const sockaddr_in & address) {
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &address.sin_addr, text, sizeof(text));
    return text + (":" + std::to_string(ntohs(address.sin_port)));
}

// A socket that is closed with this object, whoever throws.
class Socket {
public:
    Socket() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
        if (fd_ < 0) {
            throw Unreachable(std::strerror(errno));
        }
        fcntl(fd_, F_SETFD, FD_CLOEXEC);
        fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_NONBLOCK);
    }
    ~Socket() { close(fd_); }
    Socket(const Socket &) = delete;
    Socket & operator=(const Socket &) = delete;
    operator int() const noexcept { return fd_; }

private:
    const int fd_;
};

// A connection that says hello as llama.cpp's does, but waits for the answer under a token, and for a bounded time:
// llama.cpp would wait for ever, and end the process at a wrong one.
class Greeting {
public:
    Greeting(const sockaddr_in & address, Call & call) : call_(call), end_ns_(now_ns() + kAnswerNs) {
        if (::connect(fd_, reinterpret_cast<const sockaddr *>(&address), sizeof(address)) != 0) {
            if (errno != EINPROGRESS) {
                throw Unreachable(std::strerror(errno));
            }
            wait(POLLOUT, "no connection");
            int error = 0;
            socklen_t size = sizeof(error);
            getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
            if (error != 0) {
                throw Unreachable(std::strerror(error));
            }
        }
    }

    void exchange() {
        uint8_t request[1 + sizeof(uint64_t) + kCapsSize] = {kHello};
        const uint64_t request_size = kCapsSize;
        std::memcpy(request + 1, &request_size, sizeof(request_size));
        if (send(fd_, request, sizeof(request), kSendFlags) != ssize_t(sizeof(request))) {
            throw Unreachable(std::strerror(errno));
        }
        uint64_t size = 0;
        uint8_t version[4] = {}, caps[kCapsSize];
        receive(&size, sizeof(size));
        if (size != sizeof(version) + sizeof(caps)) {
            throw Unreachable("it does not speak llama.cpp's RPC protocol, or another version of it");
        }
        receive(version, sizeof(version));
        receive(caps, sizeof(caps));
        if (version[0] != RPC_PROTO_MAJOR_VERSION || version[1] > RPC_PROTO_MINOR_VERSION) {
            throw Unreachable("it speaks version " + std::to_string(version[0]) + "." + std::to_string(version[1]) +
                              " of llama.cpp's RPC protocol, and this library version " +
                              std::to_string(RPC_PROTO_MAJOR_VERSION) + "." + std::to_string(RPC_PROTO_MINOR_VERSION));
        }
    }

private:
#ifdef MSG_NOSIGNAL
    static constexpr int kSendFlags = MSG_NOSIGNAL;
#else
    static constexpr int kSendFlags = 0;
#endif

    void wait(short events, const char * otherwise) {
        pollfd waiting = {fd_, events, 0};
        do {
            look(call_, end_ns_, otherwise);
        } while (poll(&waiting, 1, kLookMs) <= 0);
    }

    void receive(void * to, size_t size) {
        for (size_t done = 0; done < size;) {
            wait(POLLIN, "no answer (a worker serves one client at a time: does another one use it?)");
            const ssize_t n = recv(fd_, static_cast<uint8_t *>(to) + done, size - done, 0);
            if (n == 0) {
                throw Unreachable("it hung up: it does not speak llama.cpp's RPC protocol, or another version of it");
            }
            if (n < 0 && errno != EAGAIN && errno != EINTR) {
                throw Unreachable(std::strerror(errno));
            }
            done += std::max<ssize_t>(n, 0);
        }
    }

    Call & call_;
    const int64_t end_ns_;
    const Socket fd_;
};

template <typename Function>
Function * function_of(ggml_backend_reg_t reg, const char * name) {
    return reg ? reinterpret_cast<Function *>(ggml_backend_reg_get_proc_address(reg, name)) : nullptr;
}

const char * const kNoBackend = "this build has no RPC backend (it was built with GGML_RPC=OFF)";

}  // namespace

Status RpcServer::connect(const std::string & endpoint, Call & call, std::shared_ptr<RpcServer> & server,
                          std::string & message) {
    const auto said = [&](const std::string & what) {
        message = "RPC server " + endpoint + ": " + what;
        server.reset();
        return Status::Failed;
    };
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    const auto add_server = function_of<decltype(ggml_backend_rpc_add_server)>(rpc, "ggml_backend_rpc_add_server");
    if (!add_server) {
        return said(kNoBackend);
    }
    try {
        AssertionsThrow net;
        const sockaddr_in address = resolve(endpoint, call, now_ns() + kAnswerNs);
        std::unique_lock<std::timed_mutex> lock(directory->connecting, std::defer_lock);
        while (!lock.try_lock_for(std::chrono::milliseconds(kLookMs))) {
            look(call, kNever, "");
        }
        std::weak_ptr<RpcServer> & known = directory->known[text_of(address)];
        server = known.lock();
        if (server && !server->lost()) {
            return Status::Done;
        }
        Greeting(address, call).exchange();
        server.reset(new RpcServer(endpoint));
        // By its address: llama.cpp would resolve the name once more, and hold a second connection for each name.
        ggml_backend_reg_t reg = add_server(text_of(address).c_str());
        for (size_t i = 0; reg && i < ggml_backend_reg_dev_count(reg); ++i) {
            server->devices_.push_back(ggml_backend_reg_dev_get(reg, i));
            server->backends_.push_back(ggml_backend_dev_init(server->devices_.back(), nullptr));
        }
        if (server->devices_.empty()) {
            return said("it has no devices");
        }
        known = server;
        return Status::Done;
    } catch (const Cancelled &) {
        server.reset();
        return Status::Cancelled;
    } catch (const std::exception & error) {
        return said(error.what());
    }
}

void RpcServer::after_fork_in_child() { directory = new Directory; }

RpcServer::~RpcServer() {
    for (ggml_backend_t backend : backends_) {
        ggml_backend_free(backend);
    }
}

bool RpcServer::lost() const noexcept {
    static const auto is_lost =
        function_of<bool(ggml_backend_t)>(ggml_backend_reg_by_name("RPC"), "ggml_backend_rpc_is_lost");
    return is_lost && std::any_of(backends_.begin(), backends_.end(), is_lost);
}

void RpcServer::confirm() const noexcept {
    static const auto do_confirm =
        function_of<bool(ggml_backend_t)>(ggml_backend_reg_by_name("RPC"), "ggml_backend_rpc_confirm");
    if (do_confirm) {
        do_confirm(backends_.front());  // the connection is that of all
    }
}

std::string serve_rpc(const std::string & endpoint, size_t n_threads) {
    const auto start_server = function_of<decltype(ggml_backend_rpc_start_server)>(ggml_backend_reg_by_name("RPC"),
                                                                                   "ggml_backend_rpc_start_server");
    if (!start_server) {
        return kNoBackend;
    }
    std::vector<ggml_backend_dev_t> devices;
    for (const auto type :
         {GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU, GGML_BACKEND_DEVICE_TYPE_CPU}) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            if (ggml_backend_dev_type(ggml_backend_dev_get(i)) == type) {
                devices.push_back(ggml_backend_dev_get(i));
            }
        }
        if (!devices.empty()) {
            break;
        }
    }
    start_server(endpoint.c_str(), nullptr, n_threads, devices.size(), devices.data());
    return "llama.cpp cannot listen on " + endpoint;
}

}  // namespace llamacancel

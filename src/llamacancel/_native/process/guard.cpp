#include "process/guard.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "llama.h"
#include "far/rpc.hpp"

namespace llamacancel {

namespace {

thread_local int guard_depth = 0;
thread_local std::string thread_errors;
thread_local const bool * quiet_flag = nullptr;

constexpr size_t kMaxLines = 10'000;  // a log that nobody takes does not grow without bound
constexpr size_t kMaxErrorBytes = 2'000;

struct Log {
    std::mutex mutex;
    std::deque<LogLine> lines;
};

Log * log_instance = new Log;  // never destroyed: other threads may log during exit

Log & log() { return *log_instance; }

std::atomic<int> in_flight{0};
std::atomic<bool> is_exiting{false};
std::thread::id exiting_thread;  // written before is_exiting

struct Parked {
    std::thread::id id;
    unsigned long ident;
};
std::mutex parked_mutex;
std::vector<Parked> * const all_parked = new std::vector<Parked>;  // never destroyed, as the log

// Ends what this thread is in flight with, for good.
void park() noexcept {
    {
        std::lock_guard<std::mutex> lock(parked_mutex);
        all_parked->push_back({std::this_thread::get_id(), (unsigned long)(pthread_self())});
    }
    in_flight.fetch_sub(1, std::memory_order_seq_cst);  // now begin_exit() goes on
    while (true) {
        std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

template <typename Is>
bool any_parked(Is && is) noexcept {
    if (!is_exiting.load(std::memory_order_acquire)) {
        return false;
    }
    std::lock_guard<std::mutex> lock(parked_mutex);
    return std::any_of(all_parked->begin(), all_parked->end(), is);
}

void on_abort(const char * message) {
    if (guard_depth > 0) {
        throw AssertionFailed(message);
    }
    fprintf(stderr, "%s\n", message);
}

void on_log(ggml_log_level level, const char * text, void *) {
    if (quiet_flag && *quiet_flag && level != GGML_LOG_LEVEL_CONT) {
        level = GGML_LOG_LEVEL_DEBUG;
    }
    if (level == GGML_LOG_LEVEL_ERROR && thread_errors.size() < kMaxErrorBytes) {
        thread_errors += text;
    }
    Log & target = log();
    std::lock_guard<std::mutex> lock(target.mutex);
    if (level == GGML_LOG_LEVEL_CONT && !target.lines.empty()) {
        target.lines.back().text += text;
    } else if (target.lines.size() < kMaxLines) {
        target.lines.push_back({level, text});
    }
}

}  // namespace

AssertionGuard::AssertionGuard() noexcept { ++guard_depth; }
AssertionGuard::~AssertionGuard() { --guard_depth; }

InFlight::InFlight() noexcept {
    in_flight.fetch_add(1, std::memory_order_seq_cst);
    if (exiting()) {
        park();
    }
}

InFlight::~InFlight() {
    if (exiting()) {
        park();
    }
    in_flight.fetch_sub(1, std::memory_order_seq_cst);
}

bool exiting() noexcept {
    return is_exiting.load(std::memory_order_seq_cst) && std::this_thread::get_id() != exiting_thread;
}

bool parked(std::thread::id thread) noexcept {
    return any_parked([&](const Parked & each) { return each.id == thread; });
}

bool parked(unsigned long thread) noexcept {
    return any_parked([&](const Parked & each) { return each.ident == thread; });
}

void begin_exit(double most_seconds) noexcept {
    exiting_thread = std::this_thread::get_id();
    is_exiting.store(true, std::memory_order_seq_cst);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(most_seconds);
    while (in_flight.load(std::memory_order_seq_cst) > 0 && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void after_fork_in_child() {
    in_flight.store(0, std::memory_order_seq_cst);
    log_instance = new Log;
    is_exiting.store(false, std::memory_order_seq_cst);  // the parent's other threads did not come along
    RpcServer::after_fork_in_child();
}

QuietLog::QuietLog(const bool & quiet) noexcept : outer_(quiet_flag) { quiet_flag = &quiet; }
QuietLog::~QuietLog() { quiet_flag = outer_; }

void initialize() {
    static std::once_flag once;
    std::call_once(once, [] {
        llama_log_set(on_log, nullptr);
        ggml_set_abort_callback(on_abort);
        llama_backend_init();
    });
}

bool next_log_line(LogLine & line) {
    Log & source = log();
    std::lock_guard<std::mutex> lock(source.mutex);
    if (source.lines.empty()) {
        return false;
    }
    line = std::move(source.lines.front());
    source.lines.pop_front();
    return true;
}

void clear_errors() noexcept { thread_errors.clear(); }

std::string last_errors() { return thread_errors; }

}  // namespace llamacancel

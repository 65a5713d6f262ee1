#include "process/log.hpp"

#include <deque>
#include <mutex>
#include <utility>

#include "llama.h"

namespace llamacancel {

namespace {

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

QuietLog::QuietLog(const bool & quiet) noexcept : outer_(quiet_flag) { quiet_flag = &quiet; }
QuietLog::~QuietLog() { quiet_flag = outer_; }

void collect_log() { llama_log_set(on_log, nullptr); }

void forget_log_after_fork() { log_instance = new Log; }

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

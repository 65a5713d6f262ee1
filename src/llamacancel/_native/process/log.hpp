// llama.cpp's log: kept for Python, and for the texts of exceptions.
#pragma once

#include <string>

namespace llamacancel {

// A line of llama.cpp's log, kept until Python takes it: no GIL is needed where it was written.
struct LogLine {
    int level;  // a ggml_log_level
    std::string text;
};

// Takes the next line into `line`; false when there is none.
bool next_log_line(LogLine & line);

// While one of these lives on this thread and its flag is set, llama.cpp's log lines count as debugging:
// what it says of a call that was stopped on purpose is no error. They nest: a signal handler may make a call within
// one.
class QuietLog {
public:
    explicit QuietLog(const bool & quiet) noexcept;
    ~QuietLog();
    QuietLog(const QuietLog &) = delete;
    QuietLog & operator=(const QuietLog &) = delete;

private:
    const bool * const outer_;
};

// The last error lines that llama.cpp logged on this thread since clear_errors(), for exception texts.
void clear_errors() noexcept;
std::string last_errors();

// Has llama.cpp log to here; once for the process.
void collect_log();

// In a forked child the log may be locked for ever by one of the parent's threads: it begins anew.
void forget_log_after_fork();

}  // namespace llamacancel

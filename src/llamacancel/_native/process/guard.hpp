// Turns an assertion of ggml's that fails on our thread into a C++ exception, instead of a dead process.
//
// This is the net under the checks that are made first (of batches, files and states). It reaches only
// asserts on the thread that is inside guarded(); elsewhere ggml ends the process, as it always did.
#pragma once

#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace llamacancel {

struct AssertionFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class AssertionGuard {
public:
    AssertionGuard() noexcept;
    ~AssertionGuard();
    AssertionGuard(const AssertionGuard &) = delete;
    AssertionGuard & operator=(const AssertionGuard &) = delete;
};

// One long native call. At the interpreter's exit those that daemon threads are in are stopped and waited for,
// since the process's static objects are destroyed next; their threads then wait here for the end.
class InFlight {
public:
    InFlight() noexcept;
    ~InFlight();
    InFlight(const InFlight &) = delete;
    InFlight & operator=(const InFlight &) = delete;
};

// True once the interpreter is about to exit. The one flag of the whole process, and it ends all work but that of the
// thread that exits: hooks and finalizers that run later may still use what they have.
bool exiting() noexcept;

// True of a thread that waits for the end: it leaves no native call any more, nor takes the GIL.
bool parked(std::thread::id thread) noexcept;
bool parked(unsigned long thread) noexcept;  // as Python names threads

// Called on the exiting thread, without the GIL: stops all calls and waits for them, `most_seconds` at most.
void begin_exit(double most_seconds) noexcept;

// In a forked child the parent's calls are in flight no more, and its log may be locked for ever by one of them.
void after_fork_in_child();

// Sets up llama.cpp once for the process: backends, the hook for asserts, the log.
void initialize();

// A line of llama.cpp's log, kept until Python takes it: no GIL is needed where it was written.
struct LogLine {
    int level;  // a ggml_log_level
    std::string text;
};

// Takes the next line into `line`; false when there is none. `thread_errors()` collects for this thread.
bool next_log_line(LogLine & line);

// While one of these lives on this thread and its flag is set, llama.cpp's log lines count as debugging:
// what it says of a call that was stopped on purpose is no error. They nest: a signal handler may make a call within one.
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

}  // namespace llamacancel

// The end of the process: native calls are stopped and waited for, and their threads wait for the end.
#pragma once

#include <thread>

namespace llamacancel {

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

// In a forked child the parent's calls are in flight no more.
void forget_calls_after_fork() noexcept;

}  // namespace llamacancel

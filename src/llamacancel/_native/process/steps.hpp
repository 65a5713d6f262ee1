// Long loops of llama.cpp that its abort callback does not reach: those of tokenizers, of grammars, of loading a
// vocabulary or an adapter, of clearing a new context's memory.
//
// With vendor/patches they count their steps, and ask here whether to go on. Without, they run to their end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "cancel/call.hpp"
#include "process/assertions.hpp"
#include "process/exit.hpp"

namespace llamacancel {

// Thrown through llama.cpp when the call is to stop. No std::exception, which somebody on the way might catch.
struct Stopped {};

struct TooManySteps : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct StackTooSmall : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// While one of these lives, llama.cpp's loops on this thread throw Stopped once `call` is to stop, TooManySteps after
// `most` steps, and StackTooSmall before a recursion takes more than `most_stack` bytes, or all of the thread's stack.
// They nest: a signal handler may make a call within one, and the outer one counts on afterwards.
class CountedSteps {
public:
    static constexpr uint64_t kAny = UINT64_MAX;

    explicit CountedSteps(Call & call, uint64_t most = kAny, size_t most_stack = SIZE_MAX);
    ~CountedSteps();
    CountedSteps(const CountedSteps &) = delete;
    CountedSteps & operator=(const CountedSteps &) = delete;

    // Steps of our own, counted as llama.cpp's are; throws as they do.
    void add(size_t n_steps);

    uint64_t steps() const noexcept { return steps_; }

private:
    static void took(void * self, size_t n_steps);

    static void listen() noexcept;

    const InFlight in_flight_;
    const AssertionsThrow guard_;
    Call & call_;
    const bool at_exit_;  // begun on the thread that ends the process, which is to finish
    const uint64_t most_;
    const size_t most_stack_;
    uint64_t steps_ = 0;
    uint64_t next_look_ = 0;
    const uintptr_t stack_at_;  // where the thread's stack stood
    CountedSteps * const outer_;
};

}  // namespace llamacancel

#include "process/steps.hpp"

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "llama-impl.h"
#include "process/exit.hpp"

namespace llamacancel {

namespace {

constexpr uint64_t kStride = 1024;          // steps between two looks at the call
constexpr uintptr_t kShallow = 32 * 1024;   // a stack that grew by less is not looked at
constexpr uintptr_t kReserve = 128 * 1024;  // bytes of stack that are left alone
constexpr uintptr_t kAssumed = 256 * 1024;  // growth that is allowed where the system does not tell the size

thread_local CountedSteps * innermost = nullptr;

uintptr_t stack_here() noexcept {
    const char here = 0;
    const volatile char * const address = &here;
    return reinterpret_cast<uintptr_t>(address);
}

// The lowest address of this thread's stack; 0 if the system does not tell.
uintptr_t lowest_of_stack() noexcept {
    thread_local const uintptr_t lowest = []() -> uintptr_t {
#if defined(__linux__)
        pthread_attr_t attributes;
        void * address = nullptr;
        size_t size = 0;
        if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
            pthread_attr_getstack(&attributes, &address, &size);
            pthread_attr_destroy(&attributes);
        }
        return reinterpret_cast<uintptr_t>(address);
#elif defined(__APPLE__)
        const pthread_t self = pthread_self();
        return reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(self)) - pthread_get_stacksize_np(self);
#else
        return 0;
#endif
    }();
    return lowest;
}

bool stack_is_short(uintptr_t began_at, size_t most) noexcept {
    const uintptr_t here = stack_here();
    if (here >= began_at || began_at - here < kShallow) {
        return false;
    }
    if (began_at - here > most) {
        return true;
    }
    const uintptr_t lowest = lowest_of_stack();
    return lowest ? here < lowest + kReserve : began_at - here > kAssumed;
}

}  // namespace

CountedSteps::CountedSteps(Call & call, uint64_t most, size_t most_stack)
    : call_(call),
      at_exit_(exiting()),
      most_(most),
      most_stack_(most_stack),
      stack_at_(stack_here()),
      outer_(innermost) {
    if (call_.should_stop()) {
        throw Stopped{};
    }
    innermost = this;
    listen();
}

CountedSteps::~CountedSteps() {
    innermost = outer_;
    listen();
}

// Has llama.cpp tell the innermost one of this thread, if there is one.
void CountedSteps::listen() noexcept {
#ifdef LLAMACANCEL_PATCHED
    llama_set_steps_callback(innermost ? took : nullptr, innermost);
#endif
}

void CountedSteps::took(void * self, size_t n_steps) { static_cast<CountedSteps *>(self)->add(n_steps); }

void CountedSteps::add(size_t n_steps) {
    steps_ += n_steps;
    if (steps_ > most_) {
        throw TooManySteps("more than " + std::to_string(most_) + " steps");
    }
    if (stack_is_short(stack_at_, most_stack_)) {
        throw StackTooSmall("it is nested too deep: more recursion than this thread's stack has room for");
    }
    if (steps_ >= next_look_) {
        next_look_ = steps_ + kStride;
        if ((exiting() && !at_exit_) || call_.should_stop()) {
            throw Stopped{};
        }
    }
}

}  // namespace llamacancel

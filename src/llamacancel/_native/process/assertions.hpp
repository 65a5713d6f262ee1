// Turns an assertion of ggml's that fails on our thread into a C++ exception, instead of a dead process.
//
// This is the net under the checks that are made first (of batches, files and states). It reaches only the thread that
// asked for it; elsewhere ggml ends the process, as it always did.
#pragma once

#include <stdexcept>

namespace llamacancel {

struct AssertionFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// While one of these lives on a thread, an assertion that fails there throws AssertionFailed.
class AssertionsThrow {
public:
    AssertionsThrow() noexcept;
    ~AssertionsThrow();
    AssertionsThrow(const AssertionsThrow &) = delete;
    AssertionsThrow & operator=(const AssertionsThrow &) = delete;
};

// Has ggml tell of assertions; once for the process.
void catch_assertions();

}  // namespace llamacancel

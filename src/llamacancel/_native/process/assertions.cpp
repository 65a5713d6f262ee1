#include "process/assertions.hpp"

#include <cstdio>

#include "ggml.h"

namespace llamacancel {

namespace {

thread_local int depth = 0;

void on_abort(const char * message) {
    if (depth > 0) {
        throw AssertionFailed(message);
    }
    fprintf(stderr, "%s\n", message);
}

}  // namespace

AssertionsThrow::AssertionsThrow() noexcept { ++depth; }
AssertionsThrow::~AssertionsThrow() { --depth; }

void catch_assertions() { ggml_set_abort_callback(on_abort); }

}  // namespace llamacancel

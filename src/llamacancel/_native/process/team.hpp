// Work of our own for the threads that llama.cpp computes with.
//
// ggml's CPU backend computes each graph in an OpenMP team of the calling thread, and between two graphs the team waits
// in a loop. One of the same size is here at once; to ask for another size would be to make a new one, and again for
// the next graph. Where ggml was built without OpenMP the calling thread does all.
#pragma once

#include <exception>

namespace llamacancel {

// Calls work(0) ... work(n - 1) on `n_threads` threads; returns when all have returned, and throws what one of them
// threw.
template <typename Work>
void on_team([[maybe_unused]] int n_threads, int n, const Work & work) {
    std::exception_ptr thrown;  // may not leave the loop: OpenMP would end the process
#ifdef _OPENMP
#pragma omp parallel for num_threads(n_threads) schedule(dynamic) if (n_threads > 1 && n > 1)
#endif
    for (int i = 0; i < n; ++i) {
        try {
            work(i);
        } catch (...) {
#ifdef _OPENMP
#pragma omp critical(llamacancel_on_team)
#endif
            thrown = std::current_exception();
        }
    }
    if (thrown) {
        std::rethrow_exception(thrown);
    }
}

}  // namespace llamacancel

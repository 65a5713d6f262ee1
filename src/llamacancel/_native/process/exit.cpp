#include "process/exit.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <vector>

namespace llamacancel {

namespace {

std::atomic<int> in_flight{0};
std::atomic<bool> is_exiting{false};
std::thread::id exiting_thread;  // written before is_exiting

struct Parked {
    std::thread::id id;
    unsigned long ident;
};
std::mutex parked_mutex;
std::vector<Parked> * const all_parked = new std::vector<Parked>;  // never destroyed: threads may park during exit

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

}  // namespace

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

void forget_calls_after_fork() noexcept {
    in_flight.store(0, std::memory_order_seq_cst);
    is_exiting.store(false, std::memory_order_seq_cst);  // the parent's other threads did not come along
}

}  // namespace llamacancel

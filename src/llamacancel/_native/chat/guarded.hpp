// Runs a part of chat under its call: counted, stopped, and told in words.
#pragma once

#include <new>
#include <string>

#include "process/status.hpp"
#include "process/steps.hpp"

namespace llamacancel {

constexpr size_t kMostChatStack = 1 << 20;  // bytes that a recursion may take

// `steps` grows by those that it takes. What it throws becomes Status::Invalid, and what it says the message.
template <typename Work>
Status guarded_chat(Call & call, uint64_t most_steps, std::string & message, uint64_t & steps, const Work & work) {
    constexpr size_t kMostSaid = 2000;
    try {
        CountedSteps counted(call, most_steps, kMostChatStack);
        struct Tell {
            const CountedSteps & counted;
            uint64_t & steps;
            ~Tell() { steps += counted.steps(); }
        } tell{counted, steps};
        work(counted);
        counted.add(0);  // where somebody on the way has caught that there are too many
        return Status::Done;
    } catch (const Stopped &) {
        return Status::Cancelled;
    } catch (const std::bad_alloc &) {
        message = "there is not enough memory";
        return Status::NoMemory;
    } catch (const std::exception & error) {
        message = std::string(error.what()).substr(0, kMostSaid);
    }
    return Status::Invalid;
}

}  // namespace llamacancel

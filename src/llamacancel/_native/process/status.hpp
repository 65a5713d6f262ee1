// What a native operation came to.
#pragma once

#include <cstdint>

namespace llamacancel {

// A message beside it says what was wrong, in one line.
enum class Status : uint8_t { Done, Cancelled, Invalid, Full, Failed, Busy, NoMemory };

}  // namespace llamacancel

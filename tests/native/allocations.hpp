// How many blocks operator new has given out that have not come back, for the leak tests.
#pragma once

#include <atomic>

extern std::atomic<long> allocated;

// Included before llama.cpp's schema converter, which prints to stderr what it leaves out: we log it.
#pragma once

#include <cstdio>
#include <sstream>  // headers that say std::fprintf come before its name changes

extern "C" int llamacancel_schema_warning(std::FILE *, const char * format, ...);
#define fprintf llamacancel_schema_warning

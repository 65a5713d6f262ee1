#include "schema.hpp"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "guard.hpp"
#include "json-schema-to-grammar.h"
#include "llama.h"

// The converter needs these three of llama.cpp's common.cpp, which would bring its downloads and its logs with it.
std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (const std::string & value : values) {
        joined += (&value == values.data() ? "" : separator) + value;
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & text, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t begin = 0;
    for (size_t end; (end = text.find(delimiter, begin)) != std::string::npos; begin = end + delimiter.size()) {
        parts.push_back(text.substr(begin, end - begin));
    }
    parts.push_back(text.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & text, size_t n) {
    std::string repeated;
    for (size_t i = 0; i < n; ++i) {
        repeated += text;
    }
    return repeated;
}

// In the place of the converter's fprintf(), see schema_log.hpp.
extern "C" int llamacancel_schema_warning(FILE *, const char * format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    const int n = std::vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    ggml_log_callback log = nullptr;
    void * data = nullptr;
    llama_log_get(&log, &data);
    log(GGML_LOG_LEVEL_WARN, text, data);
    return n;
}

namespace llamacancel {

std::string json_schema_to_grammar(const std::string & schema) {
    AssertionGuard guard;
    try {
        return ::json_schema_to_grammar(common_json::parse(schema));
    } catch (const std::exception & error) {
        throw std::invalid_argument(error.what());
    }
}

}  // namespace llamacancel

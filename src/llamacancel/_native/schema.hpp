// JSON schemas as GBNF grammars, by llama.cpp's own converter.
#pragma once

#include <string>

namespace llamacancel {

// Throws std::invalid_argument with the converter's own words for a schema that it cannot express.
std::string json_schema_to_grammar(const std::string & schema);

}  // namespace llamacancel

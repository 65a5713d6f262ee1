// What llama.cpp's chat asks of the rest of its `common` library, which would bring downloads, samplers and a log of its
// own: a few helpers of texts and tokens, a log that is silent, and grammars that are never made.
//
// llama.cpp's converter of JSON schemas recurses without end on some (law 11). Without it a rendering has no grammar;
// constraints are made by llguidance instead, from the parser and the tools.
#include <cstdarg>
#include <cstring>
#include <sstream>

#include "common.h"
#include "json-schema-to-grammar.h"
#include "log.h"

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); ++i) {
        joined += (i ? separator : "") + values[i];
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

void string_replace_all(std::string & text, const std::string & search, const std::string & replacement) {
    if (!search.empty() && text.find(search) != std::string::npos) {
        text = string_join(string_split(text, search), replacement);
    }
}

std::vector<llama_token> common_tokenize(const llama_vocab * vocab, const std::string & text, bool add_special,
                                         bool parse_special) {
    std::vector<llama_token> tokens(text.size() + 2);
    const int32_t n = llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
                                     static_cast<int32_t>(tokens.size()), add_special, parse_special);
    tokens.resize(n < 0 ? 0 : n);
    return tokens;
}

std::string common_token_to_piece(const llama_vocab * vocab, llama_token token, bool special) {
    std::string piece(64, '\0');
    int32_t n = llama_token_to_piece(vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    if (n < 0) {
        piece.resize(-n);
        n = llama_token_to_piece(vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    }
    piece.resize(std::max(n, 0));
    return piece;
}

std::string build_grammar(const std::function<void(const common_grammar_builder &)> &, const common_grammar_options &) {
    return "";
}

std::string gbnf_format_literal(const std::string & literal) { return literal; }

std::string json_schema_to_grammar(const common_json &, bool) { return ""; }

// What it would log are mostly texts of requests; what goes wrong is thrown as well.
int common_log_get_verbosity_thold() { return -1; }
common_log * common_log_main() { return nullptr; }
void common_log_add(common_log *, ggml_log_level, const char *, ...) {}

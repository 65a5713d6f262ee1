#include <algorithm>
#include <cctype>
#include <cstring>

#include "chat-peg-parser.h"
#include "chat/chat.hpp"
#include "chat/guarded.hpp"

namespace llamacancel {

namespace {

// For one parse of an answer: some 20 for each byte of deep JSON, which is the dearest.
constexpr uint64_t kParseSteps = 200'000'000;

// What is not told as it comes is parsed again once it has grown by this part: all parses together take as long as 256 of
// the whole text. Up to 4 KiB it is parsed with each piece.
constexpr size_t kGrowth = 256;
constexpr size_t kAlways = 4096;

common_peg_arena arena_of(const std::string & saved) {
    common_peg_arena arena;
    if (saved.empty()) {
        return build_chat_peg_parser([](common_chat_peg_builder & p) { return p.content(p.rest()) + p.end(); });
    }
    arena.load(saved);
    return arena;
}

std::unique_ptr<common_chat_peg_mapper> mapper_of(common_chat_format format, common_chat_msg & message) {
    switch (format) {
        case COMMON_CHAT_FORMAT_PEG_GEMMA4:
            return std::make_unique<common_chat_peg_gemma4_mapper>(message);
        case COMMON_CHAT_FORMAT_PEG_MINIMAX_M3:
            return std::make_unique<common_chat_peg_minimax_m3_mapper>(message);
        default:
            return std::make_unique<common_chat_peg_mapper>(message);
    }
}

bool ends_with(const std::string & text, std::string_view end) {
    return text.size() >= end.size() && std::memcmp(text.data() + text.size() - end.size(), end.data(), end.size()) == 0;
}

}  // namespace

ChatReader::ChatReader(const std::string & parser, common_chat_format format, std::string generation_prompt)
    : parser_(arena_of(parser)), format_(format), text_(std::move(generation_prompt)), begin_(text_.size()) {
    message_.role = "assistant";
}

Status ChatReader::feed(const std::string & text, bool last, Call & call, std::vector<ChatChange> & changes,
                        std::string & message) {
    text_ += text;
    return guarded_chat(call, kParseSteps, message, steps_, [&](CountedSteps & counted) {
        counted.add(text.size() / 16);
        if (!last && (text.empty() || read_on(changes) || text_.size() < due_)) {
            return;
        }
        parse(last, changes);
    });
}

// Tells what has come of text that goes on; false if a delimiter has come, or none is open.
bool ChatReader::read_on(std::vector<ChatChange> & changes) {
    if (!open_) {
        return false;
    }
    Open & open = *open_;
    for (const std::string & delimiter : open.delimiters) {
        if (text_.find(delimiter, open.told) != std::string::npos) {
            return false;
        }
    }
    // What may become a delimiter is not told yet.
    size_t held = std::min(open.longest > 0 ? open.longest - 1 : 0, text_.size() - open.told);
    const auto may_become_one = [&](const std::string & delimiter) {
        return held < delimiter.size() && text_.compare(text_.size() - held, held, delimiter, 0, held) == 0;
    };
    while (held > 0 && std::none_of(open.delimiters.begin(), open.delimiters.end(), may_become_one)) {
        --held;
    }
    const size_t end = text_.size() - held;
    if (end > open.told) {
        ChatChange change;
        const std::string more = text_.substr(open.told, end - open.told);
        (open.reasoning ? change.reasoning : change.content) = more;
        (open.reasoning ? message_.reasoning_content : message_.content) += more;
        changes.push_back(std::move(change));
        open.told = end;
    }
    return true;
}

// Reads the first bytes of the text as all that has come so far; false where they follow no format of the model's.
bool ChatReader::read(size_t size, Reading & reading) const {
    common_peg_parse_context context(text_.substr(0, size), COMMON_PEG_PARSE_FLAG_LENIENT);
    const common_peg_parse_result result = parser_.parse(context);
    // Some families' parsers end before the text does, where a call is none.
    const auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)); };
    if (result.fail() ||
        (result.success() && !std::all_of(text_.begin() + result.end, text_.begin() + size, is_space))) {
        return false;
    }
    reading = Reading();
    reading.message.role = "assistant";
    mapper_of(format_, reading.message)->from_ast(context.ast, result);
    context.ast.visit(result, [&](const common_peg_ast_node & node) {
        using tags = common_chat_peg_builder;
        const bool told = node.tag == tags::REASONING || node.tag == tags::CONTENT;
        if (told || (!node.tag.empty() && !reading.message.tool_calls.empty())) {
            reading.accounted = std::max(reading.accounted, node.end);
        }
#ifdef LLAMACANCEL_PATCHED
        const std::string & field =
            node.tag == tags::REASONING ? reading.message.reasoning_content : reading.message.content;
        if (told && result.need_more_input() && context.open_until && context.open_since < size && node.end == size &&
            node.start <= context.open_since && !node.text.empty() && ends_with(field, node.text)) {
            reading.open = std::make_unique<Open>();
            reading.open->reasoning = node.tag == tags::REASONING;
            reading.open->delimiters = context.open_until->delimiters;
            reading.open->told = size;
            for (const std::string & delimiter : reading.open->delimiters) {
                reading.open->longest = std::max(reading.open->longest, delimiter.size());
            }
        }
#endif
    });
    return true;
}

void ChatReader::parse(bool last, std::vector<ChatChange> & changes) {
    open_.reset();
    due_ = text_.size() < kAlways ? 0 : text_.size() + text_.size() / kGrowth;
    Reading reading;
    if (read(text_.size(), reading)) {
        open_ = last ? nullptr : std::move(reading.open);
        become(std::move(reading.message), changes);
        return;
    }
    due_ = text_.size() + text_.size() / 8;  // what follows hardly makes it better
    if (!last) {
        return;
    }
    // Text that leaves the format is content from where it does so: the same place, wherever the text was cut.
    size_t good = begin_, bad = text_.size();
    while (good + 1 < bad) {
        const size_t middle = good + (bad - good) / 2;
        (read(middle, reading) ? good : bad) = middle;
    }
    reading = Reading();
    reading.message.role = "assistant";
    read(good, reading);
    reading.message.content += text_.substr(std::max(reading.accounted, begin_));
    become(std::move(reading.message), changes);
}

// Tells how the message differs from what was told. Where it takes something back, what was told stands.
void ChatReader::become(common_chat_msg next, std::vector<ChatChange> & changes) {
    std::vector<common_chat_msg_diff> differences;
    try {
        differences = common_chat_msg_diff::compute_diffs(message_, next);
    } catch (const std::runtime_error &) {
        return;
    }
    for (common_chat_msg_diff & difference : differences) {
        ChatChange change;
        change.content = std::move(difference.content_delta);
        change.reasoning = std::move(difference.reasoning_content_delta);
        if (difference.tool_call_index != std::string::npos) {
            change.call = static_cast<int32_t>(difference.tool_call_index);
            change.id = std::move(difference.tool_call_delta.id);
            change.name = std::move(difference.tool_call_delta.name);
            change.arguments = std::move(difference.tool_call_delta.arguments);
        }
        changes.push_back(std::move(change));
    }
    message_ = std::move(next);
}

}  // namespace llamacancel

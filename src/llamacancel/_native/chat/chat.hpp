// Chat: a model's template renders messages into a prompt, and a parser that is derived from it reads the answer.
//
// The work is llama.cpp's common/chat.h. Strangers write the messages, the tools and, with a model's file, the template:
// so each call is counted and stops under its token, and what goes wrong in it is told, not suffered.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chat.h"
#include "model/model.hpp"
#include "process/steps.hpp"

namespace llamacancel {

// How far thinking is told apart from the answer.
enum class Reasoning : uint8_t {
    Apart,    // where the template knows of thinking
    Off,      // the template is asked for an answer without; what is thought all the same is told apart
    Inline,   // it stays in the content, with its tags
};

// What is asked of a template. Values are JSON texts, in OpenAI's forms.
struct ChatRequest {
    std::string messages;
    std::string tools;        // "" or an array
    std::string json_schema;  // "" or an object: the answer follows it
    std::vector<std::pair<std::string, std::string>> variables;
    common_chat_tool_choice tool_choice = COMMON_CHAT_TOOL_CHOICE_AUTO;
    bool parallel_tool_calls = true;
    Reasoning reasoning = Reasoning::Apart;
    bool continue_final_message = false;
};

// What a template made of it.
struct ChatRendering {
    std::string prompt;
    std::string generation_prompt;  // the end of the prompt that begins the answer
    common_chat_format format = COMMON_CHAT_FORMAT_CONTENT_ONLY;
    std::string parser;  // as common_peg_arena::save() writes it
    std::vector<std::string> stops;
    std::vector<std::string> markers;  // texts of control tokens that the parser needs to see
    bool thinks = false;
    std::string thinking_start;
    std::vector<std::string> thinking_ends;
    uint64_t steps = 0;
};

// A template, read once; used from any thread.
class ChatTemplate {
public:
    static constexpr size_t kMostBytes = 1 << 20;  // of a template

    // The model's own template, or `source` with the model's tokens; without a model `source` with the tokens that are
    // given. Status::Invalid with a message where it is no template.
    static Status make(const ModelBox * model, const std::string & source, const std::string & bos, const std::string & eos,
                       Call & call, std::shared_ptr<const ChatTemplate> & made, std::string & message);

    // Status::Invalid with a message where the template refuses the messages, or they are none.
    Status render(const ChatRequest & request, Call & call, ChatRendering & rendering, std::string & message) const;

    std::string source() const { return common_chat_templates_source(templates_.get()); }
    std::vector<std::pair<std::string, bool>> capabilities() const;

private:
    common_chat_templates_ptr templates_;
};

// What a piece of an answer has brought.
struct ChatChange {
    std::string content;
    std::string reasoning;
    int32_t call = -1;  // the tool call that the rest is about; -1: none
    std::string id;
    std::string name;
    std::string arguments;
};

// Reads one answer as it comes. What the changes add up to is the message, wherever the text was cut.
class ChatReader {
public:
    ChatReader(const std::string & parser, common_chat_format format, std::string generation_prompt);

    // `last`: nothing follows. Status::Cancelled leaves the reader as it was, but for the text, which it has taken.
    Status feed(const std::string & text, bool last, Call & call, std::vector<ChatChange> & changes, std::string & message);

    const common_chat_msg & message() const noexcept { return message_; }
    uint64_t steps() const noexcept { return steps_; }

private:
    // Text that only grows until a delimiter comes: it is told without parsing all of it again.
    struct Open {
        bool reasoning = false;
        std::vector<std::string> delimiters;
        size_t longest = 0;  // of them
        size_t told = 0;     // where the text begins that was not told
    };

    // What the first bytes of the text are read as.
    struct Reading {
        common_chat_msg message;
        size_t accounted = 0;  // bytes that the message has, or that are markers of what it has
        std::unique_ptr<Open> open;
    };

    bool read_on(std::vector<ChatChange> & changes);
    bool read(size_t size, Reading & reading) const;
    void parse(bool last, std::vector<ChatChange> & changes);
    void become(common_chat_msg next, std::vector<ChatChange> & changes);

    const common_peg_arena parser_;
    const common_chat_format format_;
    std::string text_;  // with the generation prompt before it
    const size_t begin_;  // of the answer in it
    common_chat_msg message_;
    std::unique_ptr<Open> open_;
    size_t due_ = 0;  // the length of the text from which on it is parsed again
    uint64_t steps_ = 0;
};

}  // namespace llamacancel

#include "chat/chat.hpp"
#include "chat/guarded.hpp"
#include "jinja/lexer.h"
#include "jinja/parser.h"

namespace llamacancel {

namespace {

// What reading or rendering a template may take by itself, and for each byte that is rendered: a conversation is rendered
// several times over, and is copied within each. Short ones with tools take up to 500,000 steps, most of which show how the
// template writes.
constexpr uint64_t kOwnSteps = 20'000'000;
constexpr uint64_t kStepsForByte = 16;

// What a chain of operators, attributes or filters may have: its parts are held, and freed, one within the other.
constexpr size_t kMostInTag = 4000;

void check(const std::string & source, CountedSteps & counted) {
    if (source.size() > ChatTemplate::kMostBytes) {
        throw std::runtime_error("the template has " + std::to_string(source.size()) + " bytes; at most " +
                                 std::to_string(ChatTemplate::kMostBytes) + " are allowed");
    }
    counted.add(source.size());
    const jinja::lexer_result read = jinja::lexer().tokenize(source);
    size_t in_tag = 0;
    for (const auto & token : read.tokens) {
        using type = jinja::token;
        in_tag = token.t == type::open_statement || token.t == type::open_expression ? 0 : in_tag + 1;
        if (in_tag > kMostInTag && token.t != type::text && token.t != type::comment) {
            throw std::runtime_error("a tag of the template has more than " + std::to_string(kMostInTag) + " parts");
        }
    }
    jinja::parse_from_tokens(read);  // common_chat_templates_init() says only that something is wrong
}

common_chat_templates_inputs inputs_of(const ChatRequest & request) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(request.messages));
    if (!request.tools.empty()) {
        inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(request.tools));
    }
    inputs.json_schema = request.json_schema;
    inputs.tool_choice = request.tool_choice;
    inputs.parallel_tool_calls = request.parallel_tool_calls;
    inputs.reasoning_format =
        request.reasoning == Reasoning::Inline ? COMMON_REASONING_FORMAT_NONE : COMMON_REASONING_FORMAT_AUTO;
    inputs.enable_thinking = request.reasoning != Reasoning::Off;
    if (request.continue_final_message) {
        inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
    }
    for (const auto & [name, value] : request.variables) {
        inputs.chat_template_kwargs[name] = value;
    }
    return inputs;
}

}  // namespace

Status ChatTemplate::make(const ModelBox * model, const std::string & source, const std::string & bos,
                          const std::string & eos, Call & call, std::shared_ptr<const ChatTemplate> & made,
                          std::string & message) {
    uint64_t steps = 0;
    return guarded_chat(call, kOwnSteps, message, steps, [&](CountedSteps & counted) {
        if (!source.empty()) {
            check(source, counted);
        }
        llama_model * const native = model ? model->get() : nullptr;
        for (const char * name : {static_cast<const char *>(nullptr), "tool_use"}) {
            const char * const own = native && source.empty() ? llama_model_chat_template(native, name) : nullptr;
            if (own) {
                check(own, counted);
            }
        }
        auto chat = std::make_shared<ChatTemplate>();
        chat->templates_ = common_chat_templates_init(native, source, bos, eos);
        made = std::move(chat);
    });
}

Status ChatTemplate::render(const ChatRequest & request, Call & call, ChatRendering & rendering,
                            std::string & message) const {
    const uint64_t size = request.messages.size() + request.tools.size() + request.json_schema.size();
    return guarded_chat(call, kOwnSteps + kStepsForByte * size, message, rendering.steps, [&](CountedSteps & counted) {
        counted.add(size / 16);
        const common_chat_params made = common_chat_templates_apply(templates_.get(), inputs_of(request));
        rendering.prompt = made.prompt;
        rendering.generation_prompt = made.generation_prompt;
        rendering.format = made.format;
        rendering.parser = made.parser;
        rendering.stops = made.additional_stops;
        rendering.markers = made.preserved_tokens;
        rendering.thinks = made.supports_thinking;
        rendering.thinking_start = made.thinking_start_tag;
        rendering.thinking_ends = made.thinking_end_tags;
    });
}

std::vector<std::pair<std::string, bool>> ChatTemplate::capabilities() const {
    const auto known = common_chat_templates_get_caps(templates_.get());
    return {known.begin(), known.end()};
}

}  // namespace llamacancel

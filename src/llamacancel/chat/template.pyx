# distutils: language = c++
"""Chat templates, and readers of what models answer: llama.cpp's, under a call's token and without the GIL."""

import re

cimport cython
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from .._native.cancel.call cimport Call
from .._native.chat.chat cimport *
from .._native.llama cimport llama_token, llama_vocab, llama_vocab_is_control, llama_vocab_n_tokens
from .._native.model.model cimport ModelBox
from .._native.process.status cimport Status
from .._native.words.vocabulary cimport piece_of
from ..cancel.token cimport core_of
from ..llama.call cimport Interrupt, check_status, watch_signals
from ..llama.model cimport Model

from ..errors import ChatError

cdef dict _TOOL_CHOICES = {"auto": 0, "required": 1, "none": 2}  # by common_chat_tool_choice
cdef dict _REASONING = {"auto": 0, "off": 1, "none": 2}  # by Reasoning


@cython.final
@cython.no_gc_clear
cdef class Template:
    """A chat template, read once. Used from any thread."""
    cdef shared_ptr[const ChatTemplate] native

    def __init__(self, Model model=None, source=None, bos="", eos="", token=None):
        cdef const ModelBox * box = NULL
        cdef shared_ptr[ModelBox] held
        if model is not None:
            model._check_open()
            held = model.box
            box = held.get()
        cdef string text = _bytes(source or "")
        cdef string first = _bytes(bos), end = _bytes(eos), message
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef Status status
        with nogil:
            status = ChatTemplate.make(box, text, first, end, call, self.native, message)
        check_status(status, "reading the chat template", message, &call, interrupt, "the chat template: ", ChatError)

    @property
    def source(self):
        return self.native.get().source().decode("utf-8", "replace")

    @property
    def capabilities(self):
        return {each.first.decode(): each.second for each in self.native.get().capabilities()}

    def render(self, str messages not None, str tools not None, str json_schema not None, dict variables not None, *,
               tool_choice, parallel_tool_calls, reasoning, continue_final_message, token):
        """What the template makes of JSON texts; a dict."""
        cdef ChatRequest request
        cdef ChatRendering made
        request.messages = _bytes(messages)
        request.tools = _bytes(tools)
        request.json_schema = _bytes(json_schema)
        for name, value in variables.items():
            request.variables.push_back(pair[string, string](_bytes(name), _bytes(value)))
        request.tool_choice = <common_chat_tool_choice> <int> _TOOL_CHOICES[tool_choice]
        request.parallel_tool_calls = parallel_tool_calls
        request.reasoning = <Reasoning> <int> _REASONING[reasoning]
        request.continue_final_message = continue_final_message
        cdef string message
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef Status status
        with nogil:
            status = self.native.get().render(request, call, made, message)
        check_status(status, "rendering the chat", message, &call, interrupt, "the chat template: ", ChatError)
        return {
            "text": made.prompt.decode("utf-8", "replace"),
            "generation_prompt": made.generation_prompt.decode("utf-8", "replace"),
            "format": <int> made.format,
            "parser": made.parser.decode("utf-8", "replace"),
            "stops": _texts(made.stops),
            "markers": _texts(made.markers),
            "thinks": made.thinks,
            "thinking_start": made.thinking_start.decode("utf-8", "replace"),
            "thinking_ends": _texts(made.thinking_ends),
            "steps": made.steps,
        }


@cython.final
@cython.no_gc_clear
cdef class Reader:
    """Reads one answer. One thread uses it at a time."""
    cdef unique_ptr[NativeReader] native

    def __init__(self, parser, format, generation_prompt):
        cdef string saved = _bytes(parser), begun = _bytes(generation_prompt)
        cdef int which = format
        with nogil:
            self.native.reset(new NativeReader(saved, <common_chat_format> which, begun))

    @property
    def steps(self):
        return self.native.get().steps()

    def feed(self, str text not None, cbool last, token):
        """The changes that a piece of text brings: (content, reasoning, call, id, name, arguments) of each."""
        cdef string data = _bytes(text)
        cdef vector[ChatChange] changes
        cdef string message
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef Status status
        with nogil:
            status = self.native.get().feed(data, last, call, changes, message)
        check_status(status, "reading the answer", message, &call, interrupt, "the answer: ", ChatError)
        return [
            (_text(each.content), _text(each.reasoning), each.call, _text(each.id), _text(each.name),
             _text(each.arguments))
            for each in changes
        ]


class Controls:
    """The texts of a model's control tokens.

    Attributes:
        tokens: The token of each text.
        search, sub, findall: Of a pattern that finds them, the longest first.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        self.search, self.sub, self.findall = pattern.search, pattern.sub, pattern.findall


def control_texts(Model model not None):
    """`Controls` of a model, or None if it has none. Made once for a model."""
    cdef const llama_vocab * vocab = model._vocab()
    cdef llama_token token
    if model._control_texts is None:
        tokens = {}
        for token in range(llama_vocab_n_tokens(vocab)):
            if llama_vocab_is_control(vocab, token):
                text = (<bytes> piece_of(vocab, token, True)).decode("utf-8", "replace")
                if len(text) > 1:
                    tokens.setdefault(text, token)
        model._control_texts = Controls(tokens) if tokens else False
    return model._control_texts or None


cdef bytes _bytes(text):
    return text.encode("utf-8", "replace")


cdef str _text(const string & text):
    return text.decode("utf-8", "replace")


cdef tuple _texts(vector[string] texts):
    return tuple([_text(each) for each in texts])

# Declarations of chat.hpp.

from libc.stdint cimport int32_t, uint64_t, uint8_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from ..cancel.call cimport Call
from ..model.model cimport ModelBox
from ..process.status cimport Status


cdef extern from "chat/chat.hpp" nogil:
    ctypedef int common_chat_format
    ctypedef int common_chat_tool_choice


cdef extern from "chat/chat.hpp" namespace "llamacancel" nogil:
    enum class Reasoning (uint8_t):
        Apart
        Off
        Inline

    cppclass ChatRequest:
        string messages
        string tools
        string json_schema
        vector[pair[string, string]] variables
        common_chat_tool_choice tool_choice
        bool parallel_tool_calls
        Reasoning reasoning
        bool continue_final_message

    cppclass ChatRendering:
        string prompt
        string generation_prompt
        common_chat_format format
        string parser
        vector[string] stops
        vector[string] markers
        bool thinks
        string thinking_start
        vector[string] thinking_ends
        uint64_t steps

    cppclass ChatTemplate:
        @staticmethod
        Status make(const ModelBox * model, const string & source, const string & bos, const string & eos, Call & call,
                    shared_ptr[const ChatTemplate] & made, string & message) except +
        Status render(const ChatRequest & request, Call & call, ChatRendering & rendering, string & message) except +
        string source() except +
        vector[pair[string, bool]] capabilities() except +

    cppclass ChatChange:
        string content
        string reasoning
        int32_t call
        string id
        string name
        string arguments

    cppclass NativeReader "llamacancel::ChatReader":
        NativeReader(const string & parser, common_chat_format format, string generation_prompt) except +
        Status feed(const string & text, bool last, Call & call, vector[ChatChange] & changes,
                    string & message) except +
        uint64_t steps() noexcept

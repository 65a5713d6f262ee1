"""Chat: templates, tools and thinking of every family of models, by llama.cpp's own templates and parsers.

`Model.chat.render()` makes a prompt of a conversation. Its `reader()` tells thinking, content and tool calls of
the answer apart, as it comes. All of it is counted, bounded and under a token, and runs without the interpreter lock.
"""

from ..llama import load_compiled

load_compiled(f"{__name__}.template")  # which the others use

from .message import ChatDelta, ChatMessage, ToolCall, ToolCallDelta  # noqa: E402
from .prompt import Chat, ChatPrompt  # noqa: E402
from .reader import ChatReader  # noqa: E402

__all__ = ["Chat", "ChatDelta", "ChatMessage", "ChatPrompt", "ChatReader", "ToolCall", "ToolCallDelta"]

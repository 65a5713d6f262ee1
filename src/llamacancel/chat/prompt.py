"""A model's chat: conversations are rendered into prompts, which know how their answers are read."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..constraint import Source
from ..errors import ChatError
from .grammar import constraint_of
from .history import as_json, messages_of, systems_first, tools_of
from .message import ChatMessage
from .reader import ChatReader
from .template import Reader, Template, control_texts

if TYPE_CHECKING:
    from ..cancel import CancelToken
    from ..llama import Model

__all__ = ["Chat", "ChatPrompt"]

Reasoning = Literal["auto", "off", "none"]
_SHORT_IDS = re.compile(r"length\s*!=\s*9\b")
_MARK = "\x02"  # a text that no word begins with
_ROLES_OF_STRANGERS = ("user", "tool")


class Chat:
    """Renders conversations by a chat template, with llama.cpp's own Jinja. `Model.chat` is the model's own.

    Safe to use from any thread. Rendering takes a millisecond or more: it does not belong on an event loop.

    Args:
        model: The model, whose tokens the prompts are made of.
        template: Another template than the model's, in Jinja.
        token: Cancels the reading of the template.

    Raises:
        ChatError: If the template cannot be read.
        DecodeCancelled: If `token` was cancelled.
    """

    def __init__(self, model: Model, template: str | None = None, *, token: CancelToken | None = None) -> None:
        self._model: Model | None = model
        if template is None:
            self._template = _template_of(model, token)
        else:
            self._template = Template(model, _checked(template), token=token)

    @classmethod
    def from_template(cls, template: str, *, bos: str = "", eos: str = "", token: CancelToken | None = None) -> Chat:
        """A chat without a model: its prompts have a text, and no tokens."""
        chat = cls.__new__(cls)
        chat._model = None
        chat._template = Template(None, _checked(template), bos, eos, token)
        return chat

    @property
    def template(self) -> str:
        """The template's text; one of ChatML where the model has none."""
        return self._template.source

    @property
    def capabilities(self) -> dict[str, bool]:
        """What the template can show, in llama.cpp's words: "supports_tools", "supports_system_role", ..."""
        return self._template.capabilities

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        json_schema: Any = None,
        reasoning: Reasoning = "auto",
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        token: CancelToken | None = None,
    ) -> ChatPrompt:
        """Make a prompt of a conversation.

        A text in what users and tools say that looks like a control token of the model stays text.

        Args:
            messages: In OpenAI's form: role, content (text or parts of text), tool_calls, tool_call_id, and
                `reasoning_content` of what was thought. Histories as clients send them are taken: content None,
                arguments as text or object, several messages of the system.
            tools: Functions that may be called, in OpenAI's form.
            tool_choice: "auto"; "none", which is as if there were no tools; "required"; the name of a tool, or OpenAI's
                object for it or for allowed tools.
            parallel_tool_calls: Whether an answer may have several calls.
            json_schema: What the content has to follow. With tools, a call is an answer, too.
            reasoning: "auto": what is thought is told apart, where the template knows of it. "off": the template is
                asked for an answer without. "none": it stays in the content, with its tags.
            continue_final_message: The last message is an assistant's, and the answer goes on with it.
            template_kwargs: Further variables for the template, JSON values.
            token: Cancels it.

        Raises:
            ChatError: If the template refuses the messages, never ends, or an argument is none that it can be; or if a
                call is demanded in a format that no constraint is known for (DeepSeek V3.2, Gemma 4, LFM2, Kimi K3).
            TypeError, ValueError: If a schema is out of bounds.
            DecodeCancelled: If `token` was cancelled.
        """
        if reasoning not in ("auto", "off", "none"):
            raise ChatError(f"reasoning must be 'auto', 'off' or 'none', not {reasoning!r}")
        made = messages_of(messages, short_ids=self._short_ids)
        if continue_final_message and made[-1]["role"] != "assistant":
            raise ChatError("continue_final_message: the last message is no assistant's")
        choice, allowed = _choice_of(tool_choice)
        offered = [] if choice == "none" else tools_of(tools)
        allowed = _known(allowed, offered)
        if choice == "required" and not offered:
            raise ChatError("tool_choice demands a call, and there are no tools")
        made, guarded = self._guard(made)
        render = functools.partial(
            self._template.render,
            tools=as_json("tools", offered) if offered else "",
            json_schema="",
            variables=_variables(template_kwargs),
            tool_choice=choice if offered else "none",
            parallel_tool_calls=bool(parallel_tool_calls),
            reasoning=reasoning,
            continue_final_message=bool(continue_final_message),
            token=token,
        )
        try:
            rendering = render(as_json("messages", made))
        except ChatError:
            again = systems_first(made)
            if again is None:
                raise
            rendering = render(as_json("messages", again))
        prompt = ChatPrompt(self._model, rendering, guarded, short_ids=self._short_ids, token=token)
        prompt.constraint = constraint_of(
            lambda text: _whole(prompt.reader(), text, token),
            rendering,
            [tool for tool in offered if allowed is None or tool["function"]["name"] in allowed],
            control_texts(self._model) if self._model is not None else None,
            demanded=choice == "required",
            several=bool(parallel_tool_calls),
            json_schema=json_schema,
            may_think=reasoning != "off",
        )
        return prompt

    @functools.cached_property
    def _short_ids(self) -> bool:
        """Whether the template wants ids of calls of nine letters and digits."""
        return _SHORT_IDS.search(self.template) is not None

    def _guard(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], _Guarded]:
        """The messages with marks in place of what looks like a control token, where strangers wrote it."""
        controls = control_texts(self._model) if self._model is not None else None
        guarded = _Guarded()
        if controls is None:
            return messages, guarded
        texts = [text for message in messages if message["role"] in _ROLES_OF_STRANGERS for text in _texts(message)]
        if not any(map(controls.search, texts)):
            return messages, guarded
        guarded = _Guarded(texts)
        made = []
        for message in messages:
            if message["role"] in _ROLES_OF_STRANGERS:
                content = message["content"]
                if isinstance(content, str):
                    content = controls.sub(guarded.hide, content)
                else:
                    content = [{**part, "text": controls.sub(guarded.hide, part["text"])} for part in content]
                message = {**message, "content": content}
            made.append(message)
        return made, guarded


class ChatPrompt:
    """A rendered conversation, ready to be continued, and how the answer is read.

    Attributes:
        text: The prompt, with its markers.
        stops: Texts that end the answer, beside the model's own tokens.
        thinks: Whether the template knows of thinking.
        constraint: What the answer has to follow, for `Sampler(lark=)`, where a call was demanded or a schema given;
            else None. It may think before, where the template knows of thinking.
    """

    def __init__(
        self,
        model: Model | None,
        rendering: dict[str, Any],
        guarded: _Guarded,
        *,
        short_ids: bool,
        token: CancelToken | None,
    ) -> None:
        self._rendering = rendering
        self._short_ids = short_ids
        self.text: str = guarded.show(rendering["text"])
        self.stops: tuple[str, ...] = rendering["stops"]
        self.thinks: bool = rendering["thinks"]
        self.constraint: Source | None = None
        self._tokens: list[int] | None = None
        self._shown: frozenset[int] = frozenset()
        if model is not None:
            self._tokens = _tokens_of(model, guarded.pieces(rendering["text"]), token)
            self._shown = _markers_of(model, rendering)

    @property
    def tokens(self) -> list[int]:
        """The prompt as tokens, with one BOS where the model wants it."""
        if self._tokens is None:
            raise ChatError("a prompt without a model has no tokens")
        return list(self._tokens)

    @property
    def shown_tokens(self) -> frozenset[int]:
        """Control tokens whose texts the reader needs to see in the answer."""
        return self._shown

    def reader(self) -> ChatReader:
        """A reader of one answer."""
        made = self._rendering
        native = Reader(made["parser"], made["format"], made["generation_prompt"])
        return ChatReader(native, short_ids=self._short_ids)

    def __repr__(self) -> str:
        return f"<ChatPrompt of {len(self.text)} characters>"


class _Guarded:
    """Texts that look like control tokens and are none, each with a mark that stands for it while a template renders.

    Args:
        texts: What no mark may be in.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._hidden: list[str] = []
        n = 0
        while any(f"\ue000{n}:" in text for text in texts):
            n += 1
        self._begin = f"\ue000{n}:"
        self._mark = re.compile(rf"{self._begin}(\d+)\ue001")

    def hide(self, found: re.Match[str]) -> str:
        self._hidden.append(found[0])
        return f"{self._begin}{len(self._hidden) - 1}\ue001"

    def show(self, text: str) -> str:
        return "".join(piece for piece, _ in self.pieces(text))

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces, each with whether its markers are markers."""
        if not self._hidden:
            yield text, True
            return
        for i, piece in enumerate(self._mark.split(text)):
            if i % 2:
                yield self._hidden[int(piece)], False
            elif piece:
                yield piece, True


def _whole(reader: ChatReader, text: str, token: CancelToken | None) -> ChatMessage:
    reader.feed(text, token)
    reader.end(token)
    return reader.message


def _checked(template: object) -> str:
    if not isinstance(template, str):
        raise TypeError(f"template must be text, not {type(template).__name__}")
    if not template.strip():
        raise ChatError("the template is empty")
    return template


def _template_of(model: Model, token: CancelToken | None) -> Template:
    template = model._chat_template
    if template is None:
        template = model._chat_template = Template(model, token=token)
    return template


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _tokens_of(model: Model, pieces: Iterable[tuple[str, bool]], token: CancelToken | None) -> list[int]:

    def of(text: str, special: bool) -> list[int]:
        made: list[int] = model.tokenize(text, add_special=False, parse_special=special, token=token).tolist()
        return made

    tokens: list[int] = []
    for i, (text, special) in enumerate(pieces):
        if i == 0:
            tokens = of(text, special)
            mark = of(_MARK, False)
            continue
        # Some vocabularies put a space before a text, but not in the middle of one.
        made = of(_MARK + text, special)
        tokens += made[len(mark) :] if made[: len(mark)] == mark else of(text, special)
    if model.adds_bos and model.bos is not None and tokens[:1] != [model.bos]:
        tokens.insert(0, model.bos)
    return tokens


def _markers_of(model: Model, rendering: Mapping[str, Any]) -> frozenset[int]:
    """The control tokens whose texts the parser looks for."""
    controls = control_texts(model)
    if controls is None:
        return frozenset()
    return frozenset(
        id
        for text in {*rendering["markers"], *controls.findall(rendering["parser"].replace("\\/", "/"))}
        if (id := controls.tokens.get(text)) is not None
    )


def _variables(given: Mapping[str, Any] | None) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ChatError("template_kwargs must be an object")
    return {name: as_json(f"template_kwargs[{name!r}]", value) for name, value in given.items()}


def _choice_of(given: object) -> tuple[Literal["auto", "required", "none"], list[str] | None]:
    """How tools may be called, and which; None for all."""
    if given is None or given == "auto":
        return "auto", None
    if given == "none":
        return "none", None
    if given in ("required", "any"):
        return "required", None
    if isinstance(given, str):
        return "required", [given]
    if isinstance(given, Mapping):
        if given.get("type") == "allowed_tools":
            allowed = given.get("allowed_tools", given)
            if isinstance(allowed, Mapping) and isinstance(allowed.get("tools"), Sequence):
                mode: Literal["auto", "required"] = "required" if allowed.get("mode") == "required" else "auto"
                return mode, [_name_of(each) for each in allowed["tools"]]
        else:
            return "required", [_name_of(given)]
    raise ChatError("tool_choice must be 'auto', 'none', 'required', or an object that names a function")


def _name_of(given: object) -> str:
    if isinstance(given, Mapping):
        function = given.get("function", given)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise ChatError("tool_choice: there is no function with a name")


def _known(allowed: list[str] | None, offered: Sequence[Mapping[str, Any]]) -> list[str] | None:
    names = {tool["function"]["name"] for tool in offered}
    for name in allowed or ():
        if name not in names:
            raise ChatError(f"tool_choice: there is no tool of the name {name[:60]!r}")
    return allowed

import re
from collections.abc import Callable
from typing import Any, Literal, final

from ..cancel import CancelToken
from ..llama import Model

@final
class Template:
    def __init__(
        self,
        model: Model | None = None,
        source: str | None = None,
        bos: str = "",
        eos: str = "",
        token: CancelToken | None = None,
    ) -> None: ...
    @property
    def source(self) -> str: ...
    @property
    def capabilities(self) -> dict[str, bool]: ...
    def render(
        self,
        messages: str,
        tools: str,
        json_schema: str,
        variables: dict[str, str],
        *,
        tool_choice: Literal["auto", "required", "none"],
        parallel_tool_calls: bool,
        reasoning: Literal["auto", "off", "none"],
        continue_final_message: bool,
        token: CancelToken | None,
    ) -> dict[str, Any]: ...

@final
class Reader:
    def __init__(self, parser: str, format: int, generation_prompt: str) -> None: ...
    @property
    def steps(self) -> int: ...
    def feed(self, text: str, last: bool, token: CancelToken | None) -> list[tuple[str, str, int, str, str, str]]: ...

class Controls:
    tokens: dict[str, int]
    @property
    def search(self) -> Callable[[str], re.Match[str] | None]: ...
    @property
    def sub(self) -> Callable[[Callable[[re.Match[str]], str], str], str]: ...
    @property
    def findall(self) -> Callable[[str], list[str]]: ...

def control_texts(model: Model) -> Controls | None: ...

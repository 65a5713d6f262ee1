"""What is drawn, and what must be true: of schemas, grammars, chat bodies, GGUF files, saved states.

A case is JSON. `draw` runs beside hypothesis, `try_case` in a worker: it returns, or raises what is wrong. Whatever
a case does, the process lives, and what the worker asks between two cases is answered as ever, to the bit.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

__all__ = ["TARGETS", "Target", "Wrong"]

Case = Any
REFUSED = (ValueError, TypeError, lc.LlamaCancelError)  # what bad input may raise


class Wrong(AssertionError):
    """A case showed a fault."""


class Target:
    """What is tried with one kind of input.

    Attributes:
        draw: Draws a case.
    """

    draw: st.SearchStrategy[Case]

    def try_case(self, case: Case) -> str:
        """Try it; say what became of it.

        Raises:
            Wrong: If something is not as it must be.
        """
        raise NotImplementedError


def words_of(error: BaseException) -> str:
    if not str(error).strip():
        raise Wrong(f"{type(error).__name__} without a word")
    return type(error).__name__


# ---- schemas and grammars ----------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(["a", "b", "type", "$ref", "", "é", "a/b", "a~b", '"', "\\", "a" * 300]), st.text(max_size=4)
)
numbers = st.one_of(
    st.integers(-3, 10),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63) - 1, 1e19, 1e308, 0.1, -0.0]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)
patterns = st.one_of(
    st.sampled_from(
        ["^a+$", "a|b", "(", "[z-a]", "^(a|b)*c{2,3}$", "(a{1000}){1000}", "\\p{L}+", "(?=a)b", "[^]]", ""]
    ),
    st.text(alphabet="ab()[]{}*+?|\\^$.,-0129dw", max_size=12),
)
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, max_size=3)
    mapped = st.dictionaries(names, inner, max_size=4)
    refs = st.one_of(
        st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/$defs/a~1b", "#/nowhere", "http://x/y", "#/$defs/é"]), names
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.one_of(st.sampled_from(TYPES), st.lists(st.sampled_from(TYPES), max_size=3), values),
            "properties": mapped,
            "patternProperties": st.dictionaries(patterns, inner, max_size=2),
            "additionalProperties": inner,
            "required": st.lists(names, max_size=3),
            "items": st.one_of(inner, some),
            "prefixItems": some,
            "anyOf": some,
            "oneOf": some,
            "allOf": some,
            "not": inner,
            "if": inner,
            "enum": st.lists(values, max_size=4),
            "const": values,
            "pattern": patterns,
            "format": st.one_of(st.sampled_from(["date", "email", "uuid", "ipv6", "time"]), names),
            "minLength": numbers,
            "maxLength": numbers,
            "minItems": numbers,
            "maxItems": numbers,
            "minimum": numbers,
            "exclusiveMaximum": numbers,
            "multipleOf": numbers,
            "$ref": refs,
            "$defs": mapped,
            "$anchor": names,
        },
    )


schemas = st.recursive(st.one_of(st.booleans(), st.just({})), _objects, max_leaves=12)

gbnf = st.one_of(
    st.lists(
        st.sampled_from(
            [
                "root ::= ",
                "a ::= ",
                '"x"',
                "[a-z]",
                "[^\\n]",
                "a",
                "root",
                " | ",
                "(",
                ")",
                "*",
                "+",
                "?",
                "{2}",
                "{2,1}",
                "{0,99999}",
                "\n",
                "#c\n",
                '"',
                "[",
                "\\",
                " ",
                "::=",
                "{",
                "é",
                "<[1]>",
                "!<[2]>",
                ".",
            ]
        ),
        max_size=30,
    ).map("".join),
    st.text(max_size=30),
    st.lists(st.sampled_from(['"x"', "[a-z]*", "(a | b)", "a?", "b"]), min_size=1, max_size=6).map(
        lambda parts: f'root ::= {" ".join(parts)}\na ::= "a" b?\nb ::= [0-9]+ | a'
    ),
)
lark = st.one_of(
    st.lists(
        st.sampled_from(
            [
                "start: ",
                "a: ",
                "B: ",
                '"x"',
                "/a+/",
                "a",
                "B",
                "start",
                " | ",
                "(",
                ")",
                "*",
                "+",
                "?",
                "{2}",
                "{1,99}",
                "\n",
                "%json {}",
                "%ignore /x/",
                "%import common.INT",
                "%regex {}",
                "/(/",
                "/[/",
                "[",
                "]",
                ": ",
            ]
        ),
        max_size=24,
    ).map("".join),
    st.text(max_size=30),
)


class Constrained(Target):
    """A sampler that follows what a stranger wrote: refused in words, or it samples what it allows."""

    def __init__(self, argument: str, draw: st.SearchStrategy[Case]) -> None:
        self.argument, self.draw = argument, draw
        self._context: lc.Context | None = None

    def try_case(self, case: Case) -> str:
        if self._context is None:
            model = lc.Model.load(cached_model("llama", "tiny"))
            self._context = model.context(n_ctx=64, n_threads=1)
            batch = lc.Batch(4)
            batch.add_sequence([300, 301, 302, 303])
            self._context.decode(batch)
        context = self._context
        token = lc.CancelToken(timeout=60)
        try:
            sampler = lc.Sampler(temperature=1, top_k=0, top_p=1, min_p=0, seed=1, **{self.argument: case})
            for _ in range(6):
                chosen = sampler.sample(context, token=token)
                if context.model.is_eog(chosen):
                    break
        except lc.DecodeCancelled:
            raise Wrong("it took a minute") from None
        except REFUSED as error:
            return words_of(error)
        return "done"


# ---- chat bodies -------------------------------------------------------------------------------------------------

contents = st.one_of(
    st.none(),
    st.text(max_size=20),
    values,
    st.lists(
        st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "x"]), "text": st.text(max_size=5)}),
        max_size=3,
    ),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "nobody"])},
        optional={
            "content": contents,
            "tool_calls": values,
            "name": values,
            "tool_call_id": values,
            "reasoning_content": values,
        },
    ),
    max_size=4,
)
tools = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries(
                    {"name": names}, optional={"parameters": schemas, "description": values}
                ),
            }
        ),
    ),
    max_size=3,
)
plain_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=3,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.one_of(messages, values),
    "model": values,
    "max_tokens": st.one_of(st.integers(-2, 6), values),
    "temperature": st.one_of(numbers, values),
    "top_p": numbers,
    "top_k": numbers,
    "seed": numbers,
    "n": st.one_of(st.integers(-1, 3), values),
    "stop": st.one_of(st.text(max_size=3), values),
    "stream": st.one_of(st.booleans(), values),
    "logprobs": st.booleans(),
    "top_logprobs": numbers,
    "logit_bias": st.dictionaries(st.one_of(st.integers(-1, 200000).map(str), names), numbers, max_size=3),
    "tools": tools,
    "tool_choice": st.one_of(st.sampled_from(["auto", "none", "required"]), values),
    "response_format": st.one_of(
        values,
        st.fixed_dictionaries(
            {
                "type": st.just("json_schema"),
                "json_schema": st.fixed_dictionaries({"name": st.just("a"), "schema": schemas}),
            }
        ),
    ),
    "grammar": gbnf,
    "timeout": numbers,
    "priority": numbers,
    "stream_options": values,
    "user": values,
}
# A body of nothing but odd fields is refused for the first of them: most is as it should be, three fields are not.
bodies = st.builds(
    lambda said, stream, odd: {"messages": said, "stream": stream, **odd},
    plain_messages,
    st.booleans(),
    st.lists(st.sampled_from(list(FIELDS)), max_size=3, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in chosen})
    ),
)


class Chat(Target):
    """A body of `/v1/chat/completions`: an answer or a 4xx with words, and the next request is answered as ever."""

    draw = bodies

    def __init__(self) -> None:
        self._client: Any = None
        self._expected: Any = None

    def _plain(self) -> Any:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
        answer = self._client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            raise Wrong(f"a plain request behind it got {answer.status_code}: {answer.text[:300]}")
        return answer.json()["choices"]

    def try_case(self, case: Case) -> str:
        if self._client is None:
            from fastapi.testclient import TestClient

            from llamacancel.server import create_app

            model = lc.Model.load(cached_model("llama", "tiny"))
            engine = lc.Engine(model, slots=2, n_threads=1, n_ctx=512)
            self._client = TestClient(create_app(engine), raise_server_exceptions=False, base_url="http://127.0.0.1")
            self._client.__enter__()
            self._expected = self._plain()
        body = json.dumps({"max_tokens": 4, **case})
        answer = self._client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        told = answer.text
        if answer.status_code >= 500:
            raise Wrong(f"{answer.status_code}: {told[:300]}")
        if answer.headers.get("content-type", "").startswith("application/json"):
            if answer.status_code >= 400 and not answer.json()["error"]["message"].strip():
                raise Wrong(f"{answer.status_code} without a word")
        elif answer.status_code == 200 and not told.rstrip().endswith("data: [DONE]"):
            raise Wrong(f"a stream that breaks off: {told[-200:]}")
        if self._plain() != self._expected:
            raise Wrong("a plain request behind it got another answer")
        return str(answer.status_code)


# ---- files and states --------------------------------------------------------------------------------------------

edits = st.lists(
    st.one_of(
        st.tuples(
            st.just("set"),
            st.integers(0, 2**20),
            st.binary(min_size=1, max_size=8).map(lambda b: base64.b64encode(b).decode()),
        ),
        st.tuples(st.just("cut"), st.integers(0, 2**20), st.integers(0, 64)),
        st.tuples(st.just("end"), st.integers(0, 2**20), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[Any], most: int) -> bytes:
    """`data` with the changes, whose places count from the start and lie within the first `most` bytes."""
    for what, at, value in changes:
        at %= min(max(len(data), 1), most)
        if what == "set":
            new = base64.b64decode(value)
            data = data[:at] + new + data[at + len(new) :]
        elif what == "cut":
            data = data[:at] + data[at + value :]
        else:
            data = data[:at]
    return data


class File(Target):
    """A GGUF file with a few bytes that are others: refused in words, or it works."""

    _HEADER = 4096

    draw = st.tuples(st.sampled_from(["llama", "mamba", "swa"]), edits, st.integers(0, 60))

    def try_case(self, case: Case) -> str:
        arch, changes, skip = case
        data = cached_model(arch, "tiny").read_bytes()
        changes = [(what, at + skip * self._HEADER, value) for what, at, value in changes]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            path.write_bytes(edited(data, changes, max(len(data) // 8, self._HEADER)))
            try:
                with lc.Model.load(path) as model, model.context(n_ctx=64, n_threads=1) as context:
                    batch = lc.Batch(8)
                    batch.add_sequence([token % model.n_vocab for token in range(300, 308)])
                    context.decode(batch)
            except (*REFUSED, MemoryError) as error:
                return words_of(error)
        return "done"


class State(Target):
    """A saved state with a few bytes that are others: refused, and neither sequence has changed by a bit."""

    draw = st.tuples(st.sampled_from(["llama", "swa", "mamba", "hybrid"]), edits)

    def __init__(self) -> None:
        self._made: dict[str, tuple[lc.Context, bytes, list[np.ndarray]]] = {}

    def _make(self, arch: str) -> tuple[lc.Context, bytes, list[np.ndarray]]:
        if arch not in self._made:
            context = lc.Model.load(cached_model(arch, "tiny")).context(n_ctx=256, n_seq_max=2, n_threads=1)
            for seq in range(2):
                batch = lc.Batch(20)
                batch.add_sequence(range(400 + seq, 420 + seq), seq_id=seq)
                context.decode(batch)
            self._made[arch] = context, context.state.save(0), [context.state.save(0), context.state.save(1)]
        return self._made[arch]

    def try_case(self, case: Case) -> str:
        arch, changes = case
        context, saved, expected = self._make(arch)
        data = edited(saved, changes, len(saved))
        try:
            context.state.load(0, data)
        except lc.StateError as error:
            told = words_of(error)
        else:
            if data != saved:
                raise Wrong("a state that was changed was loaded")
            told = "done"
        if [context.state.save(seq) for seq in range(2)] != expected:
            raise Wrong("what the context holds has changed")
        return told


TARGETS: dict[str, Callable[[], Target]] = {
    "schema": lambda: Constrained("json_schema", schemas),
    "grammar": lambda: Constrained("grammar", gbnf),
    "regex": lambda: Constrained("regex", patterns),
    "lark": lambda: Constrained("lark", lark),
    "chat": Chat,
    "file": File,
    "state": State,
}

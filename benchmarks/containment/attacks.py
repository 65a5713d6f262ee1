"""The largest and the worst that strangers may send: each a request to the server, most of them to the engine, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamacancel.conformance.prompts import of_words

__all__ = ["ATTACKS", "Attack", "Facts", "engine_request"]

MEGABYTES = 4 * 2**20 - 4096  # what a body may have, but for its other fields


@dataclass(frozen=True)
class Facts:
    """What an attack is made to measure for.

    Attributes:
        n_vocab: Tokens of the model.
        long: Tokens of the longest prompt.
    """

    n_vocab: int
    long: int


@dataclass(frozen=True)
class Attack:
    """What strangers send for as long as a measurement takes.

    Attributes:
        name: Its name in reports.
        fields: Makes the body of a request.
        path: Where it is sent to, below the API's address.
        clients: How many send it at once, each one again when it is answered.
        leaves: Seconds after which each hangs up; None to wait for the answer.
        in_engine: It is more than a body: the engine alone has work with it.
    """

    name: str
    fields: Callable[[Facts], dict[str, Any]]
    path: str = "/completions"
    clients: int = 1
    leaves: float | None = None
    in_engine: bool = True


def _plain(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0, **fields}


def _chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, **fields}


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return _chat(
        max_tokens=64, response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    )


def _strings(count: int) -> dict[str, Any]:
    return {f"property_{i}": {"type": "string"} for i in range(count)}


def _chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "integer"}}}


def _tool(number: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": _strings(3)}
    function = {"name": f"tool_{number}", "description": of_words(20, str(number)), "parameters": parameters}
    return {"type": "function", "function": function}


def _wide(count: int) -> str:
    return "".join(chr(0x4E00 + 2 * i % 0x5000) for i in range(count))


ATTACKS = (
    Attack("body: 260,000 small values", lambda _: _plain(max_tokens=1, more=[0] * 260_000), in_engine=False),
    Attack("body: the same from 8 clients", lambda _: _plain(max_tokens=1, more=[0] * 260_000), clients=8,
           in_engine=False),
    Attack("body: 60,000 lists in a list", lambda _: _plain(max_tokens=1, more=[[]] * 60_000), in_engine=False),
    Attack("body: 60,000 members of objects", lambda _: _plain(max_tokens=1, more=[{"a": 1}] * 30_000),
           in_engine=False),
    Attack("body: a prompt of 4 MB of words", lambda _: _plain(prompt=("word " * MEGABYTES)[:MEGABYTES])),
    Attack("body: a prompt of 4 MB of one letter", lambda _: _plain(prompt="a" * MEGABYTES)),
    Attack("body: 4 MB of line breaks, escaped", lambda _: _plain(prompt="\n" * (MEGABYTES // 2))),
    Attack("chat: 20,000 messages", lambda _: _chat(messages=[{"role": "user", "content": "Hello"}] * 20_000),
           "/chat/completions", in_engine=False),
    Attack("chat: a message of 4 MB", lambda _: _chat(messages=[{"role": "user", "content": "word " * 800_000}]),
           "/chat/completions", in_engine=False),
    Attack("chat: 1,000 tools", lambda _: _chat(tools=[_tool(i) for i in range(1000)]), "/chat/completions",
           in_engine=False),
    Attack("chat: 500 tools, one to be called",
           lambda _: _chat(tools=[_tool(i) for i in range(500)], tool_choice="required"), "/chat/completions",
           in_engine=False),
    Attack("schema: 2,000 properties", lambda _: _schema({"type": "object", "properties": _strings(2000)}),
           "/chat/completions"),
    Attack("schema: 2,000 required properties",
           lambda _: _schema({"type": "object", "properties": _strings(2000), "required": list(_strings(2000))}),
           "/chat/completions"),
    Attack("schema: a choice of 19,000 texts",
           lambda _: _schema({"enum": [f"choice number {i}" for i in range(19_000)]}), "/chat/completions"),
    Attack("schema: 900 references", lambda _: _schema(_chain(900)), "/chat/completions"),
    Attack("schema: lists of up to 10,000 texts of up to 10,000 letters",
           lambda _: _schema({"type": "array", "maxItems": 10_000, "items": {"type": "string", "maxLength": 10_000}}),
           "/chat/completions"),
    Attack("schema: a pattern with 2^20 states", lambda _: _schema({"type": "string", "pattern": "^(.*a.{20})+$"}),
           "/chat/completions"),
    Attack("schema: a pattern of repetitions",
           lambda _: _schema({"type": "string", "pattern": "^((a{0,50}b?){0,50}c?){0,4}$"}), "/chat/completions"),
    Attack("grammar: ambiguous", lambda _: _plain(grammar="root ::= x x x x x x x x\nx ::= [a-z ]*"), clients=3),
    Attack("grammar: ambiguous and recursive", lambda _: _plain(grammar='root ::= s\ns ::= "a" s s | [a-z ] s | ""')),
    Attack("grammar: a class of 100,000 letters", lambda _: _plain(grammar=f"root ::= [{_wide(100_000)}a-z ]+")),
    Attack("grammar: 5,000 letters 2,000 times", lambda _: _plain(grammar='root ::= "' + "a" * 5000 + '"{2000}')),
    Attack("grammar: a class 2,000 times", lambda _: _plain(grammar="root ::= [a-z ]{2000}"), clients=3),
    Attack("grammar: 3 MB of alternatives",
           lambda _: _plain(grammar="root ::= " + " | ".join(f'"text {i}"' for i in range(200_000)))),
    Attack("grammar: 1 MB of braces", lambda _: _plain(grammar='root ::= "a"' + "{" * 2**20)),
    Attack("logit_bias for every token", lambda f: _plain(n=2, logit_bias=_bias(f.n_vocab, 32_768))),
    Attack("logprobs: 20", lambda _: _plain(logprobs=20, max_tokens=200), clients=3),
    Attack("64 answers to one prompt", lambda _: _plain(n=64)),
    Attack("16 texts that stop an answer", lambda _: _plain(n=3, stop=[f"{'e' * 10_000}{i}" for i in range(16)])),
    Attack("embeddings: 512 short texts", lambda _: {"input": [of_words(12, str(i)) for i in range(512)]},
           "/embeddings"),
    Attack("embeddings: the longest text", lambda f: {"input": [300 + i % 500 for i in range(f.long)]}, "/embeddings"),
    Attack("prompts of the longest", lambda f: _plain(prompt=_ids(f), max_tokens=1), clients=3),
    Attack("a flood of cancels in long prompts", lambda f: _plain(prompt=_ids(f)), clients=32, leaves=0.05),
    Attack("a flood of cancels in answers", lambda _: _plain(max_tokens=500), clients=32, leaves=0.2),
    Attack("a flood of cancels of texts to embed",
           lambda f: {"input": [300 + i % 500 for i in range(f.long // 4)]}, "/embeddings", clients=32, leaves=0.05),
)  # fmt: skip


def _bias(n_vocab: int, most: int) -> dict[str, float]:
    return {str(i): 0.001 for i in range(min(n_vocab, most))}


def _ids(facts: Facts) -> list[int]:
    return [300 + 7 * i % 20_000 for i in range(facts.long)]


def engine_request(attack: Attack, facts: Facts) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The same for the engine alone: "submit" or "embed", its arguments, and those of the sampler."""
    fields = json.loads(json.dumps(attack.fields(facts)))
    if attack.path == "/embeddings":
        return "embed", {"prompt": fields["input"]}, {}
    sampler = {"temperature": 0.0}
    if "response_format" in fields:
        sampler["json_schema"] = fields["response_format"]["json_schema"]["schema"]
    if "grammar" in fields:
        sampler["grammar"] = fields["grammar"]
    if "logit_bias" in fields:
        sampler["logit_bias"] = {int(key): value for key, value in fields["logit_bias"].items()}
    arguments = {key: fields[key] for key in ("max_tokens", "logprobs", "stop") if key in fields}
    return "submit", {"prompt": fields.get("prompt", "Hello"), "n": fields.get("n", 1), **arguments}, sampler

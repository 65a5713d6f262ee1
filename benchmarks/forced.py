"""`python -m benchmarks.forced MODEL`: what it brings to compute the tokens that a constraint forces at once.

Pairs of the same requests, with and without, in turn; tells medians, and whether the texts were the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import llamacancel as lc
from llamacancel.constraint import JSON_OPTIONS, Source, checked_schema

from .stats import median, paired_ratio

__all__ = ["main", "measure"]

PROMPT = "<|im_start|>user\nWhat is the weather in Paris? Answer as JSON.<|im_end|>\n<|im_start|>assistant\n"


def _object(**properties: Any) -> dict[str, Any]:
    """A schema whose properties all have to be there."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


PERSON = _object(
    name=_text(30),
    age={"type": "integer", "minimum": 0, "maximum": 120},
    city=_text(30),
    email=_text(40),
    active={"type": "boolean"},
    score={"type": "number", "minimum": 0, "maximum": 10},
)
TOOLS = [
    ("get_weather", _object(location=_text(20), unit={"enum": ["celsius", "fahrenheit"]})),
    ("get_time", _object(zone=_text(20))),
]


def _a_call() -> Source:
    """The constraint of an answer that calls one of the tools, in the form that many families have."""
    rules = []
    for i, (name, schema) in enumerate(TOOLS):
        head = json.dumps(f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f"call{i}: {head} arguments{i} {json.dumps('}' + chr(10) + '</tool_call>')}")
        rules.append(f"arguments{i}: %json {json.dumps({**checked_schema(schema), 'x-guidance': JSON_OPTIONS})}")
    lark = "\n".join([f"start: {' | '.join(f'call{i}' for i in range(len(TOOLS)))}", *rules])
    return Source("the schema of the tools", json.dumps({"grammars": [{"lark_grammar": lark}]}))


CONSTRAINTS = {"six properties": PERSON, "a tool's call": _a_call()}


def measure(model: lc.Model, constraint: Any, slots: int, threads: int | None, pairs: int) -> dict[str, Any]:
    """Tokens a second with and without, the steps that both took, and how many texts were the same."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    texts: dict[bool, list[str]] = {True: [], False: []}
    steps = {}
    engines = {forced: lc.Engine(model, slots=slots, n_threads=threads, forced_tokens=forced) for forced in rates}
    for pair in range(-1, pairs):  # the first one is not counted
        for forced in (True, False) if pair % 2 else (False, True):
            began = time.perf_counter()
            generations = [
                engines[forced].submit(
                    PROMPT,
                    max_tokens=80,
                    sampler=lc.Sampler(json_schema=constraint, temperature=0.8, seed=pair * slots + i + slots),
                )
                for i in range(slots)
            ]
            results = [generation.result() for generation in generations]
            seconds = time.perf_counter() - began
            if pair >= 0:
                rates[forced].append(sum(result.usage.completion_tokens for result in results) / seconds)
                texts[forced] += [result.text for result in results]
    for forced, engine in engines.items():
        steps[forced] = engine.snapshot().steps
        engine.close()
    same = sum(one == other for one, other in zip(texts[True], texts[False], strict=True))
    return {"rates": rates, "steps": steps, "same": same, "texts": len(texts[True])}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forced", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args(argv)
    print("| constraint | slots | tokens/s at once | one by one | ratio (95 %) | steps | same texts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with lc.Model.load(args.model) as model:
        for name, constraint in CONSTRAINTS.items():
            for slots in (1, 4):
                told = measure(model, constraint, slots, args.threads, args.pairs)
                rates, steps = told["rates"], told["steps"]
                ratio = paired_ratio(rates[True], rates[False])
                print(
                    f"| {name} | {slots} | {median(rates[True]):.1f} | {median(rates[False]):.1f} | "
                    f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) | "
                    f"{steps[True]} to {steps[False]} | {told['same']} of {told['texts']} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

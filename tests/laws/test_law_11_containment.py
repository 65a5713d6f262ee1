"""Law 11: what a request brings, or suffers, ends at most that request, with an error that says why.

Each request here is the worst of its kind that comes to mind; `make fuzz` draws others. Beside it a neighbour writes a
text, which is the one that it writes alone, and behind it the engine answers as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.unit.engines import answer, endless, engine, greedy, idle_slots, ids, same_answer, when_pieces

REFUSED = (ValueError, TypeError, lc.LlamaCancelError)


def _generates(**brings: Any) -> Callable[[lc.Engine], lc.Generation]:
    return lambda e: e.submit(ids(5, 7), max_tokens=3, sampler=lc.Sampler(temperature=0, **brings))


def _with_token(change: Callable[[lc.CancelToken], object]) -> Callable[[lc.Engine], lc.Generation]:
    def submit(e: lc.Engine) -> lc.Generation:
        token = lc.CancelToken()
        change(token)
        return e.submit(ids(5, 7), max_tokens=3, token=token)

    return submit


ITSELF = {"$ref": "#/$defs/A"}

# What must be refused, or must fail.
ENDS: dict[str, Callable[[lc.Engine], Any]] = {
    "a schema that names itself": _generates(json_schema={"$defs": {"A": ITSELF}, "allOf": [ITSELF]}),
    "a schema of deep nesting": _generates(json_schema='{"items":' * 100_000 + "{}" + "}" * 100_000),
    "a schema with a number beyond 64 bits": _generates(json_schema={"type": "integer", "maximum": 2**64}),
    "a schema that is none": _generates(json_schema={"type": "no such type"}),
    "an expression that allows nothing": _generates(regex="^[z-a]$"),
    "an expression of repetitions of repetitions": _generates(regex="((a{1000}){1000}){1000}"),
    "a Lark grammar without a beginning": _generates(lark="a: b"),
    "a grammar that begins with itself": _generates(grammar='root ::= root "a" | "b"'),
    "a grammar of braces": _generates(grammar='root ::= "a"' + "{" * 100_000),
    "a grammar of parentheses": _generates(grammar="root ::= " + "(" * 100_000),
    "a grammar that asks for gigabytes": _generates(grammar='root ::= "' + "a" * 20_000 + '"{2000}'),
    "a grammar with a class of 30,000 ranges": _generates(grammar="root ::= [" + "a-z" * 30_000 + "]+"),
    "a grammar and a schema": _generates(grammar='root ::= "a"', json_schema={}),
    "a bias of 5,000 digits": _generates(logit_bias={5: 10**5000}),
    "a bias for a token that there is not": _generates(logit_bias={10**9: 1.0}),
    "a prompt longer than the context": lambda e: e.submit(ids(5000, 7)),
    "a prompt outside of the vocabulary": lambda e: e.submit([10**9]),
    "an empty prompt": lambda e: e.submit([]),
    "a text to embed that is too long": lambda e: e.embed(ids(5000, 7)),
    "a token that was cancelled before": _with_token(lambda token: token.cancel("long ago")),
    "a deadline that has passed": lambda e: e.submit(ids(5, 7), max_tokens=3, timeout=0),
    "a stop string that is none": lambda e: e.submit(ids(5, 7), stop=[b"x"]),  # type: ignore[list-item]
}


def _raises() -> None:
    raise OSError("somebody's callback failed")


# What is odd and has a right to an answer.
ANSWERED: dict[str, Callable[[lc.Engine], Any]] = {
    "a schema of 500 properties": _generates(
        json_schema={"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
    ),
    "a choice of 3,000 texts": _generates(json_schema={"enum": [f"text number {i}" for i in range(3000)]}),
    "a grammar with a class of 50 ranges": _generates(grammar="root ::= [" + "a-z" * 50 + "]+"),
    "10,000 biases": _generates(logit_bias=dict.fromkeys(range(300, 10_300), 0.5)),
    "a stop string of a megabyte": lambda e: e.submit(ids(5, 7), max_tokens=3, stop="x" * 2**20),
    "a text to embed": lambda e: e.embed(ids(20, 7)),
}


def _beside(e: lc.Engine, attack: Callable[[], object]) -> lc.Generation:
    """A neighbour that has written three tokens when the attack comes."""
    attacked: list[object] = []
    neighbour = e.submit(ids(60, 1), max_tokens=30, sampler=greedy(), logprobs=2)
    when_pieces(neighbour, 3, lambda: attacked.append(1))
    while not attacked:
        next(neighbour)
    attack()
    neighbour.result(60)
    return neighbour


def _goes_on(e: lc.Engine, neighbour: lc.Generation, arch: str) -> None:
    assert same_answer(arch, neighbour, answer(arch, ids(60, 1), 30))
    after = e.submit(ids(40, 2), max_tokens=4, sampler=greedy(), logprobs=2)
    after.result(60)
    assert same_answer(arch, after, answer(arch, ids(40, 2), 4))
    assert idle_slots(e) == 2


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_request_that_cannot_be_served_ends_alone_with_words(arch: str) -> None:
    with engine(arch) as e:
        for name, attack in ENDS.items():

            def attacked(name: str = name, attack: Callable[[lc.Engine], Any] = attack) -> None:
                with pytest.raises(REFUSED) as caught:
                    attack(e).result(60)
                assert str(caught.value).strip(), name

            _goes_on(e, _beside(e, attacked), arch)


def test_a_request_that_is_only_large_is_answered() -> None:
    with engine("llama") as e:
        for attack in ANSWERED.values():
            _goes_on(e, _beside(e, lambda attack=attack: attack(e).result(120)), "llama")  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_callback_or_a_listener_raises_reaches_nobody() -> None:
    with engine("llama") as e:
        listening = e.add_listener(lambda view: _raises())

        def attack() -> None:
            token = lc.CancelToken()
            token.add_callback(_raises)
            token.cancel()
            notified = e.submit(ids(5, 7), max_tokens=3, sampler=greedy())
            notified.add_notify(lambda: None if not notified.ended else _raises())
            notified.result(60)

        neighbour = _beside(e, attack)
        listening.remove()
        _goes_on(e, neighbour, "llama")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_request_that_nobody_holds_any_more_is_over() -> None:
    with engine("llama") as e:

        def attack() -> None:
            for _ in e.submit(ids(5, 7), sampler=endless()):
                break
            gc.collect()

        neighbour = _beside(e, attack)
        _goes_on(e, neighbour, "llama")


def test_no_memory_for_a_shared_step_is_nobodys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine("llama") as e:
        runner = e._thread.runner
        compute, failed = runner._compute, []

        def once(context: Any, batch: Any, tokens: dict[int, Any], **how: Any) -> Any:
            if len(tokens) == 2 and not failed:
                failed.append(1)
                raise MemoryError("decode: out of memory; the context is as before the call")
            return compute(context, batch, tokens, **how)

        with e.submit(ids(20, 3), sampler=endless()) as other:
            neighbour = _beside(e, lambda: monkeypatch.setattr(runner, "_compute", once))
            assert failed
            assert other.finish_reason is None
        _goes_on(e, neighbour, "llama")

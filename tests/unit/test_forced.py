"""Tokens that a constraint leaves no choice about: the same text in fewer steps."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.engine.scheduler import Plan
from tests.unit.engines import before_step, endless, engine, ids, model, together

LONG = "ein Wort nach dem anderen, und noch viele Worte mehr"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"enum": ["Ada", "Grace"]},
        "year_of_birth": {"type": "integer", "minimum": 1800, "maximum": 1999},
        "alive": {"type": "boolean"},
    },
    "required": ["first_name", "year_of_birth", "alive"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "a schema": {"json_schema": PERSON},
    "a constant": {"json_schema": {"const": {"text": LONG}}},
    "a choice": {"json_schema": {"enum": [LONG, LONG + "!", "süß 甲乙 😀 " + LONG]}},
    "an expression": {"regex": rf"({LONG}|[a-c]+ {LONG}){{2}}"},
    "an expression that forces all": {"regex": LONG},
    "a grammar": {"lark": f'start: "<call> " NAME " {LONG} </call>"\nNAME: /[a-z]{{1,5}}/'},
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "as by default": {},
    "with penalties": {"temperature": 0.9, "repeat_penalty": 1.3, "presence_penalty": 0.5, "dry_multiplier": 0.8},
    "mirostat": {"mirostat": 2, "temperature": 0.9},
    "mirostat 1": {"mirostat": 1, "temperature": 0.9},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.1, "dynatemp_range": 0.3, "top_n_sigma": 2.0},
}


@pytest.fixture(autouse=True)
def vocabulary() -> None:
    lc.Sampler(regex="a", model=model("llama"))


def told(generation: lc.Generation) -> tuple[Any, ...]:
    """All that a request is told, but for how long it took."""
    result = generation.result()
    usage = result.usage
    tokens = [(token.id, token.piece) for token in result.tokens]
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    assert "".join(generation) == result.text
    return result.text, tokens, result.finish_reason, result.stop_sequence, counts


def both(requests: list[dict[str, Any]], **params: Any) -> tuple[list[tuple[Any, ...]], int, int]:
    """What requests are told, which is the same with and without; and the steps that it took with, and without."""
    answers, steps = [], []
    for forced in (True, False):
        with engine(forced_tokens=forced, **params) as e:
            with together(e):
                generations = [e.submit(**request) for request in requests]
            answers.append([told(each) for each in generations])
            steps.append(e.snapshot().steps)
    assert answers[0] == answers[1]
    return answers[0], *steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_text_is_the_same_in_fewer_steps(constraint: str, sampler: str) -> None:
    options = {**CONSTRAINTS[constraint], **SAMPLERS[sampler]}
    requests = [
        {"prompt": ids(5, seed), "max_tokens": 120, "sampler": lc.Sampler(**options, seed=seed)} for seed in range(3)
    ]
    _, forced, sampled = both(requests)
    assert forced < sampled


@pytest.mark.parametrize("arch", ["swa", "mamba", "hybrid", "moe"])
def test_every_memory_takes_them(arch: str) -> None:
    requests = [
        {"prompt": ids(5, seed), "max_tokens": 120, "sampler": lc.Sampler(json_schema=PERSON, seed=seed)}
        for seed in range(3)
    ]
    _, forced, sampled = both(requests, arch=arch)
    assert forced < sampled


@pytest.mark.parametrize("most", range(1, 40))
def test_no_more_tokens_come_than_were_asked_for(most: int) -> None:
    sampler = lc.Sampler(regex=f"a{LONG}|b{LONG}", temperature=0)
    [(_, tokens, reason, _, (_, n, _))], _, _ = both([{"prompt": ids(5), "max_tokens": most, "sampler": sampler}])
    assert n <= most
    assert reason == ("length" if len(tokens) == most else "stop")


def test_a_full_context_ends_a_forced_text() -> None:
    sampler = lc.Sampler(regex=f"{LONG} {LONG} {LONG}", temperature=0)
    [(text, _, reason, _, _)], _, _ = both([{"prompt": ids(240), "sampler": sampler}], slots=1, n_ctx=256)
    assert reason == "length"
    assert f"{LONG} {LONG} {LONG}".startswith(text)


@pytest.mark.parametrize("stop", ["Wort", "dem an", "n, u", "mehr", "e", "nowhere"])
def test_a_stop_within_a_forced_text_ends_it_there(stop: str) -> None:
    sampler = lc.Sampler(regex=f"[ab]{LONG}", temperature=0)
    [(text, _, reason, found, _)], _, _ = both([{"prompt": ids(5), "stop": stop, "sampler": sampler}])
    assert reason == "stop"
    assert text[1:] == LONG.partition(stop)[0]
    assert found == (stop if stop in LONG else None)


def test_a_stop_token_within_a_forced_text_ends_it_there() -> None:
    [token] = (int(each) for each in model("llama").tokenize(" Wort", add_special=False)[:1])
    sampler = lc.Sampler(regex=f"[ab]{LONG}", temperature=0)
    both([{"prompt": ids(5), "stop_tokens": [token], "sampler": sampler}])


def test_who_asks_for_probabilities_has_each_token_sampled() -> None:
    with engine() as e:
        generation = e.submit(ids(5), sampler=lc.Sampler(json_schema=PERSON, temperature=0), logprobs=1)
        json.loads(generation.result().text)
        assert all(token.logprob is not None and len(token.top) == 1 for token in generation.tokens)


def test_a_bias_that_leaves_nothing_is_told_as_ever() -> None:
    ends = {token: -float("inf") for token in range(model("llama").n_vocab) if model("llama").is_eog(token)}
    with engine() as e, pytest.raises(ValueError, match="no token of the vocabulary is left"):
        e.submit(ids(5), sampler=lc.Sampler(regex="a", logit_bias=ends)).result()


def test_forced_rows_are_computed_beside_those_of_others() -> None:
    """A step that has them is none with a prompt, and each slot has its rows in every step."""
    plans: list[Plan] = []
    with engine(slots=2) as e:
        neighbour = e.submit(ids(5), sampler=endless(), max_tokens=60)
        before_step(e, lambda _, plan: plans.append(plan))
        e.submit(ids(5, 1), sampler=lc.Sampler(regex=f"[ab]{LONG[:20]}[ab]{LONG[:20]}", temperature=0)).result()
        neighbour.result()
    many = [plan for plan in plans if any(rows.count > 1 and rows.start >= rows.request.n_prompt for rows in plan.rows)]
    assert many
    assert not any(plan.n_prompt_rows for plan in many)
    assert all(len(plan.rows) == 2 for plan in many)


def test_a_cancel_in_forced_rows_leaves_a_prefix_that_others_take_over() -> None:
    with engine(slots=1, stream_interval=0) as e:
        long = lc.Sampler(regex=f"[ab]({LONG} ){{9}}[ab]", temperature=0)
        with together(e):
            cancelled = e.submit(ids(5), sampler=long)
            before_step(e, lambda number, _: cancelled.cancel() if number == 1 else None)
        with pytest.raises(lc.DecodeCancelled):
            cancelled.result()
        again = told(e.submit(ids(5), sampler=long, max_tokens=60))
    with engine(slots=1, forced_tokens=False) as e:
        assert told(e.submit(ids(5), sampler=long, max_tokens=60))[:4] == again[:4]


def test_an_answer_with_forced_tokens_is_a_prefix_of_the_next_turn() -> None:
    with engine(slots=1) as e:
        generation = e.submit(ids(5), sampler=lc.Sampler(json_schema=PERSON, temperature=0))
        generation.result()
        said = [token.id for token in generation.tokens]
        turn = ids(5) + said + ids(5, 1)
        second = told(e.submit(turn, sampler=endless(), max_tokens=10))
    with engine(slots=1) as e:
        fresh = told(e.submit(turn, sampler=endless(), max_tokens=10))
    assert second[:4] == fresh[:4]
    assert second[4][2] >= len(said)


def test_a_text_that_is_over_needs_no_step_for_its_end() -> None:
    with engine(slots=1) as e:
        result = e.submit(ids(5), sampler=lc.Sampler(regex=LONG, temperature=0)).result()
        assert (result.text, result.finish_reason) == (LONG, "stop")
        assert e.snapshot().steps == 1

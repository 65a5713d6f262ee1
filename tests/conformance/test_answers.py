"""Answers are compared to the letter, or by length, and the difference is named."""

from __future__ import annotations

from typing import Any

import pytest

from llamacancel.conformance.answers import Answer, flaw, shortfall
from llamacancel.conformance.prompts import asking_for_much, of_words

REFERENCE = Answer("one two three four", 4, True, 4, "length", 1.0, 0.1)


class Seen:
    """A call as far as a comparison looks at it."""

    def __init__(self, **changes: Any) -> None:
        self.name = "survivor"
        self.ended: float | None = 1.0
        self.answered = True
        self.error: str | None = None
        self.text = "one two three four"
        self.pieces = [0.1, 0.2, 0.3, 0.4]
        self.n_tokens = 4
        self.counts_tokens = True
        self.finish_reason: str | None = "length"
        self.request = type("Request", (), {"stream": True})
        self.__dict__.update(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ended": None}, "was not answered"),
        ({"answered": False, "error": "cut"}, "no whole answer: cut"),
        ({"n_tokens": 3}, "cut short: 3 of 4"),
        ({"n_tokens": 0, "text": "", "finish_reason": "stop"}, "cut short: 0 of 4"),
        ({"counts_tokens": False, "n_tokens": 2}, "cut short"),
    ],
)
def test_an_answer_that_is_not_whole_falls_short(changes: dict[str, Any], said: str) -> None:
    assert said in (shortfall(Seen(**changes), REFERENCE) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": "other words altogether"},
        {"counts_tokens": False, "n_tokens": 3},
        {"counts_tokens": False, "n_tokens": 1, "request": type("Request", (), {"stream": False})},
    ],
)
def test_a_whole_answer_does_not(changes: dict[str, Any]) -> None:
    assert shortfall(Seen(**changes), REFERENCE) is None  # type: ignore[arg-type]


def test_an_answer_that_ended_by_itself_may_be_shorter_if_the_reference_did_so_too() -> None:
    natural = Answer("one two", 9, True, 2, "stop", 1.0, 0.1)
    assert shortfall(Seen(finish_reason="stop"), natural) is None  # type: ignore[arg-type]
    assert shortfall(Seen(finish_reason="cancelled"), natural) is not None  # type: ignore[arg-type]
    assert shortfall(Seen(finish_reason="stop", text="", n_tokens=0), natural) is not None  # type: ignore[arg-type]


def test_the_first_character_that_differs_is_named() -> None:
    said = flaw(Seen(text="one two four"), REFERENCE)  # type: ignore[arg-type]
    assert said is not None
    assert "from character 8 on: 'four' instead of 'three four'" in said


def test_an_answer_that_only_ends_otherwise_differs_too() -> None:
    assert "'stop' instead of 'length'" in (flaw(Seen(finish_reason="stop"), REFERENCE) or "")  # type: ignore[arg-type]
    assert flaw(Seen(), REFERENCE) is None  # type: ignore[arg-type]


def test_prompts_have_the_length_that_is_asked_for_and_share_no_beginning() -> None:
    assert len(of_words(300, 1).split()) == 300
    assert of_words(50, "a") == of_words(50, "a")
    beginnings = {asking_for_much(24, f"seed {i}").split()[0] for i in range(200)}
    assert len(beginnings) > 195

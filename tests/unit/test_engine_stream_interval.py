"""When those who wait for text are told of it: at first at once, then once in an interval, and never too late."""

from __future__ import annotations

import threading

import pytest

import llamacancel as lc
from tests.unit.engines import Gate, before_step, endless, engine, ids

FOR_EVER = 1000.0


def tellings(generation: lc.Generation) -> list[int]:
    """How many tokens there are each time that its reader is told; the list grows. Begin before the first step."""
    told: list[int] = []
    generation.add_notify(lambda: told.append(generation.usage.completion_tokens))
    return told


def test_the_first_text_and_the_end_are_told_at_once_and_what_is_between_together() -> None:
    with engine(stream_interval=FOR_EVER) as e:
        with Gate(e):
            generation = e.submit(ids(5), sampler=endless(), max_tokens=40)
            told = tellings(generation)
        generation.wait()
    assert told == [1, 40]


@pytest.mark.parametrize("interval", [0, 1e-6])
def test_without_an_interval_or_with_longer_steps_every_token_is_told(interval: float) -> None:
    with engine(stream_interval=interval) as e:
        with Gate(e):
            generation = e.submit(ids(5), sampler=endless(), max_tokens=40)
            told = tellings(generation)
        generation.wait()
    assert told == list(range(1, 41))


def test_text_is_told_before_a_step_that_computes_a_prompt_too() -> None:
    held: list[object] = []
    with engine(stream_interval=FOR_EVER) as e:

        def submit(number: int, _: object) -> None:
            if number == 10:
                held.append(e.submit(ids(60, 1), sampler=endless(), max_tokens=1))

        before_step(e, submit)
        with Gate(e):
            generation = e.submit(ids(5), sampler=endless(), max_tokens=40)
            told = tellings(generation)
        generation.wait()
    assert told == [1, 11, 40]


def test_another_request_s_first_text_is_no_later_for_those_who_wait() -> None:
    with engine(stream_interval=FOR_EVER) as e:
        others: list[lc.Generation] = []

        def submit(number: int, _: object) -> None:
            if number == 10:
                others.append(e.submit(ids(60, 1), sampler=endless(), max_tokens=20))
                others_told.append(tellings(others[0]))

        others_told: list[list[int]] = []
        before_step(e, submit)
        with Gate(e):
            generation = e.submit(ids(5), sampler=endless(), max_tokens=60)
            told = tellings(generation)
        generation.wait()
    assert others_told == [[1, 20]]
    assert told == [1, 11, 12, 60], "with the prompt's step, and with the other's first text"


def test_a_thread_that_reads_has_the_first_piece_while_the_rest_is_computed() -> None:
    with engine(stream_interval=FOR_EVER) as e, Gate(e, at=20) as gate:
        generation = e.submit(ids(5), sampler=endless(), max_tokens=40)
        pieces = [next(generation)]
        gate.wait()
        more = generation.poll()
        assert more is not None, "who asks is told what there is"
        pieces.append(more)
        read = threading.Thread(target=lambda: pieces.extend(generation))
        read.start()
        gate.open()
        read.join(60)
        assert "".join(pieces) == generation.text
        assert sum(len(piece.tokens) for piece in pieces) == 40


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "soon"])
def test_a_wrong_interval_is_refused_by_name(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match="stream_interval"):
        engine(stream_interval=wrong)

"""An id belongs to one request at a time, from any number of threads and without a lock."""

from __future__ import annotations

import threading

import llamacancel as lc
from llamacancel.engine.names import Names
from llamacancel.engine.scheduler import Request
from llamacancel.engine.work import Work


def work(name: str = "it") -> Work:
    return Work(Request(name, [1]), lc.CancelToken())


def ended(each: Work) -> Work:
    each.finish("stop", 0.0)
    return each


def test_an_id_is_given_once_and_again_when_it_was_given_back() -> None:
    names, first = Names(), work()
    assert names.find("it") is None
    assert names.claim(first)
    assert not names.claim(work())
    assert names.claim(work("other"))
    assert names.find("it") is first
    names.give_back(ended(first))
    assert names.find("it") is None
    assert names.claim(work())


def test_who_comes_after_one_that_was_cancelled_follows_on_it() -> None:
    names, first, second, third = Names(), work(), work(), work()
    assert names.claim(first)
    first.token.cancel()
    assert names.claim(second)
    assert not names.claim(third), "only one follows"
    assert names.find("it") is second
    names.give_back(ended(first))
    assert names.find("it") is second
    assert not names.claim(third)
    second.token.cancel()
    assert names.claim(third)
    names.give_back(ended(second))
    names.give_back(ended(third))
    assert names._first == {}


def test_who_follows_may_end_first() -> None:
    names, first, second = Names(), work(), work()
    assert names.claim(first)
    first.token.cancel()
    assert names.claim(second)
    names.give_back(ended(second))
    names.give_back(ended(first))
    assert names._first == {}


def test_of_many_threads_that_claim_an_id_one_gets_it() -> None:
    names = Names()
    last: Work | None = None
    for turn in range(300):
        claims = [work() for _ in range(4)]
        got: list[Work] = []
        together = threading.Barrier(5 if last is not None else 4)

        def claim(each: Work, together: threading.Barrier = together, got: list[Work] = got) -> None:
            together.wait(30)
            if names.claim(each):
                got.append(each)

        def give_back(each: Work, together: threading.Barrier = together) -> None:
            together.wait(30)
            names.give_back(ended(each))

        threads = [threading.Thread(target=claim, args=(each,)) for each in claims]
        if last is not None:
            last.token.cancel()
            threads.append(threading.Thread(target=give_back, args=(last,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(got) == 1, f"turn {turn}"
        assert names.find("it") is got[0]
        last = got[0]

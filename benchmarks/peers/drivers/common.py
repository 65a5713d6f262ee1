"""What every driver does with its peer. Standard library only: it runs in the peer's own environment.

A driver is started with a job as JSON on stdin, and writes lines of JSON to stdout, one for each thing that it found.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
import traceback
from typing import ClassVar

# What a peer or llama.cpp prints must not get between our lines.
_LINES = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

SETTINGS = ("n_threads", "n_threads_batch", "n_ctx", "n_batch", "n_ubatch")


class Session:
    """One object of a peer, with one way to stop it.

    `answer` continues a text by so many tokens, always the likeliest, and returns what the peer returned as text.
    `stop` asks for a stop, from another thread.

    Attributes:
        ended: How the peer says that the latest answer ended ("stop", "length"); None if it says nothing.
    """

    ended = None

    def settings(self):
        """What it computes with, read back from the peer: `SETTINGS` by name."""
        raise NotImplementedError

    def answer(self, prompt, tokens):
        raise NotImplementedError

    def stop(self):
        raise NotImplementedError

    def before(self):
        """Called before each answer that may be stopped."""

    def close(self):
        """Called at the end."""


class Driver:
    """A peer.

    Attributes:
        name: Its name.
        ways: Ways to stop it, by name: a sentence about each.
    """

    name = ""
    ways: ClassVar[dict] = {}

    def versions(self):
        """What it is: versions, how it was built."""
        raise NotImplementedError

    def open(self, job, way):
        """A `Session` with a way to stop it; None for one that cannot be stopped, or as little as the peer allows."""
        raise NotImplementedError


def emit(**found):
    """Write a line."""
    _LINES.write(json.dumps(found) + "\n")
    _LINES.flush()


def main(driver):
    """Do the job."""
    job = json.load(sys.stdin)
    if not job["ways"]:
        emit(event="versions", versions=driver.versions(), ways=driver.ways)
    for way in job["ways"]:
        for part, measure in (("stop", _stops), ("cost", _costs)):
            if part not in job["parts"]:
                continue
            emit(event="begin", part=part, way=way)
            try:
                emit(event=part, way=way, **measure(driver, job, way))
            except Exception as error:
                traceback.print_exc()
                emit(event="failed", part=part, way=way, message=_words(error))


# -- stopping


class _Run:
    """An answer that another thread waits for."""

    def __init__(self, session, prompt, tokens):
        self.text = self.error = None
        self.began = time.monotonic()
        self.ended = None
        self._session, self._prompt, self._tokens = session, prompt, tokens
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self):
        try:
            self.text = self._session.answer(self._prompt, self._tokens)
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()

    def join(self):
        self._thread.join()


def _stops(driver, job, way):
    """Stops in the middle of prefills, and what the next calls give.

    The same calls in the same order, without the stop, on another object of the same peer, tell what is right.
    """
    session = driver.open(job, way)
    emit(event="settings", way=way, found=session.settings())
    right = [_undisturbed(session, job, number) for number in range(job["trials"])]
    prefill = statistics.median(_prefills(session, job))
    session.close()
    session = driver.open(job, way)
    rng = random.Random(f"stops {job['seed']}")
    samples, too_late = [], 0
    for number in range(job["trials"]):
        for _ in range(3):
            sample = _trial(session, job, number, prefill, rng.uniform(0.1, 0.85), right[number])
            if sample is not None:
                break
            too_late += 1
            session.close()
            session = driver.open(job, way)
        else:
            continue
        samples.append(sample)
        emit(event="sample", way=way, sample=sample)
        if {sample["next"], sample["again"]} != {"right"}:
            session.close()
            session = driver.open(job, way)
    early = _early(session, job["short_prompts"][0], job["answer_tokens"], right[0]["next"])
    session.close()
    return {
        "prefill": prefill,
        "repeats": _repeats(driver, job, way, right),
        "samples": samples,
        "too_late": too_late,
        "early": early,
    }


def _calls(job, number):
    """The calls of a trial, in their order: every second one is a turn of a conversation that has begun."""
    long, short, history = job["long_prompts"][number], job["short_prompts"][number], job["history"]
    if number % 2:
        return {"history": history, "stopped": f"{history} {long}", "next": f"{history} {short}"}
    return {"stopped": long, "next": short}


def _undisturbed(session, job, number):
    """What the calls of a trial give when nobody stops them."""
    texts = {}
    for name, prompt in _calls(job, number).items():
        session.before()
        texts[name] = session.answer(prompt, job["answer_tokens"])
        emit(event="alive")
    return texts


def _repeats(driver, job, way, right):
    """Whether another object gives the same undisturbed. If not, a differing text is not the stop's fault."""
    session = driver.open(job, way)
    same = all(_undisturbed(session, job, number) == right[number] for number in range(min(3, job["trials"])))
    session.close()
    return same


def _prefills(session, job):
    """Seconds of prefills that nobody stops."""
    for prompt in job["long_prompts"][job["trials"] : job["trials"] + 3]:
        session.before()
        began = time.monotonic()
        session.answer(prompt, 1)
        yield time.monotonic() - began


def _trial(session, job, number, prefill, share, right):
    """A stop when this share of the time of a prefill is over, and the calls after it.

    None if the call had ended before the stop was asked for, which happens when the machine was slower before.
    """
    tokens, calls = job["answer_tokens"], _calls(job, number)
    session.before()
    if "history" in calls:
        session.answer(calls["history"], tokens)
    session.ended = None
    run = _Run(session, calls["stopped"], tokens)
    asked = run.began + share * prefill
    time.sleep(max(asked - time.monotonic(), 0))
    woke = time.monotonic()
    session.stop()
    run.join()
    if run.ended <= woke:
        return None
    sample = {
        "share": share,
        "latency": run.ended - asked,
        "late": woke - asked,
        "rest": max(run.began + prefill - asked, 0.0),
        "said": _said(run, right["stopped"], session.ended),
        "history": "history" in calls,
    }
    for name, prompt, text in (("next", calls["next"], right["next"]), ("again", calls["stopped"], right["stopped"])):
        session.before()
        sample[name] = _judged(session, prompt, tokens, text)
    return sample


def _said(run, right, ended):
    """What a call that was to be stopped gave."""
    if run.error is not None:
        return f"raises {type(run.error).__name__}"
    how = f', finish reason "{ended}"' if ended else ""
    if run.text == right:
        return "returns the whole answer"
    return f"returns {'a part of the answer' if run.text else 'an empty text'}{how}"


def _judged(session, prompt, tokens, right):
    try:
        text = session.answer(prompt, tokens)
    except Exception as error:
        return _words(error)
    return "right" if text == right else "wrong: nothing came" if not text else "wrong: another text"


def _early(session, prompt, tokens, right):
    """What a stop does that is asked for just before the call."""
    session.before()
    session.stop()
    try:
        text = session.answer(prompt, tokens)
    except Exception as error:
        return f"raises {type(error).__name__}"
    if text == right:
        return "lost: the call runs to its end"
    return "returns a part of the answer" if text else "returns an empty text"


# -- cost


def _costs(driver, job, way):
    """Prefills that can be stopped against prefills that cannot, alone and beside a thread that computes in Python."""
    sessions = {"plain": driver.open(job, None), "cancellable": driver.open(job, way)}
    seconds = {(name, beside): [] for name in sessions for beside in ("alone", "busy")}
    rng = random.Random(f"costs {job['seed']}")
    prompts = itertools.cycle(job["long_prompts"])
    for round_ in range(job["rounds"] + 1):
        for beside in ("alone", "busy"):
            names, prompt = list(sessions), next(prompts)
            rng.shuffle(names)
            for name in names:
                with _Busy(beside == "busy"):
                    sessions[name].before()
                    began = time.monotonic()
                    sessions[name].answer(prompt, 1)
                    if round_:
                        seconds[name, beside].append(time.monotonic() - began)
                emit(event="alive")
    for session in sessions.values():
        session.close()
    return {"seconds": {f"{name}, {beside}": values for (name, beside), values in seconds.items()}}


class _Busy:
    """A thread that computes in Python meanwhile."""

    def __init__(self, wanted):
        self._wanted, self._go_on = wanted, True
        self._thread = threading.Thread(target=self._main, daemon=True)

    def _main(self):
        count = 0
        while self._go_on:
            count += 1

    def __enter__(self):
        if self._wanted:
            self._thread.start()

    def __exit__(self, *exc):
        self._go_on = False
        if self._wanted:
            self._thread.join()


def _words(error):
    return f"{type(error).__name__}: {str(error)[:200]}"

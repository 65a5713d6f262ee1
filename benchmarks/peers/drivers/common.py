"""What every driver does with its peer. Standard library only: it runs in the peer's own environment.

A driver is started with a job as JSON on stdin, and writes lines of JSON to stdout, one for each thing that it found.
"""

from __future__ import annotations

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


class Session:
    """One object of a peer, with one way to stop it.

    `answer` continues a text by so many tokens, always the likeliest, and returns what the peer returned as text.
    `stop` asks for a stop, from another thread.
    """

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
    try:
        emit(event="versions", versions=driver.versions(), ways=driver.ways)
    except Exception as error:
        emit(event="failed", part="versions", message=_words(error))
        return
    for way in driver.ways:
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
    """Stops in the middle of prefills, and what the next calls give."""
    tokens, trials, history = job["answer_tokens"], job["trials"], job["history"]
    longs, shorts = job["long_prompts"], job["short_prompts"]
    session = driver.open(job, way)
    session.before()
    references, seconds = {}, []
    for i in range(trials):
        for prompt in _prompts(history, longs[i], shorts[i], i):
            references[prompt] = session.answer(prompt, tokens)
    for prompt in longs[trials : trials + 3]:
        began = time.monotonic()
        session.answer(prompt, 1)
        seconds.append(time.monotonic() - began)
    session.close()
    prefill = statistics.median(seconds)
    session = driver.open(job, way)
    session.before()
    repeats = all(session.answer(prompt, tokens) == references[prompt] for prompt in list(references)[:3])
    rng = random.Random(f"stops {job['seed']}")
    samples = []
    for i in range(trials):
        first, *stopped_and_next = _prompts(history, longs[i], shorts[i], i)
        session.before()
        if first == history:
            session.answer(first, tokens)
        stopped, following = stopped_and_next if first == history else (first, shorts[i])
        sample = _stop_once(session, stopped, tokens, prefill, rng.uniform(0.1, 0.85), references[stopped])
        sample["history"] = first == history
        for name, prompt in (("next", following), ("again", stopped)):
            session.before()
            sample[name] = _judged(session, prompt, tokens, references[prompt])
        samples.append(sample)
        emit(event="sample", way=way, sample=sample)
        if {sample["next"], sample["again"]} != {"right"}:
            session.close()
            session = driver.open(job, way)
    session.before()
    early = _early(session, shorts[0], tokens, references[shorts[0]])
    session.close()
    return {"prefill": prefill, "repeats": repeats, "samples": samples, "early": early}


def _prompts(history, long, short, number):
    """The prompts of a trial, in their order: every second one is a turn of a conversation that has begun."""
    return [history, f"{history} {long}", f"{history} {short}"] if number % 2 else [long, short]


def _stop_once(session, prompt, tokens, prefill, share, reference):
    """Ask for a stop when this share of the time of a prefill is over."""
    run = _Run(session, prompt, tokens)
    asked = run.began + share * prefill
    time.sleep(max(asked - time.monotonic(), 0))
    woke = time.monotonic()
    session.stop()
    run.join()
    return {
        "share": share,
        "latency": run.ended - asked,
        "late": woke - asked,
        "rest": max(run.began + prefill - asked, 0.0),
        "said": _said(run, reference),
    }


def _said(run, reference):
    """What a call that was to be stopped gave."""
    if run.error is not None:
        return f"raises {type(run.error).__name__}"
    if run.text == reference:
        return "returns the whole answer"
    return f"returns {run.text[:20]!r}" if not run.text else "returns a part of the answer"


def _judged(session, prompt, tokens, reference):
    try:
        text = session.answer(prompt, tokens)
    except Exception as error:
        return _words(error)
    return "right" if text == reference else "wrong: nothing came" if not text else "wrong: another text"


def _early(session, prompt, tokens, reference):
    """What a stop does that is asked for just before the call."""
    session.stop()
    try:
        text = session.answer(prompt, tokens)
    except Exception as error:
        return f"raises {type(error).__name__}"
    return "lost: the call runs to its end" if text == reference else f"returns {text[:20]!r}"


# -- cost


def _costs(driver, job, way):
    """Prefills that can be stopped against prefills that cannot, alone and beside a thread that computes in Python."""
    sessions = {"plain": driver.open(job, None), "cancellable": driver.open(job, way)}
    prompts = iter(job["long_prompts"] * 4)
    seconds = {(name, beside): [] for name in sessions for beside in ("alone", "busy")}
    rng = random.Random(f"costs {job['seed']}")
    for round_ in range(job["rounds"] + 1):
        for beside in ("alone", "busy"):
            names = list(sessions)
            rng.shuffle(names)
            for name in names:
                prompt = next(prompts)
                with _Busy(beside == "busy"):
                    sessions[name].before()
                    began = time.monotonic()
                    sessions[name].answer(prompt, 1)
                    if round_:
                        seconds[name, beside].append(time.monotonic() - began)
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

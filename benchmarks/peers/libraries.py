"""The peers as libraries: stopped in a prefill, what the next call gives, and what it costs to be stoppable."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import llamacancel as lc
from llamacancel.conformance.prompts import of_words

from ..stats import distribution, median, paired_ratio
from .venvs import run_peer_python

__all__ = ["Job", "job_of", "run_driver"]


@dataclass(frozen=True)
class Job:
    """The same work for each peer.

    Attributes:
        model: GGUF file.
        threads, n_ctx, n_batch, n_ubatch: Of the context.
        long_prompts: To stop in; no two begin alike.
        short_prompts: For the calls that come next.
        history: How a conversation begins, of which every second stop is a turn.
        answer_tokens: Tokens that each call goes on for.
        trials: Stops.
        rounds: Pairs of prefills with and without a way to stop.
        parts: "stop", "cost".
        seed: Of the moments.
        ways: Ways to stop that are to be measured; empty: the driver only tells what it is.
    """

    model: str
    threads: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    long_prompts: list[str]
    short_prompts: list[str]
    history: str
    answer_tokens: int
    trials: int
    rounds: int
    parts: list[str]
    seed: int
    ways: Sequence[str] = ()


def job_of(model: Path, threads: int, seed: int, *, quick: bool, parts: list[str]) -> Job:
    """The job, with prompts of about 1,024 tokens to stop in (256 if quick)."""
    with lc.Model.load(model) as loaded:
        per_word = len(loaded.tokenize(of_words(500, seed))) / 500
    words, trials, rounds = (int(256 / per_word), 2, 1) if quick else (int(1024 / per_word), 8, 5)
    longs = [of_words(words, f"{seed} long {i}") for i in range(max(trials + 3, 2 * (rounds + 1)))]
    shorts = [of_words(40, f"{seed} short {i}") for i in range(trials)]
    history = of_words(words // 4, f"{seed} history")
    return Job(str(model), threads, 2048, 2048, 512, longs, shorts, history, 8, trials, rounds, parts, seed)


def run_driver(name: str, python: Path, script: str, job: Job, patience: float) -> dict[str, Any]:
    """Run a peer's driver: for each way in a process of its own, which may die or hang without harm to the others.

    Args:
        name: The peer's.
        python: Of its environment.
        script: The driver.
        job: The work.
        patience: Seconds without a line after which it counts as hanging.

    Returns:
        `versions`, `ways` (sentences about the ways to stop it), `settings` that it said it computes with, `stop` and
        `cost` by way, and `failures`.
    """
    found: dict[str, Any] = {"peer": name, "failures": []}
    found |= {part: {} for part in ("versions", "ways", "settings", "stop", "cost")}
    _drive(found, python, script, job, patience)
    for way in found["ways"]:
        _drive(found, python, script, replace(job, ways=[way]), patience)
    for way, settings in found["settings"].items():
        for key, value in settings.items():
            wanted = job.threads if key.startswith("n_threads") else getattr(job, key)
            if value != wanted:
                found["failures"].append(f"{way}: it computes with {key}={value} instead of {wanted}")
    for way, of in found["stop"].items():
        if of["too_late"] and not of["samples"]:
            found["failures"].append(f"{way}, stop: its calls had always ended before the stop was asked for")
        of["latency"] = distribution([sample["latency"] for sample in of["samples"]])
        of["rest"] = distribution([sample["rest"] for sample in of["samples"]])
        print(f"{name}, {way}: stopped in {_shown(of['latency'])} s at the median", file=sys.stderr, flush=True)
    for of in found["cost"].values():
        of["medians"] = {key: median(values) for key, values in of["seconds"].items()}
        of["ratios"] = {
            beside: paired_ratio(of["seconds"][f"cancellable, {beside}"], of["seconds"][f"plain, {beside}"])
            for beside in ("alone", "busy")
        }
    return found


def _drive(found: dict[str, Any], python: Path, script: str, job: Job, patience: float) -> None:
    """One process; what it tells is taken into `found`."""
    process = run_peer_python(python, script, json.dumps(asdict(job)))
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: errors.append(line or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    doing, ended = "its start", ""
    samples: dict[str, list[Any]] = {}
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            process.kill()
            ended = f"nothing came for {patience:.0f} s: it hangs"
            break
        if line is None:
            break
        doing = _take(found, samples, json.loads(line), doing)
    status = process.wait()
    for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
        reader.join(5)
        stream.close()
    if status and not ended:
        ended = " / ".join([f"its process ended with status {status}", *"".join(errors).strip().splitlines()[-3:]])
    if ended:
        found["failures"].append(f"{doing}: {ended}")
    for way in job.ways:  # what came of a way that did not come to its end
        if "stop" in job.parts and way not in found["stop"]:
            of = {"prefill": None, "repeats": None, "samples": samples.get(way, []), "too_late": 0, "early": None}
            found["stop"][way] = {**of, "broken": True}


def _take(found: dict[str, Any], samples: dict[str, list[Any]], event: dict[str, Any], doing: str) -> str:
    """Take a driver's line; returns what it is doing."""
    kind = event.pop("event")
    if kind == "versions":
        found["versions"], found["ways"] = event["versions"], event["ways"]
    elif kind == "begin":
        return f"{event['way']}, {event['part']}"
    elif kind == "alive":
        pass
    elif kind == "settings":
        found["settings"][event["way"]] = event["found"]
    elif kind == "sample":
        samples.setdefault(event["way"], []).append(event["sample"])
    elif kind == "failed":
        where = ", ".join(event[name] for name in ("way", "part") if name in event)
        found["failures"].append(f"{where}: {event['message']}")
    else:
        found[kind][event.pop("way")] = event
    return doing


def _read(stream: Any, take: Any) -> None:
    for line in stream:
        take(line)
    take(None)


def _shown(spread: Any) -> str:
    return f"{spread['median']:.4f}" if spread else "?"

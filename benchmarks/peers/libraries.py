"""The peers as libraries: stopped in a prefill, what the next call gives, and what it costs to be stoppable."""

from __future__ import annotations

import json
import queue
import sys
import threading
from dataclasses import asdict, dataclass
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


def job_of(model: Path, threads: int, seed: int, *, quick: bool, parts: list[str]) -> Job:
    """The job, with prompts of about 1,024 tokens to stop in (128 if quick)."""
    with lc.Model.load(model) as loaded:
        per_word = len(loaded.tokenize(of_words(500, seed))) / 500
    words, trials, rounds = (int(128 / per_word), 2, 1) if quick else (int(1024 / per_word), 10, 7)
    longs = [of_words(words, f"{seed} long {i}") for i in range(max(trials + 3, rounds + 1))]
    shorts = [of_words(40, f"{seed} short {i}") for i in range(trials)]
    history = of_words(words // 4, f"{seed} history")
    return Job(str(model), threads, 2048, 2048, 512, longs, shorts, history, 8, trials, rounds, parts, seed)


def run_driver(name: str, python: Path, script: str, job: Job, patience: float) -> dict[str, Any]:
    """Run a peer's driver.

    Args:
        name: The peer's.
        python: Of its environment.
        script: The driver.
        job: The work.
        patience: Seconds without a line after which it counts as hanging.

    Returns:
        `versions`, `ways` (sentences about the ways to stop it), `stop` and `cost` by way, and `failures`.
    """
    found: dict[str, Any] = {"peer": name, "versions": {}, "ways": {}, "stop": {}, "cost": {}, "failures": []}
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
    doing = "its start"
    samples: dict[str, list[Any]] = {}
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            process.kill()
            found["failures"].append(f"{doing}: nothing came for {patience:.0f} s: it hangs")
            break
        if line is None:
            break
        doing = _take(found, samples, json.loads(line), doing)
    status = process.wait()
    for reader in readers:
        reader.join(5)
    if status and not found["failures"]:
        tail = " / ".join("".join(errors).strip().splitlines()[-4:])
        found["failures"].append(f"{doing}: its process ended with status {status}: {tail}")
    for way, taken in samples.items():  # of a way that did not come to its end
        found["stop"].setdefault(way, {"prefill": None, "repeats": None, "samples": taken, "early": None})
    for way, of in found["stop"].items():
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


def _take(found: dict[str, Any], samples: dict[str, list[Any]], event: dict[str, Any], doing: str) -> str:
    """Take a driver's line; returns what it is doing."""
    kind = event.pop("event")
    if kind == "versions":
        found["versions"], found["ways"] = event["versions"], event["ways"]
    elif kind == "begin":
        return f"{event['way']}, {event['part']}"
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

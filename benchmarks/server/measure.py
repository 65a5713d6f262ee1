"""The measurements: loads on each server in turn, hang-ups in each phase, and the cost of a step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import llamacancel as lc
from llamacancel.conformance.prompts import of_words

from ..stats import distribution, median, paired_ratio
from .engine import EngineJob
from .freed import PHASES, FreedJob
from .launch import Kind, Server, ServerFailed, Shape
from .load import LoadJob
from .worker import WorkerFailed, do

__all__ = ["Settings", "Sizes", "engine_steps", "freed", "loads"]

N_CTX_FREED = 4096


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `quick()` shows that everything runs, and measures nothing.

    Attributes:
        rounds: Rounds of each load; the servers take turns within one.
        requests: Requests of a round, by the number of clients.
        slots: Slots, by the number of clients.
        prompt_tokens, answer_tokens: Of a request.
        trials: Hang-ups in each phase.
        victim_tokens: Prompt of the client that hangs up there.
        engine_rounds: Requests for each slot in the measurement of the engine alone.
    """

    rounds: int = 5
    requests: dict[int, int] = field(default_factory=lambda: {1: 4, 4: 16, 16: 32})
    slots: dict[int, int] = field(default_factory=lambda: {1: 4, 4: 4, 16: 16})
    prompt_tokens: int = 512
    answer_tokens: int = 64
    trials: int = 40
    victim_tokens: int = 1536
    engine_rounds: int = 4

    @classmethod
    def quick(cls) -> Sizes:
        """A few requests of each kind."""
        return cls(1, {1: 1, 4: 6, 16: 16}, {1: 4, 4: 4, 16: 16}, 24, 8, 1, 128, 1)


@dataclass(frozen=True)
class Settings:
    """What the command line asked for.

    Attributes:
        model: GGUF file.
        threads: Threads of every server.
        seed: Seed of prompts, orders and moments.
        sizes: How much.
        vocabulary: Range of token ids that prompts are made of.
        end_tokens: Tokens that end an answer.
        words: Words that make a prompt of about that many tokens; None to send tokens.
    """

    model: Path
    threads: int
    seed: int
    sizes: Sizes
    vocabulary: tuple[int, int]
    end_tokens: tuple[int, ...]
    words: int | None = None

    @classmethod
    def of(cls, path: Path, threads: int, seed: int, sizes: Sizes, *, text: bool = False) -> Settings:
        """Look into the model for its vocabulary. `text`: prompts are sent as text."""
        with lc.Model.load(path) as model:
            ends = tuple(token for token in range(model.n_vocab) if model.is_eog(token))
            per_word = len(model.tokenize(of_words(500, seed))) / 500
            words = int(sizes.prompt_tokens / per_word) if text else None
            return cls(path, threads, seed, sizes, (3, model.n_vocab), ends, words)


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def running(kinds: Sequence[Kind], shape: Shape, failures: list[str]) -> Any:
    """Servers of these kinds, by name; one that does not start is a failure and is left out."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for kind in kinds:
            try:
                servers[kind.name] = stack.enter_context(Server(kind, shape))
            except (ServerFailed, OSError) as error:
                failures.append(f"{kind.name}: {error}")
                say(f"{kind.name}: {error}")
        yield servers


def loads(settings: Settings, kinds: Sequence[Kind], failures: list[str]) -> list[dict[str, Any]]:
    """Every load, without hang-ups and with a third of the clients hanging up."""
    sizes, found = settings.sizes, []
    for slots in sorted(set(sizes.slots.values())):
        shape = Shape(settings.model, slots, sizes.prompt_tokens + sizes.answer_tokens + 64, settings.threads)
        with running(kinds, shape, failures) as servers:
            for server in servers.values():
                _warm_up(settings, server, failures)
            for clients in (number for number, its in sizes.slots.items() if its == slots):
                calm = _load(settings, servers, clients, None, failures)
                found.append(calm)
                usual = [row["request_median"] for row in calm["servers"].values() if row["request_median"]]
                if usual:
                    found.append(_load(settings, servers, clients, float(np.mean(usual)), failures))
    return found


def _warm_up(settings: Settings, server: Server, failures: list[str]) -> None:
    with contextlib.suppress(WorkerFailed):
        _send(settings, server, 2, [([settings.seed, 1, i], None) for i in range(2)])


def _load(
    settings: Settings, servers: dict[str, Server], clients: int, usual: float | None, failures: list[str]
) -> dict[str, Any]:
    """One load in several rounds. `usual`: seconds of a request within which hang-ups come; None for no hang-ups."""
    sizes = settings.sizes
    rng = np.random.default_rng([settings.seed, clients, usual is not None])
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for number in range(sizes.rounds):
        requests = []
        for i in range(sizes.requests[clients]):
            leaves = usual is not None and i % 3 == 1
            after = float(rng.uniform(0.0, usual or 0.0)) if leaves else None
            requests.append(([settings.seed, clients, int(usual is not None), number, i], after))
        for i in rng.permutation(len(servers)):
            name = list(servers)[i]
            try:
                servers[name].check()
                began, before = time.time(), _page(servers[name])
                round_ = _send(settings, servers[name], clients, requests)
                after = _page(servers[name])
                round_["engine"] = _engine_seconds(before, after) if before and after else None
                round_["freed"] = _cancel_latencies(after, began) if after else []
            except (WorkerFailed, ServerFailed, OSError) as error:
                failures.append(f"{name}, {clients} clients: {error}")
                continue
            rounds[name].append(round_)
        say(_told(clients, usual is not None, number, rounds))
    rows = {name: _summed_up(name, clients, of, sizes, failures) for name, of in rounds.items() if of}
    return {
        "clients": clients,
        "slots": sizes.slots[clients],
        "hang_ups": usual is not None,
        "prompt_tokens": sizes.prompt_tokens,
        "answer_tokens": sizes.answer_tokens,
        "servers": rows,
        "ratios": _ratios(rows),
    }


def _send(
    settings: Settings, server: Server, clients: int, requests: Sequence[tuple[Sequence[int], float | None]]
) -> dict[str, Any]:
    sizes = settings.sizes
    job = LoadJob(
        server.url,
        clients,
        requests,
        sizes.prompt_tokens,
        sizes.answer_tokens,
        settings.vocabulary,
        settings.end_tokens,
        words=settings.words,
    )
    return do(job)


def _told(clients: int, hang_ups: bool, number: int, rounds: dict[str, list[dict[str, Any]]]) -> str:
    speeds = ", ".join(f"{name} {_throughput(of[-1]):.0f}" for name, of in rounds.items() if of)
    return f"{clients} clients{', hang-ups' if hang_ups else ''}, round {number + 1}: {speeds} tokens/s"


def _survivors(round_: dict[str, Any]) -> list[dict[str, Any]]:
    return [a for a in round_["answers"] if a["hung_up"] is None and a["error"] is None]


def _throughput(round_: dict[str, Any]) -> float:
    """Tokens per second that reached clients who stayed."""
    return float(sum(answer["tokens"] for answer in _survivors(round_)) / round_["seconds"])


def _ttft(round_: dict[str, Any]) -> list[float]:
    return [a["first"] - a["sent"] for a in _survivors(round_) if a["first"] is not None]


def _summed_up(
    name: str, clients: int, rounds: list[dict[str, Any]], sizes: Sizes, failures: list[str]
) -> dict[str, Any]:
    answers = [answer for round_ in rounds for answer in round_["answers"]]
    errors = [answer["error"] for answer in answers if answer["error"]]
    survivors = [answer for round_ in rounds for answer in _survivors(round_)]
    short = sum(answer["tokens"] != sizes.answer_tokens for answer in survivors)
    if errors:
        failures.append(f"{name}, {clients} clients: {len(errors)} requests failed: {errors[0]}")
    if short:
        failures.append(f"{name}, {clients} clients: {short} answers had not {sizes.answer_tokens} tokens")
    speeds = [_throughput(round_) for round_ in rounds]
    first = [value for round_ in rounds for value in _ttft(round_)]
    engine = [round_["engine"] for round_ in rounds if round_["engine"]]
    return {
        "throughput": speeds,
        "throughput_median": median(speeds),
        "ttft": distribution(first),
        "ttft_rounds": [median(_ttft(round_)) for round_ in rounds if _ttft(round_)],
        "ttft_samples": first,
        "request_median": median([a["ended"] - a["sent"] for a in survivors]) if survivors else None,
        "answered": len(survivors),
        "hung_up": sum(answer["hung_up"] is not None for answer in answers),
        "failed": len(errors),
        "wrong_length": short,
        "engine": {key: sum(part[key] for part in engine) for key in engine[0]} if engine else None,
        "freed": distribution([seconds for round_ in rounds for seconds in round_["freed"]]),
    }


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first server against each of the others, round by round."""
    names = list(rows)
    found: dict[str, dict[str, Any]] = {}
    for other in names[1:]:
        mine, its = rows[names[0]], rows[other]
        pairs = min(len(mine["throughput"]), len(its["throughput"]))
        if pairs and mine["ttft"] and its["ttft"]:
            found[other] = {
                "throughput": paired_ratio(mine["throughput"][:pairs], its["throughput"][:pairs]),
                "ttft_median": mine["ttft"]["median"] / its["ttft"]["median"],
                "ttft_p99": mine["ttft"]["p99"] / its["ttft"]["p99"],
            }
    return found


_TIMES = ("steps", "schedule_seconds", "run_seconds", "commit_seconds", "decode_seconds")


def _page(server: Server) -> dict[str, Any] | None:
    """What our server says of itself; None for another."""
    return dict(server.get("/slots")) if server.kind.view == "llamacancel" else None


def _engine_seconds(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What its steps took between the two."""
    return {name: float(after[name]) - float(before[name]) for name in _TIMES}


def _cancel_latencies(page: dict[str, Any], since: float) -> list[float]:
    """Of the requests that were cancelled since then: seconds from noticing that to the slot being free."""
    return [view["cancel_latency"] for view in page["recent"] if view["cancel_latency"] is not None
            and view["finished_at"] >= since]  # fmt: skip


def freed(
    settings: Settings, kinds: Sequence[Kind], failures: list[str], slots: int = 4, phases: Sequence[str] = PHASES
) -> list[dict[str, Any]]:
    """Hang-ups in each phase, on each server that tells its state."""
    sizes, found = settings.sizes, []
    shape = Shape(settings.model, slots, N_CTX_FREED, settings.threads)
    for kind in (kind for kind in kinds if kind.view):
        say(f"hang-ups on {kind.name}")
        with running([kind], shape, failures) as servers:
            for server in servers.values():
                began = time.monotonic()
                job = FreedJob(
                    *(server.url, server.root, kind.view or "", slots, sizes.trials, sizes.victim_tokens),
                    neighbour_tokens=600,
                    vocabulary=settings.vocabulary,
                    end_tokens=settings.end_tokens,
                    seed=settings.seed,
                    phases=phases,
                )
                try:
                    result = do(job)
                except WorkerFailed as error:
                    failures.append(f"{kind.name}, hang-ups: {error}")
                    continue
                failures += [f"{kind.name}, hang-ups: {text}" for text in result["failures"]]
                found.append({"server": kind.name, "seconds": time.monotonic() - began, **_by_phase(result)})
    return found


def _by_phase(result: dict[str, Any]) -> dict[str, Any]:
    phases = {}
    for phase in dict.fromkeys(sample["phase"] for sample in result["samples"]):
        samples = [sample for sample in result["samples"] if sample["phase"] == phase]
        phases[phase] = {
            name: distribution([sample[name] for sample in samples if sample[name] is not None])
            for name in ("polled", "exact", "own")
        }
    return {"phases": phases, "samples": result["samples"], "too_late": result["too_late"], "usual": result["usual"]}


def engine_steps(settings: Settings, slots: int = 16) -> list[dict[str, Any]]:
    """What a step costs beside llama.cpp's computing: prompts and answers mixed, and answers alone."""
    sizes = settings.sizes
    works: list[tuple[str, int, int, Callable[[], int]]] = [
        ("prompts and answers", sizes.prompt_tokens, sizes.answer_tokens, lambda: sizes.engine_rounds),
        ("answers alone", 8, 4 * sizes.answer_tokens, lambda: 1),
    ]
    found = []
    for name, prompt, answer, rounds in works:
        say(f"steps of the engine with {slots} slots: {name}")
        job = EngineJob(str(settings.model), slots, settings.threads, rounds(), prompt, answer, settings.seed)
        found.append({"work": name, "slots": slots, **do(job)})
    return found

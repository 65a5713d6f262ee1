"""What a step of the engine costs beside llama.cpp's computing, without a server around it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import llamacancel as lc

__all__ = ["EngineJob", "run_engine"]


@dataclass(frozen=True)
class EngineJob:
    """What to run: `slots` requests at a time, `rounds` times as many in all."""

    model: str
    slots: int
    threads: int
    rounds: int
    prompt_tokens: int
    answer_tokens: int
    seed: int = 0


def run_engine(job: EngineJob) -> dict[str, Any]:
    """Run the requests in an engine in this process, where nothing else runs.

    Returns:
        Steps, and the seconds of planning, running and handing out, and of llama.cpp's part of running.
    """
    rng = np.random.default_rng([job.seed, 5])
    n_ctx = job.slots * (job.prompt_tokens + job.answer_tokens + 32)
    with lc.Model.load(job.model) as model:
        ends = [token for token in range(model.n_vocab) if model.is_eog(token)]
        sampler = lc.Sampler(temperature=0, logit_bias=dict.fromkeys(ends, -100.0), model=model)
        with lc.Engine(model, slots=job.slots, n_ctx=n_ctx, n_threads=job.threads, queue_limit=1024) as engine:

            def run(count: int) -> None:
                prompts = rng.integers(3, model.n_vocab, (count, job.prompt_tokens))
                works = [engine.submit(p, max_tokens=job.answer_tokens, sampler=sampler) for p in prompts]
                for work in works:
                    work.result()

            run(job.slots)
            before, began = engine.snapshot(), time.monotonic()
            run(job.slots * job.rounds)
            seconds, after = time.monotonic() - began, engine.snapshot()
    names = ("schedule_seconds", "run_seconds", "commit_seconds", "decode_seconds")
    found = {name: getattr(after, name) - getattr(before, name) for name in names}
    return {"steps": after.steps - before.steps, "seconds": seconds, **found}

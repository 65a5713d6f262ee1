"""Throughput and time to first token of the servers that take such a load at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..server import measure
from ..server.launch import Kind, Server, ServerFailed, Shape
from ..server.load import LoadJob
from ..server.worker import WorkerFailed, do

__all__ = ["loads"]

PATIENCE = 45.0  # seconds for three small requests


def loads(settings: measure.Settings, kinds: Sequence[Kind], failures: list[str]) -> list[dict[str, Any]]:
    """Every load on the servers that answer, and go on answering beside and after a hang-up.

    A server that does not would be waited for in every round: it is a failure once, and left out.
    """
    able = []
    for kind in kinds:
        message = _tried(settings, kind)
        if message is None:
            able.append(kind)
        else:
            failures.append(f"{kind.name}, load: {message}")
            measure.say(failures[-1])
    return measure.loads(settings, able, failures) if able else []


def _tried(settings: measure.Settings, kind: Kind) -> str | None:
    """None if it takes three requests at a time, one of which is given up, and then another; else what happened."""
    sizes = settings.sizes
    shape = Shape(settings.model, 4, sizes.prompt_tokens + sizes.answer_tokens + 64, settings.threads)
    try:
        with Server(kind, shape) as server:
            for moments in ((None, 0.02, None), (None,)):
                job = LoadJob(
                    *(server.url, len(moments), [([settings.seed, 9, i], at) for i, at in enumerate(moments)]),
                    *(sizes.prompt_tokens, sizes.answer_tokens, settings.vocabulary, settings.end_tokens),
                    patience=PATIENCE,
                    words=settings.words,
                )
                answers = do(job)["answers"]
                errors = [answer["error"] for answer in answers if answer["error"]]
                if errors:
                    return str(errors[0])
                server.check()
    except (ServerFailed, WorkerFailed, OSError) as error:
        return str(error)
    return None

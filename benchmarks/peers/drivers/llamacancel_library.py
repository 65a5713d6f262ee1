"""llamacancel as a library."""

from typing import ClassVar

import common

import llamacancel as lc


class _InContext(common.Session):
    """A context of one's own. Cleared after an answer, never after a stop: what a stop leaves is what is judged."""

    def __init__(self, job, way):
        self.model = lc.Model.load(job["model"])
        options = {"n_threads": job["threads"], "n_ubatch": job["n_ubatch"], "n_batch": job["n_batch"]}
        self.context = self.model.context(n_ctx=job["n_ctx"], **options)
        self.sampler = lc.Sampler(temperature=0)
        self.stoppable = way is not None
        self.token = None

    def settings(self):
        return _settings(self.context)

    def before(self):
        self.token = lc.CancelToken() if self.stoppable else None

    def answer(self, prompt, tokens):
        batch = lc.Batch(self.context.n_batch)
        given = self.model.tokenize(prompt)
        batch.add_sequence(given)
        self.context.decode(batch, self.token)
        try:
            return self._answered(batch, len(given), tokens)
        finally:  # the prompt is in: a stop that came later leaves it there, as it should
            self.context.memory.clear()

    def _answered(self, batch, position, tokens):
        text = b""
        for _ in range(tokens):
            chosen = self.sampler.sample(self.context)
            if self.model.is_eog(chosen):
                break
            text += self.model.token_to_piece(chosen)
            batch.clear()
            batch.add(chosen, position, 0, True)
            self.context.decode(batch, self.token)
            position += 1
        return text.decode("utf-8", "replace")

    def stop(self):
        self.token.cancel("stop")

    def close(self):
        self.context.close()
        self.model.close()


class _InEngine(common.Session):
    """The engine with one slot."""

    def __init__(self, job):
        self.model = lc.Model.load(job["model"])
        self.engine = lc.Engine(
            self.model,
            slots=1,
            n_ctx=job["n_ctx"],
            n_threads=job["threads"],
            n_ubatch=job["n_ubatch"],
            n_batch=job["n_batch"],
        )
        self.token = lc.CancelToken()

    def settings(self):
        return _settings(self.engine._thread.runner.context)

    def before(self):
        self.token = lc.CancelToken()

    def answer(self, prompt, tokens):
        sampler = lc.Sampler(temperature=0)
        return self.engine.submit(prompt, max_tokens=tokens, sampler=sampler, token=self.token).result().text

    def stop(self):
        self.token.cancel("stop")

    def close(self):
        self.engine.close()
        self.model.close()


def _settings(context):
    return {name: getattr(context, name) for name in common.SETTINGS}


class Driver(common.Driver):
    name = "llamacancel"
    ways: ClassVar = {
        "CancelToken": "decode() of a context with a token; another thread cancels the token",
        "Engine": "a request to an engine with one slot, with a token",
    }

    def versions(self):
        info = lc.build_info()
        return {
            "llamacancel": lc.__version__,
            "llama.cpp": info["llama_cpp"],
            "CPU": info["system"].removeprefix("CPU : ").strip(" |"),
            "build": "built here for this CPU",
        }

    def open(self, job, way):
        return _InEngine(job) if way == "Engine" else _InContext(job, way)


if __name__ == "__main__":
    common.main(Driver())

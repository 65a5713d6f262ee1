"""xllamacpp: stopped by what its callback returns."""

import json
import os
from typing import ClassVar

import common
import xllamacpp


class _Session(common.Session):
    def __init__(self, job, way):
        params = xllamacpp.CommonParams()
        params.model.path = job["model"]
        params.n_ctx, params.n_batch, params.n_ubatch = job["n_ctx"], job["n_batch"], job["n_ubatch"]
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        params.cache_ram_mib = 0
        params.fit_params = False
        self.params, self.server = params, xllamacpp.Server(params)
        self.flag = False
        self.stoppable = way is not None

    def settings(self):
        # It tells nothing of its context; what its parameters say after the start is as near as one comes.
        threads = {"n_threads": self.params.cpuparams, "n_threads_batch": self.params.cpuparams_batch}
        return {
            name: threads[name].n_threads if name in threads else getattr(self.params, name) for name in common.SETTINGS
        }

    def before(self):
        self.flag = False

    def answer(self, prompt, tokens):
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": self.stoppable}
        if not self.stoppable:
            return self.server.handle_completions(body)["choices"][0]["text"]
        parts, self.ended = [], None

        def take(chunk):
            if isinstance(chunk, (str, bytes)):
                chunk = json.loads(chunk)
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if self.flag:
                return True
            for choice in chunk.get("choices", ()):
                parts.append(choice.get("text") or "")
                self.ended = choice.get("finish_reason") or self.ended
            return False

        self.server.handle_completions(body, take)
        return "".join(parts)

    def stop(self):
        self.flag = True

    def close(self):
        self.server = None


class Driver(common.Driver):
    name = "xllamacpp"
    ways: ClassVar = {
        "streaming callback": "its documented means: a callback that returns True, asked at each piece of text"
    }

    def versions(self):
        return {
            "xllamacpp": xllamacpp.__version__,
            "CPU": xllamacpp.get_system_info().removeprefix("CPU : ").strip(" |\n"),
            "build": "built here for this CPU" if os.environ.get("PEER_BUILT_HERE") else "the wheel on PyPI",
        }

    def open(self, job, way):
        return _Session(job, way)


if __name__ == "__main__":
    common.main(Driver())

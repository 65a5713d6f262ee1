"""cyllama: stopped by LLM.cancel(), and by an abort callback in Python on its context."""

import json
from importlib.metadata import version
from importlib.resources import files
from typing import ClassVar

import common
from cyllama import LLM, GenerationConfig


class _Session(common.Session):
    def __init__(self, job, way):
        self.config = {"n_ctx": job["n_ctx"], "n_batch": job["n_batch"], "temperature": 0.0, "n_gpu_layers": 0}
        self.llm = LLM(job["model"], config=GenerationConfig(**self.config))
        # Its configuration has no number of threads: it would compute with four.
        context = self.llm._ensure_context(1, self.llm.config)
        context.set_n_threads(job["threads"], job["threads"])
        if context.n_ubatch != job["n_ubatch"]:
            raise RuntimeError(f"it computes {context.n_ubatch} rows at a time, and that cannot be set")
        self.way, self.flag = way, False
        if way is None:
            context.set_abort_callback(None)
        elif way == "set_abort_callback":
            context.set_abort_callback(lambda: self.flag)

    def before(self):
        self.flag = False

    def answer(self, prompt, tokens):
        return str(self.llm(prompt, config=GenerationConfig(**self.config, max_tokens=tokens)))

    def stop(self):
        self.flag = True
        if self.way == "LLM.cancel()":
            self.llm.cancel()

    def close(self):
        self.llm.close()


class Driver(common.Driver):
    name = "cyllama"
    ways: ClassVar = {
        "LLM.cancel()": "its documented means: a flag in C that its abort callback reads",
        "set_abort_callback": "of its low-level API, with a callback in Python on the context of an LLM object",
    }

    def versions(self):
        built = json.loads(files("cyllama").joinpath("build_config.json").read_text())
        return {
            "cyllama": version("cyllama"),
            "llama.cpp": built["versions"]["llama_cpp_version"],
            "build": "the wheel on PyPI; there is no sdist to build from",
        }

    def open(self, job, way):
        return _Session(job, way)


if __name__ == "__main__":
    common.main(Driver())

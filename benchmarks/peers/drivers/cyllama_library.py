"""cyllama: stopped by LLM.cancel(), by an abort callback in Python, and by the flag of a context of one's own."""

import json
from importlib.metadata import version
from importlib.resources import files
from typing import ClassVar

import common
from cyllama import LLM, GenerationConfig
from cyllama.llama import llama_cpp


class _InLLM(common.Session):
    def __init__(self, job, way):
        self.config = {"n_ctx": job["n_ctx"], "n_batch": job["n_batch"], "temperature": 0.0, "n_gpu_layers": 0}
        self.llm = LLM(job["model"], config=GenerationConfig(**self.config))
        # Its configuration has no number of threads: it would compute with four.
        self.context = self.llm._ensure_context(1, self.llm.config)
        self.context.set_n_threads(job["threads"], job["threads"])
        self.way, self.flag = way, False
        if way is None:
            self.context.set_abort_callback(None)
        elif way == "set_abort_callback":
            self.context.set_abort_callback(lambda: self.flag)

    def settings(self):
        return _settings(self.context)

    def before(self):
        self.flag = False

    def answer(self, prompt, tokens):
        found = self.llm(prompt, config=GenerationConfig(**self.config, max_tokens=tokens))
        self.ended = found.finish_reason
        return found.text

    def stop(self):
        self.flag = True
        if self.way == "LLM.cancel()":
            self.llm.cancel()

    def close(self):
        self.llm.close()


class _InContext(common.Session):
    """A loop of one's own. The context is cleared after an answer, never after a stop, as ours is."""

    def __init__(self, job):
        llama_cpp.ggml_backend_load_all()
        llama_cpp.disable_logging()
        given = llama_cpp.LlamaModelParams()
        given.n_gpu_layers = 0
        self.model = llama_cpp.LlamaModel(job["model"], given)
        self.vocab = self.model.get_vocab()
        params = llama_cpp.LlamaContextParams()
        for name in common.SETTINGS:
            setattr(params, name, job["threads"] if name.startswith("n_threads") else job[name])
        self.context = llama_cpp.LlamaContext(self.model, params)
        self.context.install_cancel_callback()
        self.sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        self.sampler.add_greedy()

    def settings(self):
        return _settings(self.context)

    def before(self):
        self.context.cancel = False

    def answer(self, prompt, tokens):
        rows = self.vocab.tokenize(prompt, add_special=True, parse_special=True)
        position, text = 0, ""
        for _ in range(tokens):
            self.context.decode(llama_cpp.llama_batch_get_one(rows, position))
            position += len(rows)
            token = self.sampler.sample(self.context, -1)
            if self.vocab.is_eog(token):
                break
            text += self.vocab.token_to_piece(token, special=True)
            rows = [token]
        self.context.kv_cache_clear()
        return text

    def stop(self):
        self.context.cancel = True

    def close(self):
        self.context.close()
        self.model.close()


def _settings(context):
    found = {name: getattr(context, name) for name in common.SETTINGS}
    return {name: value() if callable(value) else value for name, value in found.items()}


class Driver(common.Driver):
    name = "cyllama"
    ways: ClassVar = {
        "LLM.cancel()": "its documented means: a flag in C that its abort callback reads; it clears its context before "
        "each call and keeps no prefix",
        "set_abort_callback": "of its low-level API, with a callback in Python on the context of an LLM object",
        "LlamaContext.cancel": "the same flag in C, in a loop of one's own over its context, which is not cleared "
        "after a stop (as ours is not)",
    }

    def versions(self):
        built = json.loads(files("cyllama").joinpath("build_config.json").read_text())
        return {
            "cyllama": version("cyllama"),
            "llama.cpp": built["versions"]["llama_cpp_version"],
            "build": "the wheel on PyPI; there is no sdist to build from",
        }

    def open(self, job, way):
        return _InContext(job) if way == "LlamaContext.cancel" else _InLLM(job, way)


if __name__ == "__main__":
    common.main(Driver())

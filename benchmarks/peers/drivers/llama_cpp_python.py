"""llama-cpp-python: stopped by its stopping criteria, and by the abort callback of its low-level API."""

from typing import ClassVar

import common
import llama_cpp


class _Session(common.Session):
    def __init__(self, job, way):
        self.flag = False
        self.llm = llama_cpp.Llama(
            job["model"],
            n_ctx=job["n_ctx"],
            n_batch=job["n_batch"],
            n_ubatch=job["n_ubatch"],
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            flash_attn=True,  # as all the others by default
            verbose=False,
        )
        self.criteria = None
        if way == "stopping_criteria":
            self.criteria = llama_cpp.StoppingCriteriaList([lambda tokens, logits: self.flag])
        elif way == "llama_set_abort_callback":
            self.callback = llama_cpp.ggml_abort_callback(lambda data: self.flag)
            llama_cpp.llama_set_abort_callback(self.llm._ctx.ctx, self.callback, None)

    def settings(self):
        return {name: getattr(llama_cpp, f"llama_{name}")(self.llm._ctx.ctx) for name in common.SETTINGS}

    def before(self):
        self.flag = False

    def answer(self, prompt, tokens):
        found = self.llm.create_completion(prompt, max_tokens=tokens, temperature=0, stopping_criteria=self.criteria)
        self.ended = found["choices"][0]["finish_reason"]
        return found["choices"][0]["text"]

    def stop(self):
        self.flag = True

    def close(self):
        self.llm.close()


class Driver(common.Driver):
    name = "llama-cpp-python"
    ways: ClassVar = {
        "stopping_criteria": "its documented means: asked after each token, never in a prompt",
        "llama_set_abort_callback": "of its low-level API, with a callback in Python on the context of a Llama object",
    }

    def versions(self):
        return {
            "llama-cpp-python": llama_cpp.__version__,
            "CPU": llama_cpp.llama_print_system_info().decode().removeprefix("CPU : ").strip(" |\n"),
            "build": "built here for this CPU",
        }

    def open(self, job, way):
        return _Session(job, way)


if __name__ == "__main__":
    common.main(Driver())

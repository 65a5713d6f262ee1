"""`llamacancel generate`: one answer in the terminal, which Ctrl-C stops cleanly."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine import Generation
    from ..llama import Model

__all__ = ["add_arguments", "run"]

EPILOG = """\
examples:
  llamacancel generate --model model.gguf "Once upon a time"
  llamacancel generate --model model.gguf --chat "What is a GGUF file?"
  git diff | llamacancel generate --model model.gguf --chat --system "Review this." -
Ctrl-C stops at once; what was written by then stays, and the exit status is 130.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llamacancel generate` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("prompt", help="the text to continue, or - to read it from standard input")
    parser.add_argument("--model", "-m", type=Path, required=True, metavar="PATH", help="GGUF file")
    parser.add_argument("--chat", action="store_true", help="ask it as a question, through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="instructions for --chat")
    parser.add_argument(
        "--max-tokens", "-n", type=int, metavar="N", help="stop after so many tokens (default: no limit)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="stop after so many seconds")

    choosing = parser.add_argument_group("how tokens are chosen")
    choosing.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest (default: 0.8)"
    )
    choosing.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="among the K likeliest; 0: all (default: 40)"
    )
    choosing.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="among the likeliest that make up P (default: 0.95)"
    )
    choosing.add_argument(
        "--min-p",
        type=float,
        default=0.05,
        metavar="P",
        help="at least P of the likeliest's probability (default: 0.05)",
    )
    choosing.add_argument(
        "--repeat-penalty", type=float, default=1.0, metavar="X", help="against repetition; 1: off (default)"
    )
    choosing.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text (default: a random one)"
    )
    choosing.add_argument("--grammar", type=Path, metavar="PATH", help="file with a GBNF grammar that the text follows")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--ctx-size", "-c", type=int, metavar="N", help="context size in tokens (default: the model's, at most 4096)"
    )
    machine.add_argument("--threads", "-t", type=int, metavar="N", help="CPU threads (default: all)")
    machine.add_argument(
        "--n-gpu-layers", "-ngl", type=int, default=0, metavar="N", help="layers on the GPU; -1: all (default: 0)"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="show no progress and no figures")


def run(args: argparse.Namespace) -> int:
    """Generate and stream to standard output; the exit status: 130 after Ctrl-C, 124 when the time was over."""
    import llamacancel as lc

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    status = _Status(shown=not args.quiet and sys.stderr.isatty())
    with status, lc.Model.load(args.model, n_gpu_layers=args.n_gpu_layers, progress=status.loading) as model:
        tokens = _tokens(model, prompt, args)
        sampler = lc.Sampler(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repeat_penalty=args.repeat_penalty,
            seed=args.seed,
            grammar=args.grammar.read_text(encoding="utf-8") if args.grammar else None,
            model=model,
        )
        with lc.Engine(model, slots=1, n_ctx=args.ctx_size, n_threads=args.threads) as engine:
            generation = engine.submit(
                tokens, max_tokens=args.max_tokens, sampler=sampler, timeout=args.timeout, stop=args.stop
            )
            status.reading(generation)
            code = _stream(generation, status)
        if not args.quiet:
            _tell(generation)
    return code


def _tokens(model: Model, prompt: str, args: argparse.Namespace) -> list[int]:
    """The prompt as tokens, through the chat template if it is a question."""
    if not args.chat:
        tokens: list[int] = model.tokenize(prompt, parse_special=True).tolist()
        if not tokens:
            raise ValueError("the prompt is empty")
        return tokens
    messages = [{"role": "system", "content": args.system}] if args.system else []
    return model.chat.render([*messages, {"role": "user", "content": prompt}]).tokens


def _stream(generation: Generation, status: _Status) -> int:
    """Print the pieces as they come; the exit status."""
    import llamacancel as lc

    code = 0
    try:
        for piece in generation:
            status.clear()
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel("Ctrl-C")
        generation.wait()
        code = 130
    except BrokenPipeError:
        generation.cancel("nobody reads the output")
        generation.wait()
        sys.stdout = None
        code = 141
    except lc.DeadlineExceeded:
        code = 124
    status.clear()
    if generation.text and sys.stdout is not None:
        print(flush=True)
    return code


def _tell(generation: Generation) -> None:
    """One line of figures, on standard error."""
    usage = generation.usage
    words = [f"{usage.prompt_tokens} tokens read in {usage.prompt_seconds:.2f} s"]
    if usage.completion_tokens:
        rate = usage.completion_tokens / usage.decode_seconds if usage.decode_seconds > 0 else 0.0
        words.append(f"{usage.completion_tokens} written in {usage.decode_seconds:.2f} s ({rate:.1f} a second)")
    end: str = generation.finish_reason or "stopped"
    if generation.cancel_latency is not None:
        end += f", {generation.cancel_latency * 1e3:.1f} ms after it was asked for"
    print(f"[{'; '.join(words)}; {end}]", file=sys.stderr)


class _Status:
    """A line on standard error that tells how far loading and reading are; it goes when the first text comes."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._written = False
        self._cleared = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Status:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._thread is not None:
            self._thread.join()

    def loading(self, share: float) -> None:
        self._write(f"loading the model: {share:.0%}")

    def reading(self, generation: Generation) -> None:
        if self._shown:
            self._thread = threading.Thread(target=self._watch, args=(generation,), daemon=True)
            self._thread.start()

    def _watch(self, generation: Generation) -> None:
        start = time.monotonic()
        while not self._cleared.wait(0.1):
            view = generation.view()
            if view.prompt_tokens and view.state != "finished":
                elapsed = time.monotonic() - start
                self._write(f"reading the prompt: {view.prompt_done} of {view.prompt_tokens} tokens ({elapsed:.0f} s)")

    def _write(self, text: str) -> None:
        with self._lock:
            if self._shown and not self._cleared.is_set():
                print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
                self._written = True

    def clear(self) -> None:
        with self._lock:
            if not self._cleared.is_set():
                self._cleared.set()
                if self._written:
                    print("\r\x1b[K", end="", file=sys.stderr, flush=True)

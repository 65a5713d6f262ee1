"""An engine in a program of plain threads: each asks, one changes its mind, and the others are not disturbed.

python threads.py model.gguf
"""

import sys
import threading

import llamacancel as lc


def ask(engine: lc.Engine, name: str, prompt: str, token: lc.CancelToken, told: dict[str, str]) -> None:
    """What a thread of yours does with an engine that it shares with others."""
    try:
        text = ""
        for piece in engine.submit(prompt, max_tokens=32, sampler=lc.Sampler(temperature=0), token=token, timeout=60):
            text += piece
        told[name] = f"{text!r}"
    except lc.QueueFullError:
        told[name] = "too many are waiting"
    except lc.DeadlineExceeded:
        told[name] = "it took too long"
    except lc.DecodeCancelled as error:
        told[name] = f"cancelled, {error.reason}, after {error.latency * 1e3:.1f} ms"


def main(path: str) -> None:
    with lc.Model.load(path) as model, lc.Engine(model, slots=2) as engine:
        told: dict[str, str] = {}
        tokens = {name: lc.CancelToken() for name in ("Ada", "Bob", "Cyd")}
        threads = [
            threading.Thread(target=ask, args=(engine, name, f"{name} writes: " + "once more, " * 200, token, told))
            for name, token in tokens.items()
        ]
        for thread in threads:
            thread.start()
        tokens["Bob"].cancel("Bob has changed his mind")  # in the queue, in his prompt, or in his answer
        for thread in threads:
            thread.join()
    for name, text in told.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main(sys.argv[1])

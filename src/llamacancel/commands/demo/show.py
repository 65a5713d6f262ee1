"""What the demo writes to the terminal: sentences, checks, progress, and lanes of characters."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

from llamacancel import Model

from ...conformance.lanes import Lane

__all__ = ["Progress", "check", "legend", "named", "say", "text_lanes"]

WIDTH = 56
"""Characters of a lane."""
SYMBOLS = {"queued": "░", "prefill": "▒", "streaming": "█", "hang-up": "✗", "answered": "✓", "yes": "✓", "no": "!"}
ASCII = {"queued": ".", "prefill": "=", "streaming": "#", "hang-up": "x", "answered": "o", "yes": "+", "no": "!"}
COLOURS = {"queued": 245, "prefill": 214, "streaming": 32, "hang-up": 202, "answered": 35, "yes": 35, "no": 202}
WORDS = {
    "queued": "waits",
    "prefill": "reads the prompt",
    "streaming": "answers",
    "hang-up": "its client hung up",
    "answered": "answered",
}


def say(text: str = "", end: str = "\n") -> None:
    """Print, with other characters where the terminal cannot show these."""
    if not _encodes(text):
        encoding = sys.stdout.encoding or "ascii"
        text = text.encode(encoding, "replace").decode(encoding)
    print(text, end=end, flush=True)


def named(model: Model) -> str:
    """A model in a few words: its architecture and its size."""
    return f"{model.metadata['general.architecture']}, {model.n_params / 1e6:,.0f} million parameters"


def check(words: str, holds: bool) -> bool:
    """Print what was checked, and return whether it holds."""
    say(f"   {symbol('yes' if holds else 'no')} {words}{'' if holds else ': NOT SO'}")
    return holds


def symbol(name: str) -> str:
    """A character, in colour on a terminal."""
    return _coloured(_symbols()[name], name)


def legend(names: Sequence[str] = tuple(WORDS)) -> str:
    """What the characters of lanes mean."""
    return "   ".join(f"{symbol(name)} {WORDS[name]}" for name in names)


def text_lanes(lanes: Sequence[Lane], width: int = WIDTH) -> list[str]:
    """Lanes as lines of text that share a time axis, which is the last line.

    Args:
        lanes: What happened; times in seconds from 0.
        width: Characters for the whole time.
    """
    last = max([end for lane in lanes for _, _, end in lane.spans] + [at for lane in lanes for _, at, _ in lane.marks])
    scale = (width - 1) / last if last > 0 else 0.0
    symbols = _symbols()
    names = max(len(lane.name) for lane in lanes)
    lines = []
    for lane in lanes:
        cells = [("", " ")] * width
        for kind, start, end in lane.spans:
            for i in range(round(start * scale), max(round(end * scale), round(start * scale) + 1)):
                if i < width and kind in symbols:
                    cells[i] = (kind, symbols[kind])
        for kind, at, _ in lane.marks:
            if kind in symbols:
                cells[min(round(at * scale), width - 1)] = (kind, symbols[kind])
        lines.append(f"{lane.name:<{names}} {_joined(cells)}".rstrip())
    lines.append(f"{'':<{names}} {'0 s':<{width - 8}}{f'{last:.2f} s':>8}")
    return lines


def _joined(cells: Sequence[tuple[str, str]]) -> str:
    """Neighbours of one kind get one colour together."""
    text, i = "", 0
    while i < len(cells):
        j = i
        while j < len(cells) and cells[j][0] == cells[i][0]:
            j += 1
        text += _coloured("".join(character for _, character in cells[i:j]), cells[i][0])
        i = j
    return text


def _coloured(text: str, kind: str) -> str:
    if kind not in COLOURS or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[38;5;{COLOURS[kind]}m{text}\x1b[0m"


def _symbols() -> dict[str, str]:
    return SYMBOLS if _encodes("".join(SYMBOLS.values())) else ASCII


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class Progress:
    """A line that tells what is going on, for how long, and how far it is; it goes when the work is done."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._share: float | None = None
        self._done = threading.Event()
        self._shown = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def share(self, share: float) -> None:
        """Tell how far it is, from 0 to 1."""
        self._share = share

    def __enter__(self) -> Progress:
        if self._shown:
            self._thread.start()
        else:
            print(f"   ... {self._words}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._done.set()
            self._thread.join()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        start = time.perf_counter()
        while not self._done.wait(0.2):
            share = "" if self._share is None else f", {self._share:.0%}"
            elapsed = time.perf_counter() - start
            print(f"\r\x1b[K   ... {self._words} ({elapsed:.0f} s{share})", end="", file=sys.stderr, flush=True)

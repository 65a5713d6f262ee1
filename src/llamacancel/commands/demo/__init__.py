"""`llamacancel demo`: work that nobody wants any more is cancelled, and everybody else is as if alone."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]

PICTURE = "llamacancel-demo.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's arguments."""
    parser.add_argument("--model", type=Path, metavar="PATH", help="your own GGUF file (default: small made models)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="length of long prompts (default: 1024)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads for each prompt (default: half of the CPUs)")
    parser.add_argument(
        "--out", type=Path, default=Path(PICTURE), metavar="PATH", help=f"where the picture goes (default: {PICTURE})"
    )
    parser.add_argument("--size", default="small", choices=["tiny", "small"], help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Show it; the exit status is 1 if something was not as it should be."""
    from .decode import show_decode
    from .show import say

    say("llamacancel: what happens to work that nobody wants any more\n")
    good = show_decode(args)
    good = _show_server(args) and good
    say("All as it should be." if good else "Something was not as it should be; see the lines marked with '!'.")
    return 0 if good else 1


def _show_server(args: argparse.Namespace) -> bool:
    """Show the part with the server, if what it takes is installed."""
    from .show import say

    try:
        from .cascade import show_cascade
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llamacancel"):
            raise
        say(f"For the part with a server ({error.name} is missing): pip install 'llamacancel[server]' httpx\n")
        return True
    return show_cascade(args)

"""A black-box cancellation conformance suite for OpenAI-compatible servers.

`llamacancel conformance --url http://127.0.0.1:8080/v1` runs it. It speaks HTTP only and knows no server's internals.
It is for servers on this machine, and for others that belong to you: it hangs up on purpose, many times.
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's options to a parser."""
    from .command import add_arguments as add

    add(parser)


def run(args: argparse.Namespace) -> int:
    """Run the suite as the arguments say and return the exit status."""
    try:
        from .command import run as run_command
    except ImportError as error:
        if error.name != "h11":
            raise
        raise ImportError("the conformance suite needs h11: pip install 'llamacancel[conformance]'") from error
    return run_command(args)

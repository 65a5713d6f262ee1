"""The command line: `llamacancel demo`, `make-model`, `info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (OSError, ImportError, ValueError) as error:
        print(f"llamacancel: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from .errors import LlamaCancelError

        if not isinstance(error, LlamaCancelError):
            raise
        print(f"llamacancel: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from . import demo, make_model

    parser = argparse.ArgumentParser(
        prog="llamacancel", description="Cancel llama.cpp work exactly and at once.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="show what the library is for, on this machine")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser("make-model", help="make a small GGUF model to try things with")
    make_model.add_arguments(command)
    command.set_defaults(run=make_model.run)

    command = commands.add_parser("info", help="tell how the library was built and which devices it sees")
    command.set_defaults(run=_info)
    return parser


def _info(_: argparse.Namespace) -> int:
    from . import __version__, build_info

    info = build_info()
    print(f"llamacancel {__version__}")
    print(f"llama.cpp   {info['llama_cpp']}")
    print(f"CPU         {info['system']}")
    for device in info["devices"]:
        memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
        print(f"device      {device['name']}: {device['description']}{memory}")
    return 0

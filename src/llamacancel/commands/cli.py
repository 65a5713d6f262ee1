"""The command line: `llamacancel serve`, `generate`, `demo`, `conformance`, `rpc-server`, `make-model`, `info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        args = _parser().parse_args(argv)  # imports what the commands need, which takes a second
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (OSError, ImportError, ValueError) as error:
        print(f"llamacancel: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from ..errors import LlamaCancelError

        if not isinstance(error, LlamaCancelError):
            raise
        print(f"llamacancel: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from .. import conformance
    from . import demo, generate, make_model, rpc_server
    from . import serve as server

    parser = argparse.ArgumentParser(
        prog="llamacancel",
        description="Run llama.cpp models so that work nobody wants any more stops: exactly that work, at once.",
        epilog="llamacancel COMMAND --help tells more. No model at hand? llamacancel make-model tiny.gguf",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _add(commands, "serve", "serve a model to OpenAI's clients, who may hang up at any time")
    server.add_arguments(command)
    command.set_defaults(run=server.run)

    command = _add(commands, "generate", "continue a text or answer a question, here in the terminal")
    generate.add_arguments(command)
    command.set_defaults(run=generate.run)

    command = _add(commands, "demo", "show what the library is for, on this machine")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    command = _add(
        commands, "conformance", "check, on any OpenAI-compatible server, whom a client that hangs up takes along"
    )
    conformance.add_arguments(command)
    command.set_defaults(run=conformance.run)

    command = _add(commands, "rpc-server", "compute layers of models for other processes, as one of their devices")
    rpc_server.add_arguments(command)
    command.set_defaults(run=rpc_server.run)

    command = _add(commands, "make-model", "make a small GGUF model to try things with")
    make_model.add_arguments(command)
    command.set_defaults(run=make_model.run)

    command = _add(commands, "info", "tell how the library was built, with which backends, and which devices it sees")
    command.set_defaults(run=_info)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)


def _info(_: argparse.Namespace) -> int:
    from .. import __version__, build_info

    info = build_info()
    print(f"llamacancel {__version__}")
    print(f"llama.cpp   {info['llama_cpp']}")
    print(f"CPU         {info['system']}")
    print(f"backends    {', '.join(reversed(info['backends']))}")
    for device in info["devices"]:
        memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
        print(f"device      {device['name']}: {device['description']}{memory}")
    return 0

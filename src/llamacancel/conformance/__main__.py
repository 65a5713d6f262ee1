"""`python -m llamacancel.conformance`: the suite without the rest of the command line."""

from __future__ import annotations

import argparse
import sys

from . import add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llamacancel.conformance",
        description="Check what happens to everybody else when clients hang up.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

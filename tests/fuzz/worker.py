"""A process that tries cases: a line of JSON for each on stdin, a line of JSON with what became of it on stdout."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback

from .targets import TARGETS, Wrong

MEMORY = 12 << 30  # address space: what asks for more gets MemoryError, and the machine goes on


def main() -> None:
    """Try what comes until there is no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes elsewhere
    if "ASAN_OPTIONS" not in os.environ:  # its shadow memory is larger
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    target = TARGETS[sys.argv[1]]()
    for line in sys.stdin:
        try:
            answer = {"told": target.try_case(json.loads(line))}
        except Wrong as error:
            answer = {"wrong": str(error)}
        except BaseException:
            answer = {"wrong": traceback.format_exc(limit=-4)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()

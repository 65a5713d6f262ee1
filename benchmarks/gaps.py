"""How long a CPU computes between two looks at the token, on one thread and in CPU time: `python -m benchmarks.gaps`.

It chose `kSecondsPerElement` in `_native/model/gap.cpp`. Other work on the machine does not show in CPU time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

LIBRARY = "LLAMACANCEL_GAPS"
ARCHITECTURES = ("llama", "swa", "mamba", "hybrid")
PAST = 1536


def longest_gap(context: lc.Context, library: ctypes.CDLL, rows: int, past: int) -> float:
    """Milliseconds, of the calmest of three decodes of so many rows behind so many others."""
    context.memory.clear()
    for start in range(0, past, rows):
        _decode(context, start, min(rows, past - start))
    found = []
    for turn in range(3):
        library.gaps_begin()
        _decode(context, past + turn * rows, rows)
        found.append(float(library.gaps_end()))
    return min(found)


def _decode(context: lc.Context, start: int, rows: int) -> None:
    batch = lc.Batch(rows)
    batch.add_sequence(np.arange(rows) % 200, pos=start)
    context.decode(batch, lc.CancelToken(timeout=1e6))  # with a deadline each look reads the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="GGUF files (default: small models of four architectures)")
    parser.add_argument("--quick", action="store_true", help="one tiny model: shows that it runs")
    args = parser.parse_args()
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "gaps.so"
            source = Path(__file__).with_suffix(".c")
            subprocess.run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", built, source], check=True)
            environment = {**os.environ, LIBRARY: str(built), "LD_PRELOAD": str(built)}
            command = [sys.executable, "-m", "benchmarks.gaps", *sys.argv[1:]]
            raise SystemExit(subprocess.run(command, env=environment).returncode)
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.gaps_end.restype = ctypes.c_double
    made = [str(cached_model(arch, "small")) for arch in ARCHITECTURES]
    models = [str(cached_model("llama", "tiny"))] if args.quick else args.models or made
    print("| model | rows in a ubatch | longest gap, ms | behind 1,536 cells |\n|---|---|---|---|")
    for path in models:
        with lc.Model.load(path) as model:
            for rows in (64,) if args.quick else (64, 128, 512):
                past = 64 if args.quick else PAST
                with model.context(n_ctx=past + 3 * rows, n_ubatch=rows, n_threads=1) as context:
                    near, far = (longest_gap(context, library, rows, cells) for cells in (0, past))
                print(f"| {Path(path).stem} | {rows} | {near:.2f} | {far:.2f} |", flush=True)


if __name__ == "__main__":
    main()

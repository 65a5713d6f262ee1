"""Builds llama.cpp's own server from the tree and with the options that our extension was built with."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..machine import ROOT

__all__ = ["BuildFailed", "cache_folder", "llama_server"]

PROJECT = Path(__file__).parent / "llama_server"
TREE = ROOT / "vendor" / "llama.cpp"


class BuildFailed(Exception):
    """There is no llama-server; the message has the last lines of what was tried."""


def cache_folder() -> Path:
    """Where what the benchmarks bring is kept: `$LLAMACANCEL_BENCH_CACHE` or `~/.cache/llamacancel`."""
    given = os.environ.get("LLAMACANCEL_BENCH_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "llamacancel"


def llama_server(given: Path | None = None) -> Path:
    """The executable: the given one, or one built into the cache from `vendor/llama.cpp` if it is not there yet.

    Raises:
        BuildFailed: It is not there, or cannot be built.
    """
    if given is not None:
        if not os.access(given, os.X_OK):
            raise BuildFailed(f"{given} is no executable")
        return given
    if not (TREE / "tools" / "server").is_dir():
        raise BuildFailed(f"{TREE} has no tools/server: run `python vendor/fetch.py`")
    options = _options()
    folder = cache_folder() / f"llama-server-{_key(options)}"
    found = folder / "server" / "llama-server"
    if not found.is_file():
        print(f"building llama-server in {folder} (some minutes, once)", file=sys.stderr, flush=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run("cmake", "-S", str(PROJECT), "-B", str(folder), *generator, f"-DLLAMA={TREE}", *options)
        _run("cmake", "--build", str(folder), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))
        built = [path for path in folder.rglob("llama-server") if path.is_file() and os.access(path, os.X_OK)]
        if not built:
            raise BuildFailed(f"the build in {folder} made no llama-server")
        if built[0] != found:
            found.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built[0], found)
    return found


def _options() -> list[str]:
    """Build type and GGML_* switches of our own build, as CMake arguments."""
    caches = sorted(ROOT.glob("build/*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    text = caches[-1].read_text(errors="replace") if caches else ""
    switches = re.findall(r"^(GGML_\w+):BOOL=(ON|OFF)$", text, re.MULTILINE)
    kind = re.search(r"^CMAKE_BUILD_TYPE:\w+=(\w+)$", text, re.MULTILINE)
    options = [f"-D{name}={value}" for name, value in switches if name not in ("GGML_CCACHE", "GGML_OPENMP_FETCH")]
    return [f"-DCMAKE_BUILD_TYPE={kind[1] if kind else 'Release'}", *options]


def _key(options: list[str]) -> str:
    """Changes with the tree, its patches and the options."""
    stamp = TREE / ".llamacancel-lock"
    tree = stamp.read_text() if stamp.is_file() else str(TREE.stat().st_mtime)
    return hashlib.sha256("\n".join([tree, *options]).encode()).hexdigest()[:12]


def _run(*command: str) -> None:
    if not shutil.which(command[0]):
        raise BuildFailed(f"{command[0]} is needed to build llama-server")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise BuildFailed(f"{' '.join(command[:4])} ... failed:\n{tail}")

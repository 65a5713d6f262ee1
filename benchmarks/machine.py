"""What the measurements ran on, and whether anything else was running there."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

import llamacancel as lc

__all__ = ["Watch", "cores", "describe"]

ROOT = Path(__file__).resolve().parent.parent
BUSY_CORES = 0.15  # what others may use of all cores before the figures are called doubtful
BUSY_STOLEN = 0.02  # share of the time that the host of a virtual machine may take away


def cores() -> int:
    """The number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """The machine, the build and the versions. What cannot be found out is None."""
    build = lc.build_info()
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "llamacancel": lc.__version__,
        "git_commit": _git_commit(),
        "llama_cpp": build["llama_cpp"],
        "llama_cpp_commit": _locked_commit(),
        "cpu_features": build["system"].strip(" |"),
        "backends": build["backends"],
        "devices": [device["description"] for device in build["devices"]],
        "build": _build(),
    }


class Watch:
    """Tells what other processes did while we measured.

    Linux counts the time of all processes and that of this one; the difference is the others'.
    """

    def __init__(self) -> None:
        self._load_before = _load()
        before = _times()
        time.sleep(1.0)
        self.others_before = _others(before, _times())
        self._start = _times()

    def result(self) -> dict[str, Any]:
        """Load averages before and after, and the cores that others kept busy before and meanwhile."""
        now = _times()
        during = _others(self._start, now)
        stolen = None
        if self._start and now and now["total"] > self._start["total"]:
            stolen = (now["stolen"] - self._start["stolen"]) / (now["total"] - self._start["total"])
        reasons = []
        for when, busy in (("before the run", self.others_before), ("during the run", during)):
            if busy is not None and busy > BUSY_CORES:
                reasons.append(f"other processes kept {busy:.2f} cores busy {when}")
        if stolen is not None and stolen > BUSY_STOLEN:
            reasons.append(f"the host took away {stolen:.0%} of the time")
        if self.others_before is None and self._load_before and self._load_before[0] > 0.5:
            reasons.append(f"the load average was {self._load_before[0]:.1f} before the run")
        return {
            "load_before": self._load_before,
            "load_after": _load(),
            "others_cores_before": self.others_before,
            "others_cores_during": during,
            "stolen_share": stolen,
            "busy": reasons,
        }


def _times() -> dict[str, float] | None:
    """Seconds of CPU time since boot: of all processes, of this one, stolen, in total. None where unknown."""
    try:
        fields = [float(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    if len(fields) < 8 or sum(fields) == 0:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, stolen = fields
    own = os.times()
    return {
        "busy": (user + nice + system + irq + softirq) / tick,
        "own": own.user + own.system + own.children_user + own.children_system,
        "stolen": stolen / tick,
        "total": sum(fields) / tick,
        "at": time.monotonic(),
    }


def _others(before: dict[str, float] | None, after: dict[str, float] | None) -> float | None:
    if not before or not after:
        return None
    busy = (after["busy"] - before["busy"]) - (after["own"] - before["own"])
    return max(0.0, busy / (after["at"] - before["at"]))


def _load() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def _cpu_model() -> str | None:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    except OSError:
        pass
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (OSError, ValueError):
        return None


def _git_commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit and _output("git", "-C", str(ROOT), "status", "--porcelain"):
        commit += " with uncommitted changes"
    return commit


def _locked_commit() -> str | None:
    try:
        return str(json.loads((ROOT / "vendor" / "llama.cpp.lock.json").read_text())["commit"])
    except (OSError, ValueError, KeyError):
        return None


def _build() -> dict[str, str] | None:
    """Compiler and build type from the build folder, if the library was built in this tree."""
    caches = sorted(ROOT.glob("build/*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    if not caches:
        return None
    entries = dict(re.findall(r"^(\w+):\w+=(.*)$", caches[-1].read_text(errors="replace"), re.MULTILINE))
    compiler = entries.get("CMAKE_CXX_COMPILER", "")
    version = _output(compiler, "--version") if compiler else None
    found = {
        "compiler": version.splitlines()[0] if version else compiler,
        "type": entries.get("CMAKE_BUILD_TYPE", ""),
        "options": ", ".join(name for name in _OPTIONS if entries.get(name) == "ON"),
    }
    return {name: value for name, value in found.items() if value} or None


_OPTIONS = ("GGML_NATIVE", "GGML_OPENMP", "GGML_LLAMAFILE", "GGML_BLAS", "GGML_CUDA", "GGML_METAL", "GGML_VULKAN")


def _output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None

"""Gathers what `make gpu-check` needs on a machine without a network: wheels, and llama.cpp's sources."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "requirements"]

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("models", "gpu")


def requirements() -> list[str]:
    """What pyproject.toml asks for at run time and for the check."""
    import tomllib  # Python 3.11, which only this needs

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [need for extra in EXTRAS for need in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *(need for need in extras if not need.startswith(project["name"]))]


def main(argv: Sequence[str] | None = None) -> int:
    """Download, and say what to carry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheelhouse", description=__doc__)
    parser.add_argument("tools", nargs="*", help="what builds need")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheelhouse")
    parser.add_argument("--python", help="version of the other machine's Python, such as 3.12 (this one's)")
    parser.add_argument("--platform", action="append", default=[], help="pip's name of the other machine's platform")
    parser.add_argument("--cublas", help="version of nvidia-cublas to bring, such as '13.0.*', for a toolkit without")
    args = parser.parse_args(argv)
    needs = [*args.tools, *requirements(), *([f"nvidia-cublas=={args.cublas}"] if args.cublas else [])]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest",
               str(args.out), "--only-binary=:all:"]  # fmt: skip
    command += ["--python-version", args.python] if args.python else []
    command += [f"--platform={name}" for name in args.platform]
    for step in ([sys.executable, str(ROOT / "vendor" / "fetch.py")], [*command, *needs]):
        if status := subprocess.run(step, check=False).returncode:
            return status
    wheels = list(args.out.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB, in {args.out}. Carry this folder and the source tree with\n"
          "vendor/llama.cpp to the other machine, and there: make gpu-check WHEELHOUSE=FOLDER")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Bring the llama.cpp sources that ``llama.cpp.lock.json`` names to ``vendor/llama.cpp/``.

The sources travel inside the sdist of a package on the ordinary index; ``pip download``
brings it, its SHA-256 is compared with the lock file, and what we build from is unpacked.
Nothing happens when the folder already holds the locked version. Standard library only:
the build calls this before anything else is installed.

    python vendor/fetch.py [--dest DIR] [--sdist FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
LOCK = HERE / "llama.cpp.lock.json"
STAMP = ".llamacancel-lock"  # written last: its presence says that the folder is whole


class FetchError(Exception):
    """What went wrong and what to do about it, in one message."""


def download(lock: dict, folder: pathlib.Path, what: str = "the llama.cpp sources, 75 MB") -> pathlib.Path:
    """Download the locked sdist, which carries `what`, into `folder` with pip and return its path."""
    # PYTHONPATH and friends point into the isolated environment of the build that we run in, and to its backend.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PEP517", "_PYPROJECT_HOOKS"))}
    requirement = f"{lock['package']}=={lock['version']}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        lock["package"],
        "--dest",
        str(folder),
        requirement,
    ]
    print(f"llamacancel: downloading {requirement} ({what}, once)", flush=True)
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if result.returncode != 0 or not found:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-4:])
        raise FetchError(f"cannot download {requirement} ({what}).\n{tail}")
    return found[0]


def verify(sdist: pathlib.Path, expected: str) -> None:
    """Raise FetchError unless the file has the locked SHA-256."""
    digest = hashlib.sha256()
    try:
        with sdist.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise FetchError(f"cannot read {sdist}: {error.strerror}") from None
    if digest.hexdigest() != expected:
        raise FetchError(
            f"{sdist.name} has SHA-256 {digest.hexdigest()},\nbut the locked one is {expected}.\n"
            "The file was changed on its way or the lock file is wrong; nothing was unpacked."
        )


def unpack(sdist: pathlib.Path, lock: dict, dest: pathlib.Path) -> None:
    """Unpack the kept part of the tree to `dest`, which is replaced as a whole."""
    partial = dest.with_name(dest.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    inside = lock["prefix"] + "/"

    def wanted(path: str) -> bool:
        under = lambda names: any(path == name or path.startswith(name + "/") for name in names)  # noqa: E731
        return under(lock["keep"]) and not under(lock["drop"])

    with tarfile.open(sdist) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if not path.startswith(inside):
                continue
            path = path[len(inside) :]
            if not member.isfile() or not wanted(path) or ".." in pathlib.PurePosixPath(path).parts:
                continue
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)
    if not (partial / "include" / "llama.h").is_file():
        raise FetchError(f"{sdist.name} has no llama.cpp under {inside}")
    apply_patches(partial)
    (partial / STAMP).write_text(stamp(lock))
    shutil.rmtree(dest, ignore_errors=True)
    partial.rename(dest)


def apply_patches(tree: pathlib.Path) -> None:
    """Apply our own patches, `vendor/patches/*.patch`, in the order of their names."""
    # The tree lies inside our own repository, which git must not take for the one to patch.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    for patch in sorted((HERE / "patches").glob("*.patch")):
        try:
            subprocess.run(["git", "apply", str(patch)], cwd=tree, env=env, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise FetchError("git is needed to patch the llama.cpp sources: install it first") from None
        except subprocess.CalledProcessError as error:
            raise FetchError(f"{patch.name} does not apply:\n{error.stderr.strip()}") from None


def stamp(lock: dict) -> str:
    """What the stamp file of a complete folder says."""
    patches = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((HERE / "patches").glob("*.patch"))))
    return f"{lock['package']} {lock['version']} {lock['sha256']} patches {patches.hexdigest()[:16]}\n"


def fetch(dest: pathlib.Path, sdist: pathlib.Path | None = None) -> None:
    """Make `dest` hold the locked sources; do nothing if it does already."""
    lock = json.loads(LOCK.read_text())
    held = dest / STAMP
    if sdist is None and held.is_file() and held.read_text() == stamp(lock):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            archive = sdist or download(lock, pathlib.Path(folder))
        except FetchError as error:
            raise FetchError(
                f"{error}\nWithout a network: build from our sdist, which has the sources inside, or point "
                "-DLLAMACANCEL_LLAMA_DIR= at a checkout of llama.cpp."
            ) from None
        verify(archive, lock["sha256"])
        print(f"llamacancel: unpacking llama.cpp {lock['commit']} to {dest}", flush=True)
        unpack(archive, lock, dest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dest", type=pathlib.Path, default=HERE / "llama.cpp", help="folder to fill")
    parser.add_argument("--sdist", type=pathlib.Path, help="use this file instead of downloading one")
    args = parser.parse_args()
    try:
        fetch(args.dest, args.sdist)
    except FetchError as error:
        print(f"llamacancel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

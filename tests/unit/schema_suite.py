"""The official JSON-Schema-Test-Suite against `Sampler(json_schema=)`'s way: schemas checked, compiled and followed.

The suite travels in the sdist of `jsonschema`, which `pip download` brings once to the cache of the made models. Each
schema is taken or refused in words; under those taken each instance's JSON text is followed byte by byte.

A program: `python -m tests.unit.schema_suite`, which `make schema-suite` runs, prints the shares.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from llamacancel.constraint import Vocabulary, source_of

DRAFTS = ("draft7", "draft2020-12")
LOCK = {
    "package": "jsonschema",
    "version": "4.26.0",
    "sha256": "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326",
}


class MissingSuiteError(Exception):
    """Why the suite cannot be brought."""


@dataclass(frozen=True)
class Case:
    """A schema of the suite, with its instances: what each shows, its JSON value, whether it is valid."""

    name: str
    schema: Any
    instances: list[tuple[str, Any, bool]]


@dataclass
class Shares:
    """What became of schemas and instances."""

    schemas: Counter[str] = field(default_factory=Counter)  # "taken", "refused"
    instances: Counter[str] = field(default_factory=Counter)  # "right", "valid refused", "invalid accepted"
    refusals: Counter[str] = field(default_factory=Counter)
    invalid_accepted: list[str] = field(default_factory=list)
    valid_refused: list[str] = field(default_factory=list)


def sdist() -> Path:
    """The file that carries the suite, in the cache; brought there if it is not there yet.

    Raises:
        MissingSuiteError: If it cannot be brought, or is another file than the locked one.
    """
    fetch = _fetch()
    cache = Path(os.environ.get("LLAMACANCEL_CACHE") or Path.home() / ".cache" / "llamacancel" / "models")
    held = cache / f"{LOCK['package']}-{LOCK['version']}.tar.gz"
    try:
        if not held.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                brought = fetch.download(LOCK, Path(folder), "the JSON-Schema-Test-Suite, 0.4 MB")
                fetch.verify(brought, LOCK["sha256"])
                brought.replace(held)
        fetch.verify(held, LOCK["sha256"])
    except fetch.FetchError as error:
        raise MissingSuiteError(str(error)) from None
    return held


def _fetch() -> ModuleType:
    """`vendor/fetch.py`, which brings llama.cpp's sources in the same way."""
    path = Path(__file__).parents[2] / "vendor" / "fetch.py"
    spec = importlib.util.spec_from_file_location("fetch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(draft: str) -> Iterator[Case]:
    """The schemas of a draft; those of its folder of optional features are left out, as validators do."""
    with tarfile.open(sdist()) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            folder, _, file = member.name.partition("/json/tests/")[2].rpartition("/")
            if folder != draft or not file.endswith(".json"):
                continue
            content = archive.extractfile(member)
            assert content is not None
            for group in json.load(content):
                instances = [(test["description"], test["data"], test["valid"]) for test in group["tests"]]
                yield Case(f"{draft}/{file[:-5]}: {group['description']}", group["schema"], instances)


def bytes_alone() -> Vocabulary:
    """A vocabulary of one token for each byte, and an end."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    return Vocabulary(lambda: (pieces, [256], [256], lambda text: list(text.encode())))


def judge(case: Case, vocabulary: Vocabulary, shares: Shares) -> None:
    """Adds what becomes of a case. Raises what is no refusal in words (ValueError)."""
    try:
        first = source_of(json_schema=case.schema).matcher(vocabulary)  # type: ignore[union-attr]
    except ValueError as error:
        shares.schemas["refused"] += 1
        shares.refusals[str(error)[:90]] += 1
        return
    shares.schemas["taken"] += 1
    for what, instance, valid in case.instances:
        matcher = first.copy()
        text = json.dumps(instance, ensure_ascii=False).encode("utf-8", "surrogatepass")
        accepted = matcher.native.try_consume_tokens([*text]) == len(text) and matcher.native.is_accepting()
        line = f"{case.name}: {what}: {text.decode('utf-8', 'replace')[:80]}"
        if accepted == valid:
            shares.instances["right"] += 1
        elif valid:
            shares.instances["valid refused"] += 1
            shares.valid_refused.append(line)
        else:
            shares.instances["invalid accepted"] += 1
            shares.invalid_accepted.append(line)


def shares_of(draft: str) -> Shares:
    """What becomes of a draft's schemas and instances."""
    shares, vocabulary = Shares(), bytes_alone()
    for case in cases(draft):
        judge(case, vocabulary, shares)
    return shares


def main() -> int:
    try:
        for draft in DRAFTS:
            shares = shares_of(draft)
            print(f"{draft}: schemas: {dict(shares.schemas)}; instances under those taken: {dict(shares.instances)}")
            for heading, lines in (
                ("INVALID AND ACCEPTED", shares.invalid_accepted),
                ("valid and refused", shares.valid_refused),
            ):
                for line in lines:
                    print(f"  {heading}: {line}")
            for words, n in shares.refusals.most_common():
                print(f"  {n:4d} schemas: {words}")
    except MissingSuiteError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

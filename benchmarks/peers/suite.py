"""The conformance suite against each server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..server.launch import Kind, Server, ServerFailed, Shape
from ..server.measure import say

__all__ = ["conformance"]


def conformance(
    kinds: Sequence[Kind],
    shape: Shape,
    *,
    prefill: float,
    rounds: int,
    only: Sequence[str] = (),
    patience: float = 900.0,
    pictures: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the suite on each server, in turn.

    Returns:
        Of each: `scenarios` with their outcomes and reasons, or why there are none.
    """
    found = []
    for kind in kinds:
        say(f"conformance of {kind.name}")
        row: dict[str, Any] = {"server": kind.name, "scenarios": [], "failure": None}
        found.append(row)
        try:
            with Server(kind, shape) as server, tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "conformance.json"
                command = [
                    *(sys.executable, "-m", "llamacancel.conformance", "--url", server.url, "--json", str(path)),
                    *("--prefill", str(prefill), "--rounds", str(rounds), "--grace", "10"),
                    *(arg for name in only for arg in ("--only", name)),
                ]
                if pictures is not None:
                    name = kind.name.replace(" ", "-")
                    command += ["--picture", str(pictures / f"conformance-{name}.svg")]
                done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
                if path.is_file():
                    report = json.loads(path.read_text(encoding="utf-8"))
                    row["scenarios"] = [
                        {name: scenario[name] for name in ("name", "outcome", "why", "figures")}
                        for scenario in report["scenarios"]
                    ]
                else:
                    row["failure"] = " / ".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        except subprocess.TimeoutExpired:
            row["failure"] = f"not done in {patience:.0f} s"
        except (ServerFailed, OSError) as error:
            row["failure"] = str(error)
    return found

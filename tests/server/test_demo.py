"""`llamacancel demo` comes to its end, and says that all is as it should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llamacancel.commands.make_model import cached_model


def test_the_demo_shows_what_the_library_is_for(tmp_path: Path) -> None:
    picture = tmp_path / "demo.svg"
    command = ["demo", "--model", str(cached_model("llama", "small")), "--tokens", "1024", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "llamacancel", *command, "--out", str(picture)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    for words in ("A's context is as it was before the call", "B was gone from the queue", "C never noticed"):
        assert words in done.stdout

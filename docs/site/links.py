"""Links from a page to a file outside of `docs` are checked, and shown as text: the site has no such page."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A docstring's "a, b: ..." is one entry for two parameters, which griffe takes for one that it does not find.
logging.getLogger("mkdocs.plugins.griffe").setLevel(logging.ERROR)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}, which does not exist")
        return match[1]

    return LINK.sub(shown, markdown)

"""Server-sent events out of a stream of bytes, as the HTML standard has them (section 9.2.6)."""

from __future__ import annotations

__all__ = ["EventReader"]


class EventReader:
    """Collects bytes and gives the `data` of the events that are complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        """Add bytes and return the data of every event that they complete; comments and other fields are left out."""
        self._rest += data
        held = b""
        if self._rest.endswith(b"\r"):  # the first half of a line's end, perhaps
            self._rest, held = self._rest[:-1], b"\r"
        *lines, self._rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest += held
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
        return events

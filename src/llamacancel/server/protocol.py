"""uvicorn's HTTP protocol with open ears: a hang-up is heard while a request is being answered."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ListeningProtocol"]

MOST_AHEAD = 65536


class ListeningProtocol(H11Protocol):
    """Goes on reading when bytes follow a request that is not answered yet.

    uvicorn stops reading then, be it a pipelined request or a stray line end, and would not learn that the client has
    hung up until it next writes: never, in a silent prompt. Who sends very much ahead is disconnected instead.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or not self.flow.read_paused:
            return
        if len(self.conn.trailing_data[0]) > MOST_AHEAD:
            self.transport.close()
        else:
            self.flow.resume_reading()

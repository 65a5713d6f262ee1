"""Worker processes that tests split models over, on ports of the loopback that were free."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import threading

from .clock import GENEROUS
from .words import ROOT

# `llamacancel rpc-server`, which also ends when the process does that holds the other end of its standard input.
PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.raw.read(), os._exit(1)), daemon=True).start()
from llamacancel.commands.cli import main
sys.exit(main(["rpc-server", "--threads", "1", *sys.argv[1:]]))
"""


class Worker:
    """A worker with one thread, in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, "--port", str(port)], cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:  # llama.cpp tells of itself and of each client, too
                if found := re.search(r"RPC server on (127\.0\.0\.1:(\d+))", line):
                    self.said, self._endpoint = line, found[1]
                    self._listens.set()

    @functools.cached_property
    def endpoint(self) -> str:
        """Where it listens, as `rpc_servers` wants it; waits until it does."""
        assert self._listens.wait(GENEROUS), "the worker does not listen"
        return self._endpoint

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def stop(self) -> None:
        """It computes and answers nothing until it goes on. Returns when the last of its threads has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a machine dies: at once, whatever it does."""
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        """Waits for its end, and returns its exit status."""
        status = self.process.wait(GENEROUS)
        self._reader.join(GENEROUS)
        if self.process.stdin is not None:
            self.process.stdin.close()
        return status

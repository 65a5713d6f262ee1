"""`llamacancel serve` and `generate`, as somebody starts them in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamacancel.commands.cli import main
from llamacancel.commands.make_model import cached_model

from .served import PATIENCE, eventually, read_events

MODEL = cached_model("llama", "tiny")
SMALL = ["--threads", "1", "--ctx-size", "512"]
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


class Process:
    """A command that runs."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llamacancel", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.errors: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(PATIENCE)
        self._reading.join(PATIENCE)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


@contextlib.contextmanager
def running(*args: str, **environment: str) -> Iterator[Process]:
    process = Process(*args, **environment)
    try:
        yield process
    finally:
        process.close()


@contextlib.contextmanager
def serve(*args: str, **environment: str) -> Iterator[tuple[Process, str]]:
    """A server in a process of its own, and its URL."""
    with running("serve", "--model", str(MODEL), "--port", "0", *SMALL, *args, **environment) as process:
        line = process.line()
        found = re.search(r"http://\S+", line)
        assert found, (line, process.errors)
        yield process, found.group()


LONG = {"prompt": "Go on", "max_tokens": 400, "temperature": 0, "stream": True, "logprobs": 20}


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@unix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_after_its_answers(number: int) -> None:
    with serve("--alias", "my-model", "--slots", "2") as (process, url):
        port = int(url.rpartition(":")[2])
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "my-model"
        connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        connection.sendall(request_of(LONG))
        read_events(connection, 2)
        process.process.send_signal(number)
        data = b""
        while more := connection.recv(65536):
            data += more
        connection.close()
        assert process.end() == 0
    assert b"data: [DONE]" in data
    assert "stopping" in "".join(process.errors)
    assert "Traceback" not in "".join(process.errors)


@unix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_it_at_once(number: int) -> None:
    with serve("--drain-timeout", "600") as (process, url):
        port = int(url.rpartition(":")[2])
        waiting = []
        for _ in range(6):  # much more than a moment's work
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            connection.sendall(request_of({**LONG, "n": 10}))
            waiting.append(connection)
        read_events(waiting[0], 1)
        process.process.send_signal(number)
        eventually(lambda: any("stopping" in line for line in process.errors))
        process.process.send_signal(number)
        assert process.end() == 0
        for connection in waiting:
            connection.close()
    assert "Traceback" not in "".join(process.errors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit")
def test_without_files_for_connections_the_log_has_a_line_and_the_server_goes_on() -> None:
    import resource

    with serve() as (process, url):
        port = int(url.rpartition(":")[2])
        limits = resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (48, limits[1]))
        many = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(100)]
        eventually(lambda: any("no connection" in line for line in process.errors), "the line")
        for connection in many:
            connection.close()
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == 0
    assert sum("no connection can be taken" in line for line in process.errors) == 1
    assert "Traceback" not in "".join(process.errors)


def test_keys_come_from_the_command_line_and_the_environment() -> None:
    with serve("--api-key", "one", LLAMACANCEL_API_KEY="two,three") as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("one", "two", "three"):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "no-such-file.gguf", "--port", str(port)]) == 1
    told = capfd.readouterr().err
    assert f"127.0.0.1:{port}" in told
    assert "no-such-file" not in told


def test_a_model_that_is_not_there_is_told_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "no-such-file.gguf", "--port", "0"]) == 1
    assert "no-such-file.gguf" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "wrong",
    [["--slots", "0"], ["--port", "70000"], ["--queue-limit", "-1"], ["--timeout", "0"], ["--cancel-latency", "soon"]],
)
def test_wrong_options_are_refused_with_a_reason(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "x.gguf", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def generate(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamacancel", "generate", "--model", str(MODEL), *SMALL, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


def test_generate_writes_the_text_and_says_what_it_took() -> None:
    first = generate("Once upon a time", "--max-tokens", "12", "--temperature", "0")
    assert first.returncode == 0
    assert first.stdout.strip()
    assert "12 written" in first.stderr
    again = generate("-", "--max-tokens", "12", "--temperature", "0", "--quiet", input="Once upon a time")
    assert (again.stdout, again.stderr) == (first.stdout, "")


def test_generate_can_chat_and_follow_a_grammar(tmp_path: Path) -> None:
    (tmp_path / "yes.gbnf").write_text('root ::= "yes"')
    answer = generate("Is it?", "--chat", "--system", "Be brief.", "--grammar", str(tmp_path / "yes.gbnf"))
    assert (answer.returncode, answer.stdout) == (0, "yes\n")


def test_generate_stops_when_the_time_is_over() -> None:
    late = generate("Once upon a time", "--timeout", "0.000001", "--max-tokens", "400")
    assert late.returncode == 124
    assert "deadline" in late.stderr


@unix
def test_ctrl_c_stops_generate_and_keeps_what_was_written() -> None:
    with running(
        "generate", "--model", str(MODEL), "--threads", "1", "--temperature", "0", "Once upon a time"
    ) as process:
        assert process.process.stdout is not None
        begun = process.process.stdout.read(20)
        process.process.send_signal(signal.SIGINT)
        rest = process.process.stdout.read()
        assert process.end() == 130
    assert len(begun) == 20
    assert rest.endswith("\n")
    told = "".join(process.errors)
    assert "cancelled" in told
    assert "Traceback" not in told


def test_generate_tells_errors_in_a_line() -> None:
    for args in (["", "--max-tokens", "0"], ["x" * 5000], ["x", "--temperature=-1e9"]):
        wrong = generate(*args)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("llamacancel: ")
        assert "Traceback" not in wrong.stderr


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from llamacancel.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_question_needs_no_extra() -> None:
    args = ["generate", "--model", str(MODEL), "--chat", "--max-tokens", "2", "Hello"]
    told = subprocess.run([sys.executable, "-c", WITHOUT, *args], capture_output=True, text=True, timeout=PATIENCE)
    assert told.returncode == 0
    assert told.stdout


def test_without_the_extra_a_line_says_how_to_get_it() -> None:
    args = ["serve", "--model", str(MODEL)]
    told = subprocess.run([sys.executable, "-c", WITHOUT, *args], capture_output=True, text=True, timeout=PATIENCE)
    assert told.returncode == 1
    assert told.stderr.strip().splitlines()[-1].endswith("pip install 'llamacancel[server]'")
    assert "Traceback" not in told.stderr


PRESSED = """
import sys
from llamacancel.commands.cli import main
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Press())
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module", ["llamacancel.commands.demo", "llamacancel.commands.serve", "uvicorn"])
def test_ctrl_c_while_a_command_is_imported_stops_it_without_a_traceback(module: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", PRESSED, module, "serve", "--model", str(MODEL)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (told.returncode, told.stdout, told.stderr) == (130, "", "\nstopped\n")


def test_without_the_extra_everything_else_works() -> None:
    for args in (["info"], ["generate", "--model", str(MODEL), *SMALL, "-n", "2", "Hello"], ["serve", "--help"]):
        told = subprocess.run([sys.executable, "-c", WITHOUT, *args], capture_output=True, text=True, timeout=PATIENCE)
        assert told.returncode == 0, told.stderr


def test_info_tells_backends_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^backends +CPU", told, re.MULTILINE)
    assert re.search(r"^device +CPU", told, re.MULTILINE)


@pytest.mark.parametrize("command", ["serve", "generate", "demo", "conformance", "make-model", "info"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3

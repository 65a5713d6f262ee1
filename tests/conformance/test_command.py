"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llamacancel.conformance import add_arguments, run
from llamacancel.conformance.lanes import Lane
from llamacancel.conformance.reports import as_json, as_junit, as_picture, summary, table_row
from llamacancel.conformance.results import FAILED, PASSED, UNJUDGED, Report, Result
from llamacancel.conformance.scenarios import SCENARIOS

from . import fakes
from .suite import report_of


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*arguments]))


@pytest.fixture
def url() -> Iterator[str]:
    """A fake server that runs in real time, but fast, in a thread."""

    class Fast(fakes.Server):
        """Ten times as fast as the others."""

        word = fakes.WORD / 10

        async def _pass(self, job: fakes.Job, seconds: float) -> None:
            await super()._pass(job, seconds / 10 if job.phase == "generation" else seconds)

    loop = asyncio.new_event_loop()
    ready: list[str] = []
    up, down = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with Fast().serving() as target:
            ready.append(f"http://{target.netloc}/v1")
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    up.wait(30)
    yield ready[0]
    loop.call_soon_threadsafe(down.set)
    thread.join(30)
    loop.close()


def test_the_command_prints_a_table_and_writes_three_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / "deep" / f"out.{name}" for name in ("json", "junit", "picture")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    status = command("--url", url, "--prefill", "0.2", "--only", "queued-hang-up", "--only", "retry-answer", *options)
    printed = capsys.readouterr()
    found = json.loads(files["json"].read_text())
    assert [entry["name"] for entry in found["scenarios"]] == ["queued-hang-up", "retry-answer"]
    assert status == (1 if found["counts"][FAILED] else 0)
    for entry in found["scenarios"]:
        assert re.search(rf"^{entry['name']} +{entry['outcome']}", printed.out, re.MULTILINE)
    assert "words takes" in printed.err
    assert ElementTree.fromstring(files["picture"].read_text()).tag.endswith("svg")
    assert len(ElementTree.fromstring(files["junit"].read_bytes()).findall(".//testcase")) == 2


def test_a_server_that_is_not_there_gives_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert command("--url", f"http://127.0.0.1:{free.getsockname()[1]}/v1") == 2
    printed = capsys.readouterr()
    assert "no connection" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://192.0.2.1:8080/v1"], "--i-own-this-server"),
        (["--url", "localhost:8080"], "not a URL"),
        ([], "--url is needed"),
        (["--url", "http://127.0.0.1:1/v1", "--only", "nonsense"], "no scenario nonsense"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    assert said in capsys.readouterr().err


def test_the_list_names_every_scenario_and_its_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--list") == 0
    listed = " ".join(capsys.readouterr().out.split())
    for scenario in SCENARIOS.values():
        assert f"{scenario.name} {scenario.claim}" in listed


def test_the_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamacancel.conformance", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "for servers on this machine" in " ".join(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--slots", "0"], ["--prefill", "-1"], ["--rounds", "none"], ["--grace", "nan"]])
def test_numbers_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--url", "http://127.0.0.1:1/v1", *arguments)
    assert arguments[0] in capsys.readouterr().err


REPORT = Report(
    "http://127.0.0.1:1/v1",
    results=[
        Result("one", "It is so.", PASSED, figures={"seconds": 1.23456, "nothing": None}, seconds=2.0),
        Result("two", "It is <so>.", FAILED, "'survivor' & others\x00 died", {"rounds": 3}, 1.0, (Lane("l"),)),
        Result("three", "It is so, too.", UNJUDGED, "it has none"),
    ],
)


def test_the_table_has_outcome_reason_and_figures() -> None:
    assert table_row(REPORT.results[0]).split() == ["one", "passed", "2.0", "seconds", "1.23"]
    assert "'survivor' & others" in table_row(REPORT.results[1])
    assert summary(REPORT).endswith("1 passed, 1 failed, 1 could not be judged")


def test_junit_counts_failures_and_skips_what_was_not_judged() -> None:
    suite = ElementTree.fromstring(as_junit(REPORT).encode()).find("testsuite")
    assert suite is not None
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    failure = suite.find("testcase[@name='two']/failure")
    assert failure is not None
    assert failure.get("message") == "'survivor' & others died"
    assert suite.find("testcase[@name='three']/skipped") is not None


def test_json_holds_everything() -> None:
    found = json.loads(as_json(REPORT))
    assert found["counts"] == {PASSED: 1, FAILED: 1, UNJUDGED: 1}
    assert found["scenarios"][0]["figures"]["seconds"] == 1.23456
    assert found["scenarios"][1]["lanes"] == [{"name": "l", "spans": [], "marks": []}]


def test_the_picture_has_a_band_for_each_scenario() -> None:
    words = [text.text for text in ElementTree.fromstring(as_picture(REPORT)).iter("{http://www.w3.org/2000/svg}text")]
    assert {"one", "two", "three", PASSED, FAILED, UNJUDGED} <= set(words)


def test_a_server_that_answers_nobody_undisturbed_is_not_judged() -> None:
    class Deaf(fakes.Server):
        """Never answers two at a time."""

        async def _pass(self, job: fakes.Job, seconds: float) -> None:
            await super()._pass(job, seconds)
            for other in self.others(job, "generation"):
                other.end("busy", dropped=True)

    report = report_of(Deaf, ["queued-hang-up"], slots=2)
    assert [result.outcome for result in report.results] == [UNJUDGED, UNJUDGED]
    assert "does not answer reliably" in report.results[1].why

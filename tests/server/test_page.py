"""The live page: its files, and what somebody sees who opens it in a browser."""

from __future__ import annotations

import contextlib
import importlib.resources
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.server.page import routes as live

from .served import PATIENCE, Served, any_step, eventually, greedy, new_id, serving, short_of_memory, text_of, tokens

ROOT = Path(__file__).resolve().parents[2]
PAGE = importlib.resources.files("llamacancel.server") / "page"
COMPLETIONS = "/v1/completions"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e&amp;"

# -- the files


def names() -> list[str]:
    return sorted(file.name for file in PAGE.iterdir() if file.is_file() and not file.name.endswith(".py"))


@pytest.mark.parametrize("name", names())
def test_each_file_of_the_page_is_served_with_its_type_and_a_strict_policy(llama: Served, name: str) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    answer = llama.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (PAGE / name).read_bytes()
    assert answer.headers["content-type"].partition(";")[0] == types[PurePosixPath(name).suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"


def test_the_page_itself_is_at_the_root(llama: Served) -> None:
    assert llama.get("/").content == (PAGE / "index.html").read_bytes()
    assert (
        llama.get("/").headers["content-security-policy"]
        == llama.get("/page/app.js").headers["content-security-policy"]
    )


def test_a_browser_that_has_a_file_is_not_sent_it_again(llama: Served) -> None:
    tag = llama.get("/page/app.js").headers["etag"]
    again = llama.get("/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert llama.get("/page/app.js", headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2flive.py", "%2e%2e%2flive.py", "__init__.py"])
def test_nothing_else_is_served_beside_them(llama: Served, name: str) -> None:
    assert llama.get(f"/page/{name}").status_code == 404


@pytest.mark.parametrize("name", names())
def test_the_page_takes_nothing_from_elsewhere(name: str) -> None:
    found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", (PAGE / name).read_text())
    assert [each for each in found if each != "http://www.w3.org/2000/svg"] == []


@pytest.mark.parametrize("name", [name for name in names() if name.endswith(".js")])
def test_scripts_set_text_and_never_html(name: str) -> None:
    text = (PAGE / name).read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    for other in re.findall(r'from "\./([^"]+)"', text):
        assert other in names()


def test_scripts_and_styles_are_in_files_of_their_own() -> None:
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    for name in re.findall(r'(?:src|href)="page/([^"]+)"', text):
        assert name in names()


def test_every_file_of_the_page_is_known_and_none_is_missing() -> None:
    assert {"/", *(f"/page/{name}" for name in names())} == live.PATHS


def test_a_wheel_has_the_page_in_it() -> None:
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert "src/llamacancel" in build["wheel.packages"] if "wheel.packages" in build else build["wheel"]["packages"]
    excluded = build["wheel"]["exclude"] if "wheel" in build else build["wheel.exclude"]
    for name in names():
        file = PurePosixPath("llamacancel/server/page") / name
        assert not [pattern for pattern in excluded if file.match(pattern)], file


# -- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver")

WATCH = """
window.broken = [];
document.addEventListener("securitypolicyviolation", (event) => window.broken.push(event.violatedDirective));
window.addEventListener("error", (event) => window.broken.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => window.broken.push(String(event.reason)));
"""
ROW = """
return [...document.querySelectorAll("#lanes .lane")].filter(
  (row) => row.querySelector(".id").textContent === arguments[0]).map((row) => ({
    state: row.dataset.state, end: row.dataset.end ?? null, fate: row.querySelector(".fate").innerText,
    bars: [...row.querySelectorAll(".bar")].map((bar) => bar.classList[1]),
    wide: [...row.querySelectorAll(".bar")].every((bar) => bar.getBoundingClientRect().width > 0),
    label: row.querySelector(".track").getAttribute("aria-label"),
    marks: row.querySelectorAll(".end svg").length,
  }))[0] ?? null
"""
BUTTON = """
return [...document.querySelectorAll("#lanes .lane")].find(
  (row) => row.querySelector(".id").textContent === arguments[0]).querySelector("button")
"""


class Browser:
    """A headless Chromium, and what a person would do in it."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(argument)
        options.add_argument("--window-size=1280,1400")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver: Any = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, name: str) -> str:
        text: str = self.run("return document.getElementById(arguments[0]).innerText", name)
        return text

    def row(self, request_id: str) -> Any:
        return self.run(ROW, request_id)

    def wait_row(self, request_id: str, is_so: Callable[[Any], bool] = bool) -> Any:
        found: list[Any] = []

        def there() -> bool:
            found[:] = [self.row(request_id)]
            return found[0] is not None and is_so(found[0])

        eventually(there, f"the lane of {request_id}")
        return found[0]

    def press_cancel(self, request_id: str) -> Any:
        button = self.run(BUTTON, request_id)
        button.click()
        return button

    def is_connection(self, name: str) -> bool:
        return bool(self.run("return document.body.dataset.connection") == name)

    def shown(self, name: str) -> bool:
        return bool(self.run("return document.getElementById(arguments[0]).checkVisibility()", name))

    def complaints(self) -> list[str]:
        """What the console holds, and what the page broke."""
        logged = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "DEBUG"]
        return logged + list(self.run("return window.broken"))

    def close(self) -> None:
        self.driver.quit()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser without any page, whose console nobody has written to."""
    chromium.driver.get_log("browser")
    yield chromium
    chromium.open("about:blank")


class Wire:
    """A way to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._whole = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset all connections, and refuse others until `mend()`."""
        with self._lock:
            self._whole = False
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    each.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def mend(self) -> None:
        with self._lock:
            self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._whole:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        one.close()


@in_a_browser
def test_the_page_shows_what_runs_and_waits_and_its_button_cancels_one_alone(
    llama: Served, browser: Browser, known_text: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    body, alone = known_text(llama, 40, 91, 12)
    kept, dropped, waiting = new_id("kept"), new_id("dropped"), new_id("waiting")
    browser.open(f"{llama.url}/#key=operator")
    eventually(lambda: browser.is_connection("live"), "the connection")
    answers: dict[str, Any] = {}

    def cancels() -> int:
        found = re.search(r"of (\d+) cancel", browser.text("worst"))
        return int(found[1]) if found else 0

    cancels_before = cancels()

    def ask(name: str, content: Any) -> threading.Thread:
        def post() -> None:
            answers[name] = llama.post(COMPLETIONS, content, headers={"X-Request-Id": name})

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        llama.wait_known(name)
        return thread

    def both_write(now: Any) -> bool:
        states = {view.id: view.state for view in now.active}
        return states.get(kept) == states.get(dropped) == "decode"

    with llama.held(any_step) as hold:
        threads = [ask(kept, body), ask(dropped, greedy(tokens(llama, 40, 92), 400))]
        hold.then(both_write)
        threads.append(ask(waiting, {**greedy(tokens(llama, 30, 93), 4), "priority": 3}))

        for name in (kept, dropped):
            lane = browser.wait_row(name, lambda row: row["state"] == "decode")
            assert {"prefill", "decode"} <= set(lane["bars"])
            assert lane["wide"]
            assert "writes" in lane["fate"]
        lane = browser.wait_row(waiting)
        assert lane["state"] == "queued"
        assert lane["bars"] == ["queued"]
        eventually(lambda: waiting in browser.text("queue"), "the queue")
        assert browser.text("busy") == "2"
        assert browser.text("waiting") == "1"
        slots = browser.text("slots")
        assert kept in slots
        assert dropped in slots

        button = browser.press_cancel(dropped)
        assert button.text.startswith("Cancelling")
        assert button.get_attribute("aria-disabled") == "true"
        eventually(lambda: llama.group(dropped).works[0].generation._token.cancelled, "the cancel")
        hold.release()

    lane = browser.wait_row(dropped, lambda row: row["end"] is not None)
    latency = llama.wait_finished(dropped).cancel_latency
    assert latency is not None
    assert lane["end"] == "cancelled"
    assert re.search(r"cancelled\s+[\d.]+ (µs|ms|s)\b", lane["fate"]), lane
    assert lane["marks"] == 1
    for thread in threads:
        thread.join(PATIENCE)
    assert answers[dropped].status_code == 499
    assert text_of(answers[kept]) == alone, "the neighbour never noticed"
    assert answers[waiting].status_code == 200
    assert browser.wait_row(kept, lambda row: row["end"] is not None)["end"] in ("length", "stop")
    eventually(lambda: cancels() == cancels_before + 1, "the count of cancels")
    eventually(lambda: dropped in browser.text("news"), "the word to screen readers")
    assert browser.complaints() == []


@in_a_browser
def test_who_waits_for_memory_is_shown_so(exact_model: Callable[[str], lc.Model], browser: Browser) -> None:
    with short_of_memory(exact_model("llama")) as (served, waiting):
        browser.open(served.url)
        lane = browser.wait_row(waiting)
        assert lane["state"] == "queued"
        assert "waits for memory" in lane["fate"]
        eventually(lambda: "waits for memory" in browser.text("queue"), "the queue")
        assert browser.complaints() == []


@in_a_browser
def test_a_client_that_hangs_up_in_the_queue_is_shown_so(llama: Served, browser: Browser) -> None:
    browser.open(llama.url)
    eventually(lambda: browser.is_connection("live"), "the connection")
    ids = [new_id("line") for _ in range(3)]
    with llama.held(any_step) as hold:
        connections = []
        for name in ids:
            connections.append(llama.send(COMPLETIONS, greedy("Go on", 3), name))
            llama.wait_known(name)
        browser.wait_row(ids[2], lambda row: row["state"] == "queued")
        connections[2].close()
        lane = browser.wait_row(ids[2], lambda row: row["end"] is not None)
        assert lane["end"] == "hung-up"
        assert "hung up" in lane["label"]
        assert browser.row(ids[0])["state"] != "finished"
        hold.release()
        for name in ids[:2]:
            browser.wait_row(name, lambda row: row["end"] == "length")
    for connection in connections:
        connection.close()
    assert browser.complaints() == []


@in_a_browser
def test_a_hostile_name_is_shown_as_text_and_can_be_cancelled(llama: Served, browser: Browser) -> None:
    browser.open(f"{llama.url}/#key=operator")
    eventually(lambda: browser.is_connection("live"), "the connection")
    hostile = HOSTILE.replace("/", "|")
    with llama.held(any_step) as hold:
        generation = llama.engine.submit("Go on", max_tokens=400, request_id=hostile)
        browser.wait_row(hostile)
        assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
        browser.press_cancel(hostile)
        hold.release()
        assert generation.wait(PATIENCE)
    lane = browser.wait_row(hostile, lambda row: row["end"] is not None)
    assert lane["end"] == "cancelled"
    with llama.held(any_step) as hold:
        named = llama.engine.submit("Go on", max_tokens=400, request_id=new_id("reason"))
        browser.wait_row(named.id)
        assert named.cancel(HOSTILE)
        hold.release()
    assert HOSTILE in browser.wait_row(named.id, lambda row: row["end"] is not None)["fate"].replace("\n", " ")
    assert "taken" not in browser.driver.title
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.complaints() == []


@in_a_browser
def test_the_page_says_that_the_stream_was_cut_and_connects_again(llama: Served, browser: Browser) -> None:
    with contextlib.closing(Wire(llama.port)) as wire:
        browser.open(wire.url)
        eventually(lambda: browser.is_connection("live"), "the connection")
        before = new_id("before")
        llama.post(COMPLETIONS, greedy("Go on", 3), headers={"X-Request-Id": before})
        browser.wait_row(before, lambda row: row["end"] is not None)
        seen = int(browser.text("seen").split()[0])
        wire.cut()
        eventually(lambda: "connection lost" in browser.text("connection"), "the loss")
        assert browser.is_connection("lost")
        meanwhile = new_id("meanwhile")
        llama.post(COMPLETIONS, greedy("Go on", 3), headers={"X-Request-Id": meanwhile})
        assert browser.row(meanwhile) is None
        wire.mend()
        eventually(lambda: browser.is_connection("live"), "the connection again")
        browser.wait_row(meanwhile, lambda row: row["end"] is not None)
        assert browser.row(before) is not None
        assert int(browser.text("seen").split()[0]) == seen + 1, "nothing is counted twice"
        after = new_id("after")
        llama.post(COMPLETIONS, greedy("Go on", 3), headers={"X-Request-Id": after})
        browser.wait_row(after, lambda row: row["end"] is not None)
        assert [each for each in browser.complaints() if "net::ERR_" not in each] == []


@in_a_browser
def test_the_page_asks_for_a_key_once_and_keeps_it_for_the_tab(
    exact_model: Callable[[str], lc.Model], browser: Browser
) -> None:
    app = {"api_keys": ["a client's"], "operator_key": "open sesame"}
    with serving(exact_model("llama"), app=app) as served:
        browser.open(served.url)
        eventually(lambda: browser.shown("key-form"), "the question for the key")
        assert not browser.shown("content")

        def give(key: str) -> None:
            field = browser.driver.find_element("id", "key")
            field.send_keys(key)
            field.submit()

        give("wrong")
        eventually(lambda: "does not take that key" in browser.text("key-words"), "the refusal")
        give("open sesame")
        eventually(lambda: browser.is_connection("live"), "the connection")
        assert not browser.shown("key-form")
        assert "Authorization" in browser.text("curl")
        assert "open sesame" not in browser.run("return document.documentElement.outerHTML")
        browser.driver.refresh()
        eventually(lambda: browser.is_connection("live"), "the connection after a reload")
        with served.held(any_step) as hold:
            generation = served.engine.submit("Go on", max_tokens=400, request_id=new_id("keyed"))
            browser.wait_row(generation.id)
            browser.press_cancel(generation.id)
            hold.release()
            assert generation.wait(PATIENCE)
        assert generation.finish_reason == "cancelled"
        assert [each for each in browser.complaints() if "401" not in each] == []


@in_a_browser
def test_an_empty_page_tells_how_to_send_the_first_request(
    exact_model: Callable[[str], lc.Model], browser: Browser
) -> None:
    with serving(exact_model("llama")) as served:
        browser.open(served.url)
        eventually(lambda: browser.shown("empty"), "the advice")
        assert f"curl -N {served.url}/v1/completions" in browser.text("curl")
        browser.driver.find_element("id", "copy").click()
        eventually(lambda: browser.text("copy") == "Copied", "the copy")
        name = new_id("first")
        served.post(COMPLETIONS, greedy("Once upon a time", 3), headers={"X-Request-Id": name})
        browser.wait_row(name)
        assert not browser.shown("empty")
        assert browser.complaints() == []


@in_a_browser
def test_a_paused_picture_stands_still_and_goes_on(llama: Served, browser: Browser) -> None:
    browser.open(llama.url)
    eventually(lambda: browser.is_connection("live"), "the connection")
    first, second = new_id("pause"), new_id("pause")
    llama.post(COMPLETIONS, greedy("Go on", 3), headers={"X-Request-Id": first})
    browser.wait_row(first, lambda row: row["end"] is not None)
    button = browser.driver.find_element("id", "pause")
    button.send_keys(" ")  # by keyboard
    assert button.get_attribute("aria-pressed") == "true"
    seen = int(browser.text("seen").split()[0])
    llama.post(COMPLETIONS, greedy("Go on", 3), headers={"X-Request-Id": second})
    eventually(lambda: int(browser.text("seen").split()[0]) == seen + 1, "the count, which goes on")
    assert browser.row(second) is None
    button.send_keys(" ")
    browser.wait_row(second)
    browser.run("document.querySelector('input[value=\"30\"]').click()")
    browser.wait_row(second)
    assert browser.complaints() == []

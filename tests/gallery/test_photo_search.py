"""Tests examples/photo_search: its calls over HTTP, from many threads, and its page in a real browser."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from browsers import DESK, PHONE, chromium, emulate, too_wide, unreadable
from conftest import ROOT
from gallery_stores import gate_of

from simplexfix.gallery import Gallery
from simplexfix.models import read_identity

Image = pytest.importorskip("PIL.Image", reason="images are read with Pillow")
sys.path.append(str(ROOT / "examples" / "photo_search"))

import prepare  # noqa: E402
from server import LARGEST, Server  # noqa: E402
from service import Service, on_clean_paper  # noqa: E402

ROWS = 4840


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder after two steps of training; `gate.json` passes, `failed.json` is the real gate, which fails."""
    folder = tmp_path_factory.mktemp("photo") / "search"
    prepare.prepare(folder, 2)
    (folder / "gate.json").rename(folder / "failed.json")
    gate = gate_of(*(read_identity(folder / name) for name in ("v0", "v1")))
    (folder / "gate.json").write_text(json.dumps(gate.as_dict()))
    return folder


class Page:
    """A running service and its page, and calls to them."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.service = Service(folder, pause)
        self.server = Server(self.service, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def call(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://{self.host}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
                return answer.status, json.loads(content) if answer.headers.get_content_subtype() == "json" else content
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    def status(self) -> dict[str, Any]:
        return self.call("/status")[1]

    def wait(self, for_what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        limit = time.monotonic() + 60
        while not for_what(status := self.status()):
            assert time.monotonic() < limit, status
            time.sleep(0.02)
        return status

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.service.close()


@pytest.fixture
def serve(prepared: Path, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []
    shutil.copytree(prepared, tmp_path / "search")

    def start(pause: float = 0.0) -> Page:
        pages.append(Page(tmp_path / "search", pause))
        return pages[-1]

    yield start
    for page in pages:
        page.close()


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "png")
    return content.getvalue()


def drawn(page: Page, id_: int) -> bytes:
    return png(255 * (1 - page.service.drawings[id_]))


def stored(page: Page) -> tuple[bytes, bytes]:
    rows = page.service.gallery.read()
    return rows.vectors.tobytes(), rows.versions.tobytes()


def test_a_drawing_finds_itself_on_any_paper(serve) -> None:
    page = serve()
    code, found = page.call("/search", drawn(page, 1234))
    assert (code, found["version"], len(found["hits"])) == (200, 0, 12)
    best = found["hits"][0]
    assert (best["id"], best["version"], best["accepted"]) == (1234, 0, True)
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert best["character"] == page.service.gallery.read([1234]).payload[0]["character"]
    ink = page.service.drawings[1234]
    for paper in (120 - 60 * ink, 20 + 200 * ink):  # dark on grey paper; light on a dark board
        assert page.call("/search", png(paper))[1]["hits"][0]["id"] == 1234
    assert torch.equal(on_clean_paper(torch.tensor([[0.2, 0.2, 0.2, 0.7]])), torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    code, image = page.call("/drawings/1234.png")
    assert (code, image) == (200, drawn(page, 1234))


def test_bad_requests_have_a_clear_answer(serve) -> None:
    page = serve()
    before = stored(page)
    for path, body, headers, code, message in (
        ("/search", b"", {}, 400, "send an image file"),
        ("/search", b"no image", {}, 400, "this is not an image that can be read: give a PNG"),
        ("/search", drawn(page, 0)[:60], {}, 400, "this is not an image that can be read"),
        ("/search", png(np.full((9, 9), 77)), {}, 400, "nothing is drawn on this image"),
        ("/search", b"x", {"Content-Length": str(LARGEST + 1)}, 413, "an image may have 8 MB"),
        ("/search", b"x", {"Content-Length": "-1"}, 411, "Content-Length must say how long"),
        ("/search", drawn(page, 0), {"Origin": "http://elsewhere.example"}, 403, "requests come from the page itself"),
        ("/rollback", b"", {}, 409, "there is no version to roll back to"),
        ("/retire", b"", {}, 404, "there is no such call"),
        ("/drawings/4840.png", None, {}, 404, "there is no such page"),
        ("/drawings/../page.js", None, {}, 404, "there is no such page"),
        ("/server.py", None, {}, 404, "there is no such page"),
    ):
        assert page.call(path, body, **headers)[0] == code, path
        assert message in page.call(path, body, **headers)[1], path
    assert page.call("/search", drawn(page, 0), Origin=f"http://{page.host}")[0] == 200
    assert stored(page) == before


def test_a_failed_gate_is_reported_and_changes_nothing(serve, tmp_path) -> None:
    (tmp_path / "search" / "failed.json").replace(tmp_path / "search" / "gate.json")
    page = serve()
    code, message = page.call("/upgrade", b"")
    assert (code, page.status()["serving"]) == (409, 0)
    assert "did not pass the gate: gain of the new queries on the old gallery fail" in message


def test_searches_work_during_upgrade_rollback_and_restart(serve) -> None:
    page = serve(pause=0.01)
    before = stored(page)
    ids = range(7, ROWS, 400)

    def search(id_: int) -> bool:
        code, found = page.call("/search", drawn(page, id_))
        return (code, found["version"], len({hit["id"] for hit in found["hits"]})) == (200, 1, 12)

    with ThreadPoolExecutor(4) as pool:
        assert page.call("/upgrade", b"")[1]["running"]
        assert page.call("/upgrade", b"") == (409, "the old vectors are being replaced already")
        assert all(pool.map(search, ids))
    page.wait(lambda status: status["stale"] < ROWS - 64)
    code, status = page.call("/stop", b"")
    assert (code, status["running"], status["serving"]) == (200, False, 1)
    assert 0 < status["stale"] < ROWS
    page.close()
    again = serve()  # stands for another process
    assert again.status()["stale"] == status["stale"]
    assert again.call("/upgrade", b"")[0] == 200
    again.wait(lambda status: not status["stale"] and not status["running"])
    found = again.call("/search", drawn(again, 55))[1]
    assert (found["version"], found["hits"][0]["id"], found["hits"][0]["version"]) == (1, 55, 1)
    assert again.call("/rollback", b"")[1]["serving"] == 0
    assert stored(again) == before
    assert again.call("/upgrade", b"")[0] == 200  # and a rollback during a backfill
    assert again.call("/rollback", b"")[1]["running"] is False
    assert stored(again) == before
    with Gallery.open(again.service.gallery.url) as gallery:
        assert gallery.status()["leased"] == 0


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "photo_search"), "serve", "--port", "0", "--folder"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    none = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert none.returncode == 2
    assert "has no gallery: run `prepare` with the same --folder first" in none.stderr
    process = subprocess.Popen([*command, str(prepared)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = process.stdout.readline().split()[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
            assert b'<canvas id="canvas"' in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "stopped; run `serve` again to continue\n"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_page_in_a_browser(serve, tmp_path) -> None:
    """Draws, upgrades, stops, opens an image with a hostile name, rolls back; then checks three layouts."""
    page = serve(pause=0.03)
    evil = tmp_path / "<img src=x onerror=alert(1)>.png"
    evil.write_bytes(drawn(page, 3000))
    (tmp_path / "notes.png").write_text("no image")
    with chromium(tmp_path / "profile") as browser:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(browser, 60, poll_frequency=0.05)

        def text(id_: str) -> str:
            return browser.execute_script("return document.getElementById(arguments[0]).textContent", id_)

        def click(id_: str) -> None:
            wait.until(lambda _: browser.find_element("id", id_).is_enabled())
            browser.find_element("id", id_).click()

        def first() -> str:
            return browser.execute_script("return document.querySelector('#hits img')?.getAttribute('src') ?? ''")

        emulate(browser, DESK)
        browser.get(f"http://{page.host}/")
        wait.until(lambda _: text("serving") == "v0, 180 characters")
        canvas = browser.find_element("id", "canvas")
        ActionChains(browser).move_to_element_with_offset(canvas, -60, -60).click_and_hold().move_by_offset(
            120, 40
        ).move_by_offset(-80, 60).release().perform()
        wait.until(lambda _: len(browser.find_elements("css selector", "#hits li")) == 12)
        assert text("legend").startswith("Searched by v0.")
        click("upgrade")
        wait.until(lambda _: 0 < browser.find_element("id", "progress").get_property("value") < 1)
        wait.until(lambda _: browser.find_elements("css selector", "#hits .badge.new"))  # without a click
        assert text("legend").startswith("Searched by v1.")
        click("stop")
        wait.until(lambda _: "; the backfill is paused" in text("rows"))
        assert text("upgrade") == "Continue"
        browser.find_element("id", "file").send_keys(str(evil))
        wait.until(lambda _: text("query") == f"Searching by {evil.name}.")
        assert first().endswith(".png")
        assert browser.find_elements("css selector", "#query *") == []
        browser.find_element("id", "file").send_keys(str(tmp_path / "notes.png"))
        wait.until(lambda _: "this is not an image that can be read" in text("error"))
        click("rollback")
        wait.until(lambda _: text("serving") == "v0, 180 characters" and first() == "/drawings/3000.png")
        assert text("rows").startswith("4840 vectors are by v0, 0 by v1")
        asked = [
            message["params"]["request"]["url"]
            for message in (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert {urlsplit(url).netloc for url in asked if urlsplit(url).scheme.startswith("http")} == {page.host}
        errors = [entry["message"] for entry in browser.get_log("browser")]
        assert [message for message in errors if "400 (Bad Request)" not in message] == []
        for width, scheme in ((DESK, "light"), (DESK, "dark"), (PHONE, "light")):
            emulate(browser, width, scheme)
            browser.execute_script("document.querySelector('details').open = true")
            assert too_wide(browser) == []
            assert unreadable(browser) == []

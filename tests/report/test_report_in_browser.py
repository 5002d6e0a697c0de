"""Tests report.html in a browser: no network, no errors, the numbers of report.json, phone width, dark colours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import DESK, PHONE, chromium, emulate, too_wide, unreadable

from simplexfix.cli import main

pytest.importorskip("matplotlib", reason="pip install 'simplexfix[cli]'")
pytest.importorskip("rich", reason="pip install 'simplexfix[cli]'")
image_module = pytest.importorskip("PIL.Image", reason="pip install 'simplexfix[cli]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module", params=[1, 3, 31])
def report(request, tmp_path_factory) -> Path:
    """Returns the page of this many versions; the page of three has images."""
    folder, labels = tmp_path_factory.mktemp("report"), np.arange(400) % 10
    for t in range(request.param):
        rows = np.random.default_rng(t).normal(size=(400, 16)) + (2 + t / 10) * np.eye(16)[labels]
        rows = rows.astype(np.float32)
        np.savez(
            folder / f"version {t} <&> with a long name.npz",
            query=rows[:250],
            gallery=rows[250:],
            query_labels=labels[:250] + 2**24,
            gallery_labels=labels[250:] % 9 + 2**24,
        )
    flags = ["--out", str(folder / "report")]
    if request.param == 3:
        for part, count in (("query", 250), ("gallery", 150)):
            (folder / part).mkdir()
            for i in range(count):
                image_module.new("RGB", (300, 200) if i % 2 else (28, 28), (i, 90, 200)).save(
                    folder / part / f"{i}.png"
                )
            (folder / f"{part}.txt").write_text("".join(f"{part}/{i}.png\n" for i in range(count)))
        flags += ["--images", str(folder / "query.txt"), "--gallery-images", str(folder / "gallery.txt")]
    assert main(["evaluate", str(folder), *flags]) == 0
    return folder / "report"


def show(browser: Any, report: Path, width: int = DESK, scheme: str = "light") -> None:
    emulate(browser, width, scheme)
    browser.get((report / "report.html").as_uri())
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")


def test_the_page_has_no_errors_and_loads_nothing_else(browser, report) -> None:
    show(browser, report)
    assert browser.get_log("browser") == []
    asked = [
        message["params"]["request"]["url"]
        for message in (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [(report / "report.html").as_uri()]
    policy = browser.execute_script(
        "return document.querySelector('meta[http-equiv=Content-Security-Policy]').getAttribute('content')"
    )
    assert policy.startswith("default-src 'none'")
    assert "http:" not in policy
    assert browser.execute_script("return document.scripts.length") == 0


def test_the_policy_is_in_force(browser, report) -> None:
    """The policy blocks external resources, so the test above could detect them."""
    show(browser, report)
    browser.execute_async_script(
        """const done = arguments[0], image = new Image();
        image.onload = image.onerror = () => done(); image.src = 'http://127.0.0.1:9/x.png';"""
    )
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_images_are_shown_and_have_alternative_texts(browser, report, scheme: str) -> None:
    show(browser, report, scheme=scheme)
    images = browser.execute_script(
        """return Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() =>
        [...document.images].map(i => [i.complete && i.naturalWidth, i.getBoundingClientRect().width, i.alt]))"""
    )
    versions = len(json.loads((report / "report.json").read_text())["versions"])
    assert len(images) > 0 or versions == 1
    for natural, shown, words in images:
        assert natural > 0, words
        assert shown > 0, words
        assert words


def test_the_numbers_are_those_of_the_json(browser, report) -> None:
    show(browser, report)
    content = json.loads((report / "report.json").read_text())
    shown = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('data[id]')].map(d => [d.id, [d.value, d.innerText]]))"
    )
    size = len(content["matrix"])
    expected = {f"C-{i}-{j}": content["matrix"][i][j] for i in range(size) for j in range(i + 1)}
    assert {name: json.loads(value) for name, (value, _) in shown.items() if name.startswith("C-")} == expected
    for name, value in expected.items():
        assert shown[name][1] == (f"{100 * value:.1f}" if size <= 12 else f"{100 * value:.0f}")
    for name in ("AC", "AA", "BC", "FC"):
        assert json.loads(shown[name][0]) == content["criteria"][name]
    if size > 1:
        marks = browser.execute_script("return [...document.querySelectorAll('.heat td.yes')].length")
        assert marks == sum(x is True for row in content["compatible"] for x in row)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_window(browser, report, width: int) -> None:
    show(browser, report, width=width)
    assert too_wide(browser) == []
    # wide elements scroll by themselves and are not cut off
    cut = browser.execute_script(
        """return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth
        && getComputedStyle(e).overflowX !== 'auto').length"""
    )
    assert cut == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser, report, scheme: str) -> None:
    """The contrast of text is at least 4.5 to 1 (WCAG 2.2 AA)."""
    show(browser, report, scheme=scheme)
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(14, 19, 27)") == (scheme == "dark")
    assert unreadable(browser) == []

"""The report in headless Chromium, from file://: it shows hostile text and obeys none of it."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from fastdiff.reporting.builder import build_report
from fastdiff.reporting.text import visible

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


class Browser:
    """A page of Chromium, driven by the DevTools protocol over a pipe (NUL-separated JSON on fds 3 and 4)."""

    def __init__(self, profile: Path):
        read_end, self._out = os.pipe()
        self._in, write_end = os.pipe()
        # out of the way of the 3 and 4 that they become
        theirs_in, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_end, write_end))
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --remote-debugging-pipe "
        flags += "--disable-background-networking --disable-component-update --disable-sync"
        command = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(profile)],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (read_end, write_end, theirs_in, theirs_out):
            os.close(fd)
        self._buffer = b""
        self._next = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and wait for its answer; events that come before are kept."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "Chromium ended"
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path, fragment: str = "", seconds: float = 30) -> float:
        """Load a page and wait until its script is done; the seconds that took."""
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        start = time.monotonic()
        self.send("Page.navigate", url=page.as_uri() + fragment)
        while not self.js("document.documentElement?.dataset.ready === '1'"):
            assert time.monotonic() - start < seconds, self.trouble()
            time.sleep(0.02)
        return time.monotonic() - start

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def trouble(self) -> list[dict[str, Any]]:
        """Exceptions, console output, log entries (which hold CSP violations)."""
        self.js("0")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [e for e in self.events if e["method"] in kinds]

    def requests(self) -> list[str]:
        """URLs that the page asked for."""
        self.js("0")
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def shown_labels(browser: Browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('.card .label')].map((e) => e.textContent)")


@pytest.fixture(scope="module")
def page(make_pair: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_pair(tmp_path_factory.mktemp("page") / "run"))


def test_the_page_asks_for_nothing_and_logs_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.trouble() == []
    assert browser.js("document.title") == "What changed: base → it"
    assert browser.js("document.querySelectorAll('.card').length") == 20
    assert browser.js("document.querySelectorAll('.card .peak').length") == 20 * 3


def test_hostile_text_is_shown_and_does_nothing(browser: Browser, hostile_run: Path, hostile: tuple[str, ...]) -> None:
    path = build_report(hostile_run)
    browser.open(path)
    labels = []
    for _ in range(4):
        labels += shown_labels(browser)
        browser.js("for (const b of document.querySelectorAll('.more')) b.click()")
        browser.js("document.getElementById('p-next').click()")
    assert {visible(text) for text in hostile} <= set(labels)
    for _ in range(3):
        browser.js("document.getElementById('p-previous').click()")
    # every category can be chosen, __proto__ and constructor too
    for category in ("__proto__", "constructor", "<base href=http://127.0.0.1:9/>"):
        browser.js(
            f"[...document.querySelectorAll('button[data-category]')].find((b) => "
            f"b.textContent === {json.dumps(category)}).click()"
        )
        assert browser.js("document.getElementById('f-category').value") == category
        assert browser.js("document.querySelectorAll('.card').length") >= 1
    assert browser.js("window.__pwned") is None
    assert browser.js("document.title").startswith("What changed: ")
    assert browser.js("location.href").startswith(path.as_uri())
    assert browser.js("getComputedStyle(document.body).display") == "block"
    assert browser.requests() == [path.as_uri()]
    assert browser.trouble() == []


def test_a_category_filters_the_latents(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelector('button[data-category=\"refusal\"]').click()")
    labels = shown_labels(browser)
    assert labels
    assert all(label.startswith("refusal: ") for label in labels)
    assert browser.js("document.getElementById('count').textContent") == f"{len(labels)} of 60 latents"
    assert browser.js("document.activeElement.id") == "f-category"


def test_filters_search_and_sort(browser: Browser, page: Path) -> None:
    browser.open(page)
    change = "(id, v) => { const e = document.getElementById(id); e.value = v; "
    change += "e.dispatchEvent(new Event('input', {bubbles: true})) }"
    browser.js(f"({change})('f-side', 'base')")
    sides = "[...document.querySelectorAll('.card .side')].map((e) => e.textContent)"
    assert set(browser.js(sides)) == {"◇ specific to base"}
    browser.js(f"({change})('f-side', '')")
    browser.js(f"({change})('f-sort', '6')")
    numbers = "[...document.querySelectorAll('.card .number')].map((e) => e.textContent)"
    assert browser.js(numbers) == [f"Latent {i}" for i in range(20)]
    browser.js("document.getElementById('p-next').click()")
    assert browser.js(numbers) == [f"Latent {i}" for i in range(20, 40)]
    browser.js(f"({change})('f-search', 'Refusal:')")
    assert all(label.startswith("refusal: ") for label in shown_labels(browser))
    browser.js(f"({change})('f-search', 'no such words')")
    assert shown_labels(browser) == []
    browser.js("document.getElementById('filters').reset()")
    time.sleep(0.1)
    assert len(shown_labels(browser)) == 20
    assert browser.trouble() == []


def cards(browser: Browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('.card .number')].map((e) => e.textContent)")


def count(browser: Browser) -> str:
    return browser.js("document.getElementById('count').textContent")


def follow(browser: Browser, link: str) -> None:
    browser.js(f"document.querySelector({json.dumps(link)}).click()")
    time.sleep(0.1)


def test_a_row_leads_to_its_latents_by_nats_and_their_tokens_in_two_clicks(browser: Browser, page: Path) -> None:
    browser.open(page)
    follow(browser, '#verdict a[href="#row=refusal"]')
    latents = [4 + 12 * k for k in range(5)]
    assert cards(browser) == [f"Latent {latent}" for latent in latents]
    assert count(browser) == "5 latents with most nats in refusal, most first. Reset shows all 60."
    # nats per category, the largest first, that of the row set off; beside it the other measures
    nats = browser.js("[...document.querySelectorAll('.card .nats .own')].map((e) => e.textContent)")
    assert nats == [f"refusal −0.0{5 - k}00" for k in range(5)]
    assert browser.js("document.querySelectorAll('.card .nats')[0].querySelectorAll('.part').length") == 6
    names = browser.js("[...document.querySelector('.card').querySelectorAll('dt')].map((e) => e.textContent)")
    assert {"Δ norm", "ν error", "ν reconstruction", "cosine"} <= set(names)
    assert browser.js("document.querySelectorAll('.card .context .peak').length") == 5 * 3
    # the second click: one of them alone
    follow(browser, f'#verdict a[href="#latent={latents[2]}"]')
    assert cards(browser) == [f"Latent {latents[2]}"]
    assert browser.js("document.querySelectorAll('.card .own').length") == 0
    browser.js("document.getElementById('filters').reset()")
    time.sleep(0.1)
    assert browser.js("location.hash") == "#latents" and len(cards(browser)) == 20
    # the same row again, and once more where the address already says so
    for _ in range(2):
        follow(browser, '#verdict a[href="#row=refusal"]')
        assert len(cards(browser)) == 5
        browser.js("scrollTo(0, 0)")
    assert browser.trouble() == []


def test_a_row_of_two_runs_shows_the_latents_of_each_or_of_both(
    browser: Browser, make_triangulated: Callable[..., Path], tmp_path: Path
) -> None:
    browser.open(build_report(make_triangulated(tmp_path)))
    follow(browser, '#verdict a[href="#row=self-reference&run=simpo"]')
    hrefs = "[...document.querySelectorAll('.card .number')].map((e) => e.getAttribute('href'))"
    assert browser.js(hrefs) == [f"#latent={5 + 12 * k}&run=simpo" for k in range(5)]
    follow(browser, '#verdict a[href="#row=self-reference"]')
    assert browser.js(hrefs) == [f"#latent={5 + 12 * k}&run={name}" for name in ("it", "simpo") for k in range(5)]


def test_rows_of_hostile_names_open_their_own_latents(browser: Browser, hostile_run: Path) -> None:
    path = build_report(hostile_run)
    browser.open(path)
    rows = browser.js("[...document.querySelectorAll('#verdict th a')].map((e) => [e.textContent, e.hash])")
    written = json.loads((hostile_run / "compare/verdict.json").read_text())["comparisons"][0]["rows"]
    # as the made-up run plants them, every 16th of 80 cards
    wanted = {
        visible(row["category"]): [f"Latent {(i + 16 * k) % 80}" for k in range(5)] for i, row in enumerate(written)
    }
    assert {name for name, _ in rows} == set(wanted)
    for name, fragment in rows:
        browser.js(f"location.hash = {json.dumps(fragment)}")
        time.sleep(0.05)
        assert cards(browser) == wanted[name]
        assert count(browser).startswith(f"5 latents with most nats in {name}, most first.")
    assert browser.js("window.__pwned") is None
    assert browser.requests() == [path.as_uri()]
    assert browser.trouble() == []


def test_a_latent_without_a_category_says_so(browser: Browser, page: Path) -> None:
    browser.open(page, "#latent=12")
    assert (
        browser.js("document.querySelector('.card .meta').textContent") == "no one category stands out, by baseline-1"
    )


def test_a_latent_can_be_linked_to(browser: Browser, make_triangulated: Callable[..., Path], tmp_path: Path) -> None:
    path = build_report(make_triangulated(tmp_path))
    browser.open(path, "#latent=7&run=simpo")
    assert browser.js("document.querySelector('.card .number').getAttribute('href')") == "#latent=7&run=simpo"
    assert browser.js("document.querySelectorAll('.card').length") == 1
    browser.js("location.hash = '#latent=99999'")
    time.sleep(0.1)
    assert "no card" in browser.js("document.getElementById('count').textContent")


def test_values_can_be_read_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    context = "document.querySelector('.context')"
    browser.js(f"{context}.focus()")
    peak = browser.js(f"{context}.querySelector('.peak').dataset.value")
    assert browser.js("document.querySelector('.value').textContent").endswith(f" {peak}")
    browser.js(f"{context}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}}))")
    now = browser.js(f"{context}.querySelector('.cur').dataset.value")
    assert browser.js("document.querySelector('.value').textContent").endswith(f" {now}")


def test_downloads_hold_the_files(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.js("document.querySelector('button[data-file=\"latents.csv\"]').click()")
    wanted = (page.parent / "latents.csv").read_bytes()
    deadline = time.monotonic() + 10
    while not (saved := tmp_path / "latents.csv").exists() or saved.read_bytes() != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_scrolls_sideways_on_a_phone(browser: Browser, page: Path, hostile_run: Path) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    for path in (page, build_report(hostile_run)):
        browser.open(path)
        assert browser.js("document.documentElement.scrollWidth") <= 400
    browser.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, page: Path, scheme: str) -> None:
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(page)
    # WCAG contrast of the text colour on the colours beneath it, blended
    worst = browser.js("""
      (() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const paint = (colours) => {
          canvas.clearRect(0, 0, 1, 1);
          for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
          const light = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
        };
        let worst = [99, ''];
        const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
          const e = walker.currentNode.parentElement, style = getComputedStyle(e);
          const skipped = e.closest('script, style, noscript, option, title, :disabled');
          if (!walker.currentNode.data.trim() || skipped || !e.getClientRects().length) continue;
          const grounds = [];
          for (let p = e; p; p = p.parentElement) grounds.unshift(getComputedStyle(p).backgroundColor);
          const ground = paint(grounds);
          const ink = paint([...grounds, e.namespaceURI.endsWith('svg') ? style.fill : style.color]);
          const contrast = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
          if (contrast < worst[0]) worst = [contrast, `${e.tagName}.${e.className.baseVal ?? e.className}`];
        }
        return worst;
      })()
    """)
    browser.send("Emulation.setEmulatedMedia", features=[])
    assert worst[0] >= 4.5, worst


@pytest.mark.slow
def test_two_thousand_cards_stay_within_the_budget(
    browser: Browser, make_pair: Callable[..., Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    texts = tuple(rng.permutation([f" w{i}" for i in range(8009)]).tolist())
    path = build_report(make_pair(tmp_path / "run", sizes=(4096, 2000, 8, 49), texts=texts))
    assert path.stat().st_size <= 10e6
    assert browser.open(path) <= 3
    start = time.monotonic()
    browser.js(
        "(() => { const e = document.getElementById('f-search'); e.value = 'w77'; "
        "e.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )
    assert time.monotonic() - start <= 2
    assert browser.trouble() == []

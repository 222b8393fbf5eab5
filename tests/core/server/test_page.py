"""The page at /, as it is served, and in a browser where there is one."""

import base64
import hashlib
import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infopt.core.server.page import SCRIPTS, page

ROOT = Path(__file__).parents[3]
WEB = ROOT / "core/server/web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [
    name
    for name, found in (("chromium", CHROMIUM), ("playwright", find_spec("playwright")))
    if not found
]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def test_it_is_served_with_a_strict_policy(server: Any) -> None:
    told = server.get("/")
    assert told.status_code == 200 and told.text == page()[0]
    assert told.headers["content-type"] == "text/html; charset=utf-8"
    assert told.headers["cache-control"] == "no-cache"
    assert told.headers["x-content-type-options"] == "nosniff"
    policy = told.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in " ".join(policy) and "*" not in " ".join(policy)
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", told.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy


def test_nothing_in_it_is_elsewhere() -> None:
    html, _ = page()
    assert set(re.findall(r"\w+://[^'\" >]*", html)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\ssrc=|\son\w+=|\sstyle=|@import|url\(|innerHTML|\beval\b", html)
    assert re.findall(r'href="([^"]{5})', html) == ["data:"]
    assert "/* style */" not in html and "/* script */" not in html


def test_what_can_be_filled_in_is_labelled() -> None:
    html, _ = page()
    fields = re.findall(r'<(?:input|textarea) id="(\w+)"', html)
    assert len(fields) == 7 and set(fields) == set(re.findall(r'<label for="(\w+)"', html))
    assert 'type="password"' in html and 'aria-live="polite"' in html and 'role="alert"' in html


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_aa(scheme: str) -> None:
    style = (WEB / "page.css").read_text()
    colours = style.split("prefers-color-scheme: dark")[scheme == "dark"]
    found = {name: luminance(c) for name, c in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", colours)}

    def contrast(one: str, other: str) -> float:
        low, high = sorted((found[one], found[other]))
        return (high + 0.05) / (low + 0.05)

    texts = {"ink": ("paper", "card", "mine", "shade"), "dim": ("paper", "card", "shade")}
    texts |= {"on-accent": ("accent",), "bad": ("bad-paper",), "card": ("ink",)}
    shapes = {"accent": ("card", "paper"), "edge": ("card", "paper")}
    shapes |= dict.fromkeys(("good", "warn", "bad"), ("card",))
    for pairs, least in ((texts, 4.5), (shapes, 3.0)):
        for one, others in pairs.items():
            assert all(contrast(one, other) >= least for other in others), (one, others)


def test_its_parts_are_shipped() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = config["tool"]["setuptools"]["package-data"]["*"]
    parts = {path.name for path in WEB.iterdir()}
    assert parts == {"page.html", "page.css", *SCRIPTS}
    for part in parts:
        assert any(fnmatch(f"web/{part}", pattern) for pattern in shipped)
        assert len((WEB / part).read_text().splitlines()) <= 400


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def run(browser: Any) -> Iterator[Callable[..., Any]]:
    """Evaluate an expression beside what a script defines."""
    tab = browser.new_page()

    def run(script: str, expression: str, given: Any = None) -> Any:
        source = (WEB / script).read_text()
        return tab.evaluate(f"async (given) => {{ {source}\n return {expression}; }}", given)

    yield run
    tab.close()


@needs_browser
def test_events_are_read_whatever_the_pieces(run: Callable[..., Any]) -> None:
    text = (
        'data: {"a": "Grüße 世界 🦊"}\n\n: a comment\r\n\r\ndata:one\r\ndata: two\r\nid: 3\r\n\r\n'
        "data: cr\r\rdata\n\nevent: x\n\ndata:  spaced\n\ndata: [DONE]\n\ndata: never ended\n"
    )
    read = """(async () => {
        const bytes = new TextEncoder().encode(given.text);
        const found = [];
        let at = 0;
        const stream = new ReadableStream({ pull(control) {
            if (at >= bytes.length) return control.close();
            control.enqueue(bytes.slice(at, at += given.size));
        }});
        for await (const data of eventsOf(stream)) found.push(data);
        return found;
    })()"""
    wanted = ['{"a": "Grüße 世界 🦊"}', "one\ntwo", "cr", " spaced", "[DONE]"]
    for size in (1, 2, 3, 5, 8, 1000):
        assert run("client.js", read, {"text": text, "size": size}) == wanted


@needs_browser
def test_quantiles_are_prometheuss(run: Callable[..., Any]) -> None:
    def quantile(share: float, before: list[Any], now: list[Any]) -> Any:
        given = {"share": share, "before": before, "now": now}
        revived = (
            "quantile(given.share, ...[given.before, given.now].map("
            "(rows) => rows.map(([bound, count]) => [bound ?? Infinity, count])))"
        )
        return run("figures.js", revived, given)

    before = [[0.1, 5], [0.5, 5], [1, 6], [None, 6]]
    now = [[0.1, 5], [0.5, 15], [1, 26], [None, 26]]
    assert [quantile(share, before, now) for share in (0.25, 0.5, 0.75)] == pytest.approx(
        [0.3, 0.5, 0.5 + 0.5 * 5 / 10]
    )
    assert quantile(0.5, [], [[0.2, 4], [None, 4]]) == pytest.approx(0.1)
    assert quantile(0.95, before, [*now[:3], [None, 1000]]) == 1
    assert all(value != value for value in (quantile(0.5, now, now), quantile(0.5, [], [])))


@needs_browser
def test_metrics_are_read_as_prometheus_reads_them(server: Any, run: Callable[..., Any]) -> None:
    server.post({"model": "tiny", "prompt": "a", "max_tokens": 4})
    text = server.get("/metrics").text
    wanted: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            wanted[sample.name] = wanted.get(sample.name, 0) + sample.value
    sums = "((all) => [...all.keys()].map((name) => [name, total(all, name)]))(parseMetrics(given))"
    assert dict(run("figures.js", sums, text)) == pytest.approx(wanted)
    found = run("figures.js", "lookAt(given, 1)", text)
    assert all(found[key] is not None and found[key] == found[key] for key in found), found
    assert found["blocksTotal"] == 128 and found["ttft"][-1][1] >= 1


KEYS = "sk-quick-123 name=quick\nsk-slow-1234 name=slow rate=1\n"
IDLE_SECONDS = 6


@pytest.fixture(scope="module")
def keyed(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    file = tmp_path_factory.mktemp("page") / "keys"
    file.write_text(KEYS)
    server = launch(api_key_file=str(file), max_model_len=2000, max_idle=IDLE_SECONDS).ready()
    yield server
    assert server.stop() == 0


class Reader:
    """Somebody with a keyboard before the page; `requests` and `problems` are what the tab did."""

    def __init__(self, browser: Any, url: str) -> None:
        self.url = url
        self.tab = browser.new_context(viewport={"width": 1200, "height": 800}).new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", self._heard)
        self.tab.goto(url)

    def _heard(self, message: Any) -> None:
        # Chromium itself notes every refusal; the page has to say it in words.
        if message.type in ("error", "warning") and "the server responded" not in message.text:
            self.problems.append(message.text)

    def text(self, selector: str) -> str:
        found: str = self.tab.locator(selector).last.text_content()
        return found

    def value(self, name: str) -> str:
        return self.text(f"[data-value='{name}']")

    def focused(self) -> str:
        found: str = self.tab.evaluate("document.activeElement.id")
        return found

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def reach(self, name: str, key: str = "Tab") -> None:
        """Go to an element by its id; the focus has to be seen all the way."""
        for _ in range(20):
            if self.focused() == name:
                return
            self.press(key)
            assert self.tab.evaluate(
                "[document.activeElement, document.activeElement.closest('form')].some("
                "(e) => e && (getComputedStyle(e).outlineStyle !== 'none' ||"
                " getComputedStyle(e).boxShadow !== 'none'))"
            )
        raise AssertionError(f"{name} is not reached, but {self.focused()}")

    def fill(self, name: str, text: str, key: str = "Tab") -> None:
        self.reach(name, key)
        self.press("Control+A", "Delete")
        self.tab.keyboard.type(text)

    def say(self, text: str) -> None:
        assert self.focused() == "prompt"
        self.tab.keyboard.type(text)
        self.press("Enter")

    def await_(self, test: Callable[[], Any], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not test():
            assert time.monotonic() < deadline, self.tab.locator("body").inner_text()
            self.tab.wait_for_timeout(30)

    def await_fault(self, words: str, where: str = "#fault") -> None:
        self.await_(lambda: words in self.text(where))
        assert self.tab.locator(where).is_visible()

    def await_end(self) -> None:
        self.await_(lambda: self.tab.locator("#stop").is_hidden())


@needs_browser
@pytest.mark.slow
def test_a_chat_by_keyboard(keyed: Any, browser: Any) -> None:
    reader = Reader(browser, keyed.url)
    let_in(reader)
    stream_and_stop(reader, keyed)
    refuse_for_a_while(reader)
    tell_what_goes_wrong(reader)
    look_away(reader)
    hold_a_phone(reader)
    let_it_sleep(reader, keyed)
    assert reader.problems == []
    allowed = (f"{keyed.url}/", "data:image/svg+xml")
    assert reader.requests and all(url.startswith(allowed) for url in reader.requests)


def let_in(reader: Reader) -> None:
    """A key is asked for, and kept in this tab alone."""
    reader.await_fault("asks for an API key", "#key-fault")
    reader.await_(lambda: reader.focused() == "key")
    reader.tab.keyboard.type("sk-wrong-000")
    reader.press("Enter")
    reader.await_fault("does not know this API key", "#key-fault")
    reader.fill("key", "sk-quick-123")
    reader.press("Enter")
    reader.await_(lambda: reader.focused() == "prompt")
    assert reader.text("#model") == "tiny" and reader.tab.locator(".fault:visible").count() == 0
    kept = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    assert reader.tab.evaluate(kept) == [["sk-quick-123"], [], ""]
    reader.await_(lambda: reader.value("running") == "0")
    assert reader.value("ttft-p50") == reader.value("tpot-p95") == "–"


def stream_and_stop(reader: Reader, server: Any) -> None:
    """An answer comes piece by piece, the panels move, and Stop ends it in the engine."""
    reader.fill("max_tokens", "1900", "Shift+Tab")
    reader.reach("prompt")
    reader.tab.keyboard.type("<b>Hello</b>")
    reader.press("Shift+Enter")
    lengths, running = set(), set()
    reader.say("there")
    assert reader.text(".mine p") == "<b>Hello</b>\nthere"
    assert reader.tab.locator("#messages b").count() == 0

    def moved() -> bool:
        lengths.add(len(reader.text(".answer .text")))
        running.add(reader.value("running"))
        speed = reader.value("speed").replace(",", "")
        return len(lengths) > 3 and "1" in running and speed not in ("–", "0")

    reader.await_(moved, 30)  # it may sleep
    assert reader.tab.get_attribute(".answer", "aria-busy") == "true"
    assert server.health().json()["engine"]["running"] == 1
    reader.reach("stop")
    reader.press("Enter")
    reader.await_end()
    stats = server.await_idle()
    assert stats["tokens"] < 1900 and 'finished_reason="abort"' in server.get("/metrics").text
    told = reader.text(".answer .figures")
    assert re.search(r"\d+ tokens.*[\d,.]+ tokens/s.*first after .+s.*stopped", told), told
    assert reader.focused() == "prompt"
    reader.await_(lambda: reader.value("running") == "0")
    for name in ("ttft-p50", "ttft-p95", "tpot-p50", "tpot-p95", "batch", "hits"):
        assert reader.value(name) != "–"
    assert reader.value("blocks-total") == "128" and reader.text("#state").strip() == "ok"
    drawn = reader.tab.locator("[data-panel='speed'] .line").get_attribute("d")
    assert drawn.startswith("M") and "L" in drawn
    reader.reach("clear")
    reader.press("Enter")
    assert reader.tab.locator(".message").count() == 0 and reader.focused() == "prompt"


def refuse_for_a_while(reader: Reader) -> None:
    """A client that asks too often hears when to ask again, and keeps what it wrote."""
    reader.fill("max_tokens", "4", "Shift+Tab")
    reader.fill("key", "sk-slow-1234")
    reader.press("Enter")
    reader.await_(lambda: reader.focused() == "prompt")
    reader.say("One")
    reader.await_(lambda: "cut off at max tokens" in reader.text(".answer .figures"))
    reader.say("Two")
    reader.await_fault("Too many requests")
    assert re.search(r"Try again in \d+ s\.", reader.text("#fault"))
    assert reader.tab.locator("#prompt").input_value() == "Two"
    assert reader.tab.locator(".message").count() == 2
    reader.fill("temperature", "9", "Shift+Tab")
    reader.reach("prompt")
    reader.press("Enter")
    reader.await_fault("Temperature:")
    reader.fill("temperature", "1", "Shift+Tab")
    reader.fill("prompt", "")


def tell_what_goes_wrong(reader: Reader) -> None:
    """What this server does not do is played to the page."""
    chat = "**/v1/chat/completions"

    def answer(status: int, body: str) -> None:
        reader.tab.unroute(chat)
        reader.tab.route(chat, lambda route: route.fulfill(status=status, body=body))
        reader.fill("prompt", "Well")
        reader.press("Enter")

    def event(**content: Any) -> str:
        return f"data: {json.dumps(content)}\n\n"

    said = event(choices=[{"index": 0, "delta": {"content": "<img src=x>"}}])
    answer(200, said + "data: [DONE]\n\n")
    reader.await_(lambda: reader.text(".answer .text") == "<img src=x>")
    assert reader.tab.locator("#messages img").count() == 0
    answer(200, said + event(error={"message": "the engine died", "code": "engine_error"}))
    reader.await_fault("The engine died.")
    assert "broken off" in reader.text(".answer .figures")
    answer(200, said)
    reader.await_fault("the connection was lost")
    answer(400, json.dumps({"error": {"message": "none", "code": "no_chat_template"}}))
    reader.await_fault("no chat template")
    reader.tab.unroute(chat)
    health, ready = "**/health", "**/ready"
    unwell = json.dumps({"status": "unavailable", "reason": "it died"})
    reader.tab.route(ready, lambda route: route.fulfill(status=503, body='{"status":"restarting"}'))
    reader.tab.route(health, lambda route: route.fulfill(status=503, body=unwell))
    reader.await_(lambda: reader.text("#state").strip() == "restarting")
    reader.tab.unroute(health)
    reader.tab.unroute(ready)
    reader.await_(lambda: reader.text("#state").strip() in ("ok", "asleep"))


def look_away(reader: Reader) -> None:
    """A tab that is hidden asks nothing."""
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    reader.tab.evaluate(hide, True)
    reader.tab.wait_for_timeout(200)
    before = len(reader.requests)
    reader.tab.wait_for_timeout(1500)
    assert len(reader.requests) == before
    reader.tab.evaluate(hide, False)
    reader.await_(lambda: len(reader.requests) >= before + 2)


def hold_a_phone(reader: Reader) -> None:
    """One view at a time, and none wider than the screen."""
    wide = reader.tab.viewport_size
    for width in (320, 390, 800):
        reader.tab.set_viewport_size({"width": width, "height": 700})
        assert reader.tab.evaluate("document.documentElement.scrollWidth") <= width
    reader.tab.set_viewport_size({"width": 320, "height": 700})
    for name in ("live", "settings", "chat"):
        reader.tab.locator(f"[data-show={name}]").press("Enter")
        seen = [each for each in ("chat", "live", "settings") if reader.tab.is_visible(f"#{each}")]
        assert seen == [name]
        assert reader.tab.evaluate("document.documentElement.scrollWidth") <= 320
        assert reader.tab.evaluate(f"document.getElementById('{name}').scrollWidth") <= 320
    reader.tab.set_viewport_size(wide)


def let_it_sleep(reader: Reader, server: Any) -> None:
    """Looking at it wakes no engine."""
    reader.await_(lambda: reader.text("#state").strip() == "asleep", IDLE_SECONDS + 10)
    before = len(reader.requests)
    reader.await_(lambda: len(reader.requests) >= before + 4)
    assert reader.text("#state").strip() == "asleep"
    assert httpx.get(f"{server.url}/ready").json() == {"status": "asleep"}

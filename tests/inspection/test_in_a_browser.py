"""The page in Debian's Chromium: it opens, filters, finds, shows diffs, in both themes, and says
nothing in the console."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dense_merge import Case
from tiny_models import FAMILIES
from viewed_graphs import HOSTILE, by_hand, deep, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = (
    "" if CHROMIUM and DRIVER else "no chromium and chromedriver (apt install chromium-driver)"
)


class Browser:
    """One window. Scripts run as bodies of functions, and may return JSON."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        capabilities = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*arguments, "--no-first-run"]},
        }
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._root += f"/session/{made['sessionId']}"

    def open(self, page: Path, fragment: str = "", *, width: int = 1280, height: int = 800) -> None:
        """Open a page from the disk in a viewport of that size, and wait until it says that it
        is ready."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self._ask("POST", "/url", {"url": "about:blank"})  # else a new fragment loads nothing
        self._ask("POST", "/url", {"url": page.resolve().as_uri() + fragment})
        self.wait("return document.documentElement.dataset.ready === 'true'")

    def run(self, script: str, *arguments: Any) -> Any:
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """Wait until a script returns something true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; {self.errors()}"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def errors(self) -> list[str]:
        """What the console has got since the last call, of level warning or worse."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [item["message"] for item in entries if item["level"] in ("WARNING", "SEVERE")]

    def close(self) -> None:
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, value: Any = None) -> Any:
        body = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self._root + path, body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None, MISSING
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end, "chromedriver does not answer"
            time.sleep(0.05)
        window = Browser(port)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(30)


pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a compiled Llama."""
    folder = tmp_path_factory.mktemp("dump")
    cm = llama.compile({"dump": str(folder)})
    cm(**FAMILIES["llama"].inputs(2, 4), adapter_names=["a0", None])
    return folder / "index.html"


@pytest.fixture(autouse=True)
def _quiet_console(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    assert request.getfixturevalue("window").errors() == []


def text(window: Browser, selector: str) -> str:
    return window.run("return document.querySelector(arguments[0]).textContent", selector)


def test_a_click_on_a_node_says_what_it_is(window: Browser, page: Path) -> None:
    window.open(page, "#graph=0&stage=pack&tab=graph")
    assert window.run("return viewer.stage.name") == "pack"
    # What the eye sees: the middle of a pack in the picture.
    window.run("viewer.picture.reveal(viewer.stage.entries.find((e) => e.mark === 'pack'))")
    assert window.run("return document.getElementById('details').hidden")
    box = window.run("return document.getElementById('picture').getBoundingClientRect().toJSON()")
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for kind in ("mousePressed", "mouseReleased"):
        window.devtools("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    shown = text(window, "#details")
    for fact in ("layers_0_q_proj", "model.layers.0.", "Linear", "modeling_llama.py", "packed"):
        assert fact in shown
    for word in ("Result", "Module", "Class", "Source", "Row map", "Strategy"):
        assert word in shown
    window.click("#details .close")
    assert window.run("return document.getElementById('details').hidden")


def test_filters_and_search(window: Browser, page: Path) -> None:
    window.open(page, "#graph=0&stage=fuse&tab=nodes")
    everything = window.run("return viewer.found.length")
    sites = window.run("return viewer.stage.entries.filter((e) => e.sites.length).length")
    filtered = (
        "const box = document.getElementById('filter'); box.selectedIndex = arguments[0];"
        "box.dispatchEvent(new Event('change'))"
    )
    window.run(filtered, 1)
    assert window.run("return viewer.found.length") == sites < everything
    rows = window.run(
        "const rows = [...document.querySelectorAll('#view-nodes .node:not([hidden]) b')];"
        "return rows.map((e) => e.textContent)"
    )
    assert rows == window.run("return viewer.found.map((e) => e.node.name)")
    assert window.run("return viewer.found.every((e) => e.sites.length)")
    window.run(filtered, 0)
    window.run(
        "const box = document.getElementById('search'); box.value = 'layers.1 down_proj';"
        "box.dispatchEvent(new Event('input'))"
    )
    paths = window.run("return viewer.found.map((e) => e.node.path)")
    assert 0 < len(paths) < everything
    assert all("layers.1." in path for path in paths)
    assert text(window, "#hits") == f"{len(paths)} hits"
    window.run("viewer.step(1)")
    assert window.run("return viewer.picked.node.path") == paths[0]


def test_what_a_pass_changed(window: Browser, page: Path) -> None:
    window.open(page, "#graph=0&stage=fuse&tab=diff")
    lines = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    removed, added = (window.run(lines, f"#diff .{kind}") for kind in ("removed", "added"))
    assert any("torch.ops.lorafx.site" in line for line in removed)
    assert any("torch.ops.lorafx.fused_linear" in line for line in added)


def test_of_5000_nodes_one_layer_is_open_at_first(window: Browser, tmp_path: Path) -> None:
    window.open(write_page(tmp_path / "index.html", "Deep", deep(32, 160)), "#tab=graph")
    assert window.run("return viewer.stage.entries.length") == 32 * 160 + 1
    assert 0 < window.run("return viewer.picture.cy.nodes(':child').length") <= 161
    closed = window.run("return viewer.picture.cy.nodes('.closed').length")
    window.run("viewer.picture.toggle(7)")
    assert window.run("return viewer.picture.cy.nodes('.closed').length") == closed - 1


def test_what_the_passes_over_the_model_did(window: Browser, page: Path) -> None:
    window.open(page, "#graph=0&stage=pack&tab=graph")
    names = "return [...document.querySelectorAll('#passes button')].map((e) => e.dataset.pass)"
    passes = window.run(names)
    assert passes[:6] == ["alias", "select", "read", "attach", "load", "pack_weights"]
    assert passes[6] == "traced"
    window.click("button[data-pass=select]")
    assert window.run("return viewer.tab") == "model"
    shown = text(window, "#view-model")
    assert "model.layers.{0-1}.self_attn.q_proj: Linear, 24 -> 24" in shown
    assert "model.layers.{0-1}.self_attn: one bank for q_proj + k_proj + v_proj" in shown
    assert "no slot yet" in shown
    window.click("button[data-pass=fuse]")
    assert window.run("return [viewer.tab, viewer.stage.name]") == ["graph", "fuse"]


def test_it_opens_at_the_last_pass_that_changed_something(window: Browser, page: Path) -> None:
    window.open(page, "#graph=0")
    assert not window.run("return viewer.graph.stages[viewer.at].idle")
    assert window.run("return viewer.graph.stages.slice(viewer.at + 1).every((s) => s.idle)")


def test_texts_are_texts(window: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path / "index.html", HOSTILE, by_hand())
    for tab in ("graph", "diff", "nodes", "sites", "model", "files"):
        window.open(page, f"#tab={tab}&stage=pack&node=0/relu_1")
        assert window.run("return document.images.length") == 0
        assert HOSTILE in text(window, "#details")
    assert window.run("return document.title") == f"{HOSTILE}: lorafx"
    assert text(window, "#file-text") == text(window, "#diff") == HOSTILE
    window.open(page, "#tab=sites&stage=pack")
    assert text(window, "#view-sites .refused").startswith("Refused (mixed): layers.1.up: its we")
    marked = "return viewer.stage.entries.filter((e) => e.mark === 'refused').map((e) => e.key)"
    assert window.run(marked) == ["0/relu_1"]

"""What the page holds: all of the graphs, nothing of the network, no text as HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from viewed_graphs import HOSTILE, by_hand, page_data, write_page

pytestmark = pytest.mark.quick


class _Elements(HTMLParser):
    """Elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_of_a_users_becomes_html(tmp_path: Path) -> None:
    page = write_page(tmp_path / "hostile.html", HOSTILE, by_hand())
    elements = _Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    plain = _Elements()
    plain.feed(write_page(tmp_path / "plain.html", "Model", by_hand()).read_text(encoding="utf-8"))
    tags = [tag for tag, _ in elements.found]
    assert tags == [tag for tag, _ in plain.found]
    assert "img" not in tags
    about, graphs = page_data(page)
    assert (about["model"], about["texts"]) == (HOSTILE, {"explain.txt": HOSTILE})
    assert graphs == [by_hand()]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = write_page(tmp_path / "index.html", "Model", by_hand()).read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(text)
    links = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert links == ["data:,"]  # the icon: else browsers ask for one
    policy = next(a["content"] for _, a in elements.found if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "connect-src" not in policy
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    # The licence of the vendored library.
    assert "Copyright (c) 2012-2014 Chris Pettitt" in text
    assert "Permission is hereby granted, free of charge" in text

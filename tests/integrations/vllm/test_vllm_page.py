"""The table of docs/guides/vllm.md is made of the patches; EXPECTTEST_ACCEPT=1 writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafx.integrations.vllm import plugin
from lorafx.integrations.vllm.patches import PATCHES

pytestmark = pytest.mark.quick

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "vllm.md"
START, END = "<!-- patches -->\n", "<!-- end -->"


def test_the_page_has_each_patch() -> None:
    rows = [f"| `{patch.owner}.{patch.name}` | {patch.purpose} |" for patch in PATCHES]
    versions = ", ".join(plugin.TESTED)
    table = "\n".join([f"| in vLLM {versions} | what stands there |", "|---|---|", *rows, ""])
    before, _, rest = PAGE.read_text().partition(START)
    written, _, after = rest.partition(END)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        PAGE.write_text(before + START + table + END + after)
    else:
        assert written == table

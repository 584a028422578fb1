"""The site of docs/ is built without a warning: every link leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LONG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_links_out_of_docs_lead_to_pages(site: Path) -> None:
    guide = (site / "guides" / "diffusers.html").read_text()
    assert 'href="../examples.html#diffusion_pipeline"' in guide
    examples = (site / "examples.html").read_text()
    programs = [path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".cpp")]
    for path in (*programs, *(ROOT / "examples" / "commits").iterdir()):
        assert f'id="{path.stem}"' in examples
    assert "Add a pass over graphs" in (site / "contributing.html").read_text()


def test_fields_and_pages_that_docstrings_name(site: Path) -> None:
    page = (site / "reference" / "configuration.html").read_text()
    assert "how many adapters can be active in one batch" in " ".join(page.split())
    assert '<a href="../adapter_store.html">docs/adapter_store.md</a>' in page


def test_no_page_asks_another_server_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        for attribute in (' src="http', '<link rel="stylesheet" href="http', "url(http"):
            assert attribute not in text, path

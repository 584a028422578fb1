"""The report where dumps go: `explain.txt`, and torch's structured trace."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from lorafx.capture.dump import beside_compiling, own_folder, traced
from lorafx.explanation.report import Explanation

if TYPE_CHECKING:
    from lorafx.session.session import Session


def write_beside_dumps(session: weakref.ref[Session]) -> None:
    """Write the report into the folder that the graphs of this model are dumped into, if there is
    one, and into torch's trace, if that is kept. For after each graph."""
    found = session()
    if found is None:
        return
    traced("explain", lambda: str(Explanation.of(found)))
    folder = own_folder(found.program)
    if folder is not None:
        report = f"{Explanation.of(found)}\n"
        with beside_compiling(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "explain.txt").write_text(report, encoding="utf-8")
            if found.backend.page is not None:
                found.backend.page.texts["explain.txt"] = report
                found.backend.page.write()

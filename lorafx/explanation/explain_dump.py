"""Writes dumps, `explain.txt`, and torch's structured trace during compilation."""

from __future__ import annotations

import weakref
from functools import partial

from lorafx.capture.record import GraphRecord
from lorafx.explanation.collecting import explained
from lorafx.session.session import Session
from lorafx.viewer.dump import beside_compiling, folder_of, trace_graph, traced, write_graph
from lorafx.viewer.graph_data import graph_data
from lorafx.viewer.page import Page


class Dumps:
    """Writes the requested outputs of each graph of a session, as `Backend.recorded`."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._page: Page | None = None

    def __call__(self, record: GraphRecord) -> None:
        session = self._session()
        if session is None or not record.keeps_stages:
            return
        program, records = session.program, session.backend.records
        if records[:1] in ([], [record]):
            for index, report in enumerate(program.prepared):
                traced(f"model_{index:02d}_{report.name}", partial(str, report))
        trace_graph(record)
        traced("explain", lambda: str(explained(session)))
        folder = folder_of(program)
        if folder is None:
            return
        if self._page is None or self._page.folder != folder:
            name = type(program.model).__name__
            self._page = Page(folder, name, prepared=program.prepared)
        with beside_compiling(folder):
            write_graph(folder, record)
            self._page.add(record, graph_data(record, program))
            if record in records:  # it did not fail
                self._page.texts["explain.txt"] = f"{explained(session)}\n"
            self._page.write()

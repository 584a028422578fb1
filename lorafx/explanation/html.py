"""The report for notebooks: the summary, and tables that open. No script, no style of a page's own,
so that it reads in light and dark themes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lorafx.explanation.report import Explanation
from lorafx.explanation.text import graph_lines, seconds_line, shortcuts_line
from lorafx.reports.table import TableRow, html_rows


def page(report: Explanation) -> str:
    """The whole report."""
    first, *others = report.summary
    told = [*others, *filter(None, [shortcuts_line(report)])]
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    sites = [
        (
            site.path or "(root)",
            site.cls,
            f"{site.in_features} → {site.out_features}",
            site.dtype,
            ", ".join(f"{name} {columns}" for name, columns in site.parts),
            ", ".join(site.aliases),
        )
        for site in report.sites
    ]
    adapters = [
        (
            adapter.name,
            adapter.rank,
            len(adapter.sites),
            "host" if adapter.slot is None else adapter.slot,
            adapter.why_idle or ("" if adapter.norm is None else f"{adapter.norm:.3g}"),
            adapter.source,
        )
        for adapter in report.adapters
    ]
    parts = [
        _table("Adapters", ("name", "rank", "sites", "slot", "norm of ΔW", "source"), adapters),
        _table("Sites", ("path", "class", "K → N", "dtype", "parts", "also"), sites),
    ]
    for graph in report.graphs:
        text = escape("\n".join(graph_lines(graph)))
        title = f"{graph.title}: {graph.serves}, {seconds_line(graph.seconds)}"
        parts.append(_details(title, f"<pre>{text}</pre>"))
    return f"<div><b>{escape(first)}</b><ul>{lines}</ul>{''.join(parts)}</div>"


def _table(title: str, columns: Sequence[str], rows: Sequence[TableRow]) -> str:
    if not rows:
        return ""
    return _details(f"{title}: {len(rows)}", f"<table>{html_rows(columns, rows)}</table>")


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"

"""What the GPU queue prints: its progress, and what is measured, stale, failed, never run."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gpu_jobs import Job
from gpu_results import NEVER, Digests, Entry, Store, state_of


class Teller:
    """Progress: with rich a line that lives while a job runs, on a terminal; else plain lines."""

    def __init__(self) -> None:
        self._console: Any = None
        if sys.stdout.isatty():
            try:
                from rich.console import Console

                self._console = Console(highlight=False)
            except ImportError:  # plain lines say the same
                pass

    def __enter__(self) -> Teller:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        if self._console is not None:
            self._console.print(line, markup=False)
        else:
            print(line, flush=True)

    @contextmanager
    def job(self, name: str, estimate: float, waiting: int) -> Iterator[None]:
        """Around a job that runs."""
        if self._console is None:
            self.say(f"{name}: about {estimate:.0f} s, {waiting} jobs to do")
            yield
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn(f"of about {estimate:.0f} s, {waiting} to do"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=estimate)
            start = time.monotonic()
            progress.get_renderable = _advancing(progress, task, start)  # type: ignore[method-assign]
            yield

    def ended(self, name: str, entry: Entry) -> None:
        self.say(f"{name}: {entry['status']} in {entry['seconds']:.0f} s; {described(entry)}")


def _advancing(progress: Any, task: Any, start: float) -> Any:
    """The progress as it is drawn, after the bar was moved to where the time is."""
    draw = progress.get_renderable

    def drawn() -> Any:
        progress.tasks[task].completed = time.monotonic() - start
        return draw()

    return drawn


def described(entry: Entry) -> str:
    """What was found, in a line."""
    return "; ".join(text for text in (entry.get("why"), entry["summary"]) if text)


def report(jobs: Sequence[Job], stores: Mapping[str, Store], digests: Digests) -> None:
    """Print the state of every job on every device that has results."""
    if not stores:
        print("No GPU has results yet.")
        stores = {"any device": Store("nothing")}
    for device, store in stores.items():
        rows, counted = [], Counter[str]()
        for job in jobs:
            entry = store.entries.get(job.name)
            state = state_of(entry, digests.of(job, store.entries))
            counted[state] += 1
            when = f"{entry['date'][:16].replace('T', ' ')}" if entry else ""
            seconds = f"{entry['seconds'] if entry else job.estimate:.0f}"
            rows.append((job.name, state, when, seconds, described(entry) if entry else ""))
        title = f"{device}: " + ", ".join(f"{count} {state}" for state, count in counted.items())
        never = sum(job.estimate for job in jobs if job.name not in store.entries)
        _table(f"{title}; about {never / 60:.0f} minutes never run", rows)


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    heads = ("job", "state", "when (UTC)", "s", "found")
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(*heads, title=title)
            for row in rows:
                style = {"measured": "green", NEVER: "dim"}.get(row[1], "yellow")
                style = "red" if row[1].startswith("failed") else style
                table.add_row(*(Text(cell) for cell in row), style=style)
            Console().print(table)
            return
    print(title)
    widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(4)]
    for row in (heads, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]).rstrip())
    print()

"""Paths of repeated modules as one: `layers.0.q`, `layers.1.q` → `layers.{0-1}.q`."""

from __future__ import annotations

from collections.abc import Iterable

#: What stands for an index.
INDEX = "*"


def shape_of(path: str) -> str:
    """`path` with "*" in the place of each index into a list of modules."""
    return ".".join(INDEX if part.isdecimal() else part for part in path.split("."))


def joined(paths: Iterable[str]) -> str:
    """Paths of one `shape_of` as one, with the indices that each place has."""
    parts = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_place(tuple(dict.fromkeys(own))) for own in parts) or "(root)"


def _place(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    runs: list[list[int]] = []
    for index in sorted(map(int, names)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    told = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return "{" + ",".join(told) + "}"


def alike(told: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `path: text`, one for all paths of one `shape_of` that have the same text."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, text in told:
        found.setdefault((shape_of(path), text), []).append(path)
    return [f"{joined(paths)}: {text}" for (_, text), paths in found.items()]

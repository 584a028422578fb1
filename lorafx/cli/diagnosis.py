"""`lorafx doctor`: versions, private ground, shortcuts, and a small mixed batch.

It runs where lorafx does not: only the batch and the compiler need a version that is supported.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

from lorafx import __version__
from lorafx.cli.options import AsJson, show_json
from lorafx.cli.small_batch import SmallBatch, run_small_batch
from lorafx.errors import LorafxError
from lorafx.progress import LOG, progress
from lorafx.reports.report import json_values, text_table
from lorafx.torch_internals import entries, shortcuts, versions


def doctor(as_json: AsJson = False) -> None:
    """Show versions, the private parts of torch that lorafx needs and those that make it faster,
    and compare a small mixed batch with each adapter merged by itself.

    Nothing is downloaded. Exits with 1 where something is wrong, and says what.

    Example: lorafx doctor
    """
    found = diagnosed()
    if as_json:
        show_json(found.json())
    else:
        print(found)
    if found.faults:
        raise typer.Exit(1)


@dataclass(frozen=True)
class RequiredPart:
    """A required part, as `entries.table()` has it.

    Attributes:
        missing: private names that an installed package lacks.
        absent: packages that it needs and that are not installed.
    """

    module: str
    use: str
    refused: str
    missing: tuple[str, ...]
    absent: tuple[str, ...]

    @classmethod
    def of(cls, row: entries.PrivateGround) -> RequiredPart:
        """The part of one row, looked for in what is installed."""
        packages = {name.partition(".")[0] for name in row.names}
        absent = tuple(sorted(name for name in packages if versions.installed(name) is None))
        there = [name for name in row.names if name.partition(".")[0] not in absent]
        missing = tuple(filter(entries.missing, there))
        return cls(row.module, row.entry.use, row.entry.refused, missing, absent)

    def __str__(self) -> str:
        lacks = [f"lacks {', '.join(self.missing)}"] if self.missing else []
        lacks += [f"{name} is not installed" for name in self.absent]
        return f"{'; '.join(lacks)}; refused without: {self.refused}" if lacks else "holds"


@dataclass
class Diagnosis:
    """All that was found. `faults` are sentences; without any, everything holds."""

    installed: dict[str, str] = field(default_factory=dict)
    required: tuple[RequiredPart, ...] = ()
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    batch: SmallBatch | None = None
    faults: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The fields, of JSON's own types, and whether all holds."""
        found: dict[str, Any] = json_values({"holds": not self.faults, **asdict(self)})
        return found

    def __str__(self) -> str:
        states = [
            (name, state if state == "on" else f"off: {state}")
            for name, state in self.shortcuts.items()
        ]
        parts = [
            text_table(("installed", ""), self.installed.items()),
            text_table(("required", ""), [(part.module, part) for part in self.required]),
            text_table(("shortcuts", ""), states),
            [f"mixed batch: {self.batch or 'not run'}"],
            [f"wrong: {text}" for text in self.faults] or ["everything holds"],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)


def diagnosed() -> Diagnosis:
    """Look at this machine. Nothing is raised for what is wrong with it."""
    found = Diagnosis()
    with _quiet():
        with _noting(found):
            versions.check()
        supported = not found.faults
        with progress("looking at torch"):
            found.required = tuple(map(RequiredPart.of, entries.table()))
            found.installed = {**_versions(), **_machine(supported)}
        found.faults += [f"{part.module} {part}" for part in found.required if part.missing]
        if found.installed["C++ compiler"] == found.installed["GPU"] == "none":
            found.faults.append(
                "no C++ compiler was found: install g++ or clang, or name it in CXX"
            )
        with _noting(found):
            found.shortcuts = shortcuts.states()
            if supported:
                with progress("compiling a small mixed batch"):
                    found.batch = run_small_batch()
        if found.batch is not None and not found.batch.right:
            found.faults.append("the mixed batch is not what dense merge gives: please report it")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is logged: what the log would say is in the report."""
    before = LOG.level
    LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOG.setLevel(before)


@contextmanager
def _noting(found: Diagnosis) -> Iterator[None]:
    """An error inside is a fault."""
    try:
        yield
    except LorafxError as error:
        found.faults.append(str(error))
    except Exception as error:  # of any library: the report has to be made
        found.faults.append(f"{type(error).__name__}: {error}")


def _versions() -> dict[str, str]:
    packages = ("torch", "triton", "transformers", "peft")
    return {
        "lorafx": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: versions.standing(package) for package in packages},
    }


def _machine(supported: bool) -> dict[str, str]:
    """The compiler, which is looked for where lorafx runs, and the GPU."""
    found = {"C++ compiler": "not looked for", "GPU": "none"}
    if versions.installed("torch") is None:
        return found
    import torch

    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    if supported:
        from lorafx.kernels.cpu.compiler import find_compiler, version_of

        try:
            compiler = find_compiler()
            found["C++ compiler"] = (version_of(compiler).splitlines() or [compiler])[0]
        except LorafxError:
            found["C++ compiler"] = "none"
    return found

"""What lorafx needs of private parts of other packages: required parts, and shortcuts.

Each module of this folder has an `ENTRY`, one row of the table in docs/torch_internals.md; the
private names that it uses are read from its source.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorafx.errors import UnsupportedVersionError
from lorafx.torch_internals import versions

FOLDER = Path(__file__).parent
_PACKAGES = ("torch", "triton", "transformers", "peft")
#: Modules that promise nothing, though they have no underscore.
_PRIVATE = ("torch.fx.experimental", "triton.runtime", "triton.compiler", "triton.backends")


@dataclass(frozen=True)
class Required:
    """A private part that lorafx needs for `use`, until there is the public interface `ended_by`;
    `refused` is what fails without it."""

    use: str
    ended_by: str
    refused: str = "everything that compiles"


@contextmanager
def private_names() -> Iterator[None]:
    """Turns missing or changed private names, and other versions, into UnsupportedVersionError."""
    versions.check()
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise UnsupportedVersionError(f"{error}; {versions.way_out()}") from error


def is_private(name: str) -> bool:
    first, *rest = name.split(".")
    if first not in _PACKAGES:
        return False
    hidden = any(part.startswith("_") and not part.startswith("__") for part in rest)
    return hidden or any(f"{name}.".startswith(f"{module}.") for module in _PRIVATE)


def names_in(source: str) -> set[str]:
    """The private names that a source uses, under the names that this folder exports included."""
    tree = ast.parse(source)
    meant, found = imported(tree)
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner and (whole := dotted(node, meant)):
            found.add(whole)
    return {name for name in found if is_private(name)}


def imported(tree: ast.AST) -> tuple[dict[str, str], set[str]]:
    """What the names that a module imports stand for, and all that it imports."""
    meant: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                meant[item.asname or item.name.partition(".")[0]] = (
                    item.name if item.asname else item.name.partition(".")[0]
                )
                found.add(item.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                name = f"{node.module}.{item.name}"
                meant[item.asname or item.name] = name
                found.add(name)
    return meant, found


def dotted(node: ast.AST, meant: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return meant.get(node.id)
    above = dotted(node.value, meant) if isinstance(node, ast.Attribute) else None
    return f"{above}.{node.attr}" if above and isinstance(node, ast.Attribute) else None


@dataclass(frozen=True)
class PrivateGround:
    """One module of this folder: its entry, and the private names that it uses."""

    module: str
    entry: Required
    names: tuple[str, ...]


@cache
def table() -> tuple[PrivateGround, ...]:
    """All modules of this folder, read from the sources: importing what is missing would fail."""
    rows = []
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENTRY":
                call: Any = node.value
                said = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
                rows.append(
                    PrivateGround(path.stem, Required(**said), tuple(sorted(names_in(source))))
                )
    return tuple(rows)


@cache
def handed_out() -> frozenset[str]:
    """The names under which this folder exports private ones."""
    meant = [imported(ast.parse(path.read_text()))[0] for path in FOLDER.glob("*.py")]
    return frozenset(own for names in meant for own, name in names.items() if is_private(name))


def found(name: str) -> Any:
    """The object of a dotted name in the installed packages; AttributeError or ImportError."""
    return pkgutil.resolve_name(name)


def missing(name: str) -> bool:
    try:
        found(name)
    except (AttributeError, ImportError):
        return True
    return False

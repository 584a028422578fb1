"""The private names of torch, triton, transformers and peft that a source uses."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "lorafx" / "torch_internals"
_PACKAGES = ("torch", "triton", "transformers", "peft")
#: Modules that promise nothing, though they have no underscore.
_PRIVATE = ("torch.fx.experimental", "triton.runtime", "triton.compiler", "triton.backends")


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


def names_by_module() -> dict[str, set[str]]:
    """The private names of each module of lorafx/torch_internals that has some."""
    found = {path.stem: names_in(path.read_text()) for path in sorted(FOLDER.glob("*.py"))}
    return {module: names for module, names in found.items() if names}

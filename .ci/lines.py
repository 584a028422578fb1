"""Lines by folder, beside the budgets of pyproject.toml: `make lint` fails where one is exceeded.

    python .ci/lines.py

A folder is a package of lorafx, passes/, kernels/ or tests/. Whoever needs more lines raises the
budget in the same commit. A module of the program that is longer than `LONGEST` says why in its
heading, after "One file:".
"""

from __future__ import annotations

import ast
import os
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {".py", ".cpp", ".h", ".jinja", ".js", ".css", ".html"}


#: Lines of a module that need no reason.
LONGEST = 400


def unexplained() -> list[str]:
    """Modules of the program that are longer than `LONGEST` and do not say why."""
    found = []
    for folder in ("lorafx", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            heading = ast.get_docstring(ast.parse(text)) or ""
            if text.count("\n") > LONGEST and "One file: " not in heading:
                found.append(path.relative_to(ROOT).as_posix())
    return found


def lines_by_folder() -> Counter[str]:
    """Folder -> lines of its files. Links, as lorafx/passes, are not followed."""
    lines: Counter[str] = Counter()
    for top in ("lorafx", "passes", "kernels", "tests"):
        for path, _, names in os.walk(ROOT / top):
            parts = Path(path).relative_to(ROOT).parts
            folder = "/".join(parts[:2]) if top == "lorafx" else top
            for file in (Path(path, name) for name in names):
                if file.suffix in KINDS:
                    lines[folder] += file.read_bytes().count(b"\n")
    return lines


def main() -> int:
    lines = lines_by_folder()
    budgets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["lorafx"]["lines"]
    over = [folder for folder, count in lines.items() if count > budgets.get(folder, 0)]
    for folder in sorted(lines | budgets):
        note = "  over its budget: shorten it, or raise tool.lorafx.lines" if folder in over else ""
        print(f"{folder:24}{lines[folder]:7,} of {budgets.get(folder, 0):7,}{note}")
    print(f"{'without tests':24}{lines.total() - lines['tests']:7,}")
    for file in (long := unexplained()):
        print(f"{file}: over {LONGEST} lines; divide it, or say why in its heading (One file: ...)")
    return bool(over or long)


if __name__ == "__main__":
    sys.exit(main())

"""What is to be done as soon as a module of another library has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


class _AfterImport(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[Any], object]) -> None:
        self._name, self._action = name, action

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module
            loader.exec_module = lambda module: (run(module), self._action(module))
        return spec


def when_imported(name: str, action: Callable[[Any], object]) -> None:
    """Call `action` with the module `name`: now if it has been imported, or else right after it
    has. Nothing is imported here."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))

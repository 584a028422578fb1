"""Generated Triton kernels on disk: one importable Python file a kernel.

    file = cache / triton / <kernel>_<key>.py
    key  = sha256(kernel, spec, tiles, architecture, templates, versions of triton and torch)

Triton, tracebacks and dumps read a kernel's text through `inspect`, so it has to be a file. A
process that finds the file imports it. Files are renamed into place when they are complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lorafx.errors import LoweringError
from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.triton.source import KERNELS, Spec, generator_hash, source
from lorafx.kernels.triton.tiles import Architecture, Tiles
from lorafx.torch_internals import triton_compat

#: Kernels that launch first and whose result another kernel reads.
FIRST = ("shrink", "shrink_rows", "split", "activate")


@dataclass(frozen=True, eq=False)
class GeneratedKernel:
    """A kernel of this process and its @triton.jit function. Equal keys mean equal text."""

    name: str
    key: str
    path: Path
    tiles: Tiles
    jit: Any = field(repr=False)

    @property
    def starts_early(self) -> bool:
        """Whether it may be launched while the kernel before it runs: it waits by itself."""
        return self.tiles.overlap and self.name not in FIRST

    @property
    def text(self) -> str:
        return self.path.read_text()


def key_of(kernel: str, spec: Spec | None, tiles: Tiles, arch: Architecture) -> str:
    parts = (
        *(kernel, repr(spec), repr(tiles), arch.name),
        *(generator_hash(), triton_compat.version(), torch.__version__),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def load(kernel: str, spec: Spec | None, tiles: Tiles, arch: Architecture) -> GeneratedKernel:
    key = key_of(kernel, spec, tiles, arch)
    folder = cache_folder() / "triton"
    path = folder / f"{kernel}_{key}.py"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
        ) as scratch:
            scratch.write(source(kernel, spec, tiles))
        os.replace(scratch.name, path)
    template, constants = KERNELS[kernel]
    function = constants.get("function", template)
    return GeneratedKernel(kernel, key, path, tiles, getattr(_import(path), function))


def _import(path: Path) -> ModuleType:
    name = f"lorafx_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise LoweringError(f"the generated kernel {path} cannot be imported: {error}") from error
    return module

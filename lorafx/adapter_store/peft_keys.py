"""Names in PEFT checkpoints: what a saved key says, and which module of a model it means.

    base_model.model.<module>.lora_A.weight            (r, K)     linear
    base_model.model.<module>.lora_B.weight            (N, r)
    base_model.model.<module>.lora_embedding_A         (r, V)     embedding, no `.weight`
    base_model.model.<module>.lora_embedding_B         (N, r)

Seen in the wild as well: no `base_model.model.`, `_orig_mod.` of a compiled model anywhere in the
path, an adapter name left over (`lora_A.default.weight`), and any path that reaches the module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from lorafx.errors import nearest

if TYPE_CHECKING:
    from lorafx.sites import Site

Factor = Literal["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"]

PREFIX = "base_model.model."
_COMPILED = "_orig_mod"
_FACTOR = re.compile(
    r"^(?:(?P<module>.+)\.)?(?P<factor>lora_(?:embedding_)?[AB])"
    r"(?:\.(?!bias$)(?P<adapter>[^.]+))??(?:\.weight)?$"
)


@dataclass(frozen=True)
class FactorKey:
    """A key that holds one low-rank factor. `module` is the path before it, prefixes included."""

    key: str
    module: str
    factor: Factor

    @property
    def letter(self) -> Literal["A", "B"]:
        return "A" if self.factor.endswith("A") else "B"

    @property
    def embedding(self) -> bool:
        return "embedding" in self.factor


def parse(key: str) -> FactorKey | None:
    """The factor that `key` holds, or None if it is not a factor's key."""
    found = _FACTOR.match(key)
    if found is None:
        return None
    factor: Factor = found["factor"]  # type: ignore[assignment]
    return FactorKey(key, found["module"] or "", factor)


def without_prefix(path: str) -> str:
    """`path` without `_orig_mod` components and without one leading `base_model.model.`."""
    return candidates(path)[0]


def candidates(path: str) -> tuple[str, ...]:
    """The module paths that a saved path may mean, likeliest first.

    PEFT always writes `base_model.model.`; a path that begins so and is meant as it stands comes
    from a writer without prefixes and a model with such attributes.
    """
    plain = _drop_compiled(path)
    stripped = (plain + ".").removeprefix(PREFIX).rstrip(".")
    return (stripped,) if stripped == plain else (stripped, plain)


def _drop_compiled(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != _COMPILED)


class Places:
    """Finds the site, or at least the module, that a saved path means.

    With the whole `model`, a path that reaches a module which is not a selected site can be told
    from one that reaches nothing, and every alias path is known.
    """

    def __init__(self, sites: Sequence[Site], model: nn.Module | None) -> None:
        self._model = model
        self._by_path = {_drop_compiled(p): site for site in sites for p in site.paths}
        self._by_module = {id(site.module): site for site in sites}
        self._names: list[str] | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole model is known, not only its sites."""
        return self._model is not None

    def site(self, path: str) -> tuple[Site, str] | None:
        """The site that `path` means, and the path without prefixes under which it was found."""
        for candidate in candidates(path):
            found = self._by_path.get(candidate) or self._by_module.get(id(self._walk(candidate)))
            if found is not None:
                return found, candidate
        return None

    def module(self, path: str) -> nn.Module | None:
        """The module that `path` means, a site or not; None where there is none."""
        found = self.site(path)
        if found is not None:
            return found[0].module
        walked = (self._walk(candidate) for candidate in candidates(path))
        return next((module for module in walked if module is not None), None)

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Every known module under its canonical path; only sites when the model is unknown."""
        if self._model is None:
            return [(_drop_compiled(s.path), s.module) for s in self._by_module.values()]
        return ((_drop_compiled(path), module) for path, module in self._model.named_modules())

    def nearest(self, path: str) -> str:
        """A message fragment with the existing module paths closest to `path`."""
        if self._names is None:
            self._names = [name for name, _ in self.named_modules() if name]
        wanted = candidates(path)[0]
        # difflib takes milliseconds a hundred names: try those of the same last component first.
        last = wanted.rpartition(".")[2]
        alike = [name for name in self._names if name.rpartition(".")[2] == last]
        return nearest(wanted, alike) or nearest(wanted, self._names[:2000])

    def _walk(self, path: str) -> nn.Module | None:
        node = self._model
        for part in path.split(".") if path else ():
            if node is None:
                return None
            while part not in node._modules and node._modules.get(_COMPILED) is not None:
                node = node._modules[_COMPILED]
                assert node is not None
            node = node._modules.get(part)
        return node

"""The field `use_bdlora` of PEFT's configuration: which factors are saved as blocks.

What they are as full factors: lorafx.adapter_store.expanding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafx.adapter_store.config_source import short


@dataclass(frozen=True)
class BlockDiagonal:
    """PEFT's `use_bdlora`.

    Attributes:
        a, b: parts of the paths of modules whose A, or B, is block-diagonal; anywhere in a path.
        blocks: n.
    """

    a: tuple[str, ...] = ()
    b: tuple[str, ...] = ()
    blocks: int = 1

    def letter(self, path: str) -> str | None:
        """Which factor of the module at `path` is block-diagonal; None for neither."""
        if any(part in path for part in self.a):
            return "A"
        return "B" if any(part in path for part in self.b) else None


def block_diagonal(value: Any) -> BlockDiagonal | str | None:
    """The field `use_bdlora`: None where it is off, a message where it is malformed."""
    if value is None or value is False:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        return f"use_bdlora must be an object, it is {short(value)}"
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not known >= value.keys():
        return f"use_bdlora has the unknown field {short(min(map(str, value.keys() - known)))}"
    names = [value.get(f"target_modules_bd_{letter}") or () for letter in "ab"]
    for own in names:
        if not isinstance(own, list | tuple) or not all(isinstance(n, str) and n for n in own):
            return f"use_bdlora must name parts of module paths in lists, not {short(own)}"
    blocks = value.get("nblocks", 1)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        return f"use_bdlora.nblocks must be a positive integer, it is {short(blocks)}"
    return BlockDiagonal(tuple(names[0]), tuple(names[1]), blocks)

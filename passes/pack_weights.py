"""pack_weights: the weights of siblings become views of one buffer, with the same values.

W_0 (N_0, K), W_1 (N_1, K), ...   →   views of [W_0; W_1; ...] (ΣN, K)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorafx.model.module_graph import alike
from lorafx.model.packing import PackedGroup, pack_weights
from lorafx.program.preparation import Preparation

_APART = (
    "keep weights of their own: not all are plain dense parameters that nothing else shares, "
    "of one dtype and device"
)


@dataclass(frozen=True)
class PackWeights:
    """The weights of siblings become views of one buffer."""

    name: ClassVar[str] = "pack_weights"

    def run(self, model: Preparation) -> int:
        # Only `pack` reads packed weights, and it merges nodes of `fuse`.
        if not (model.options.runs("pack") and model.options.runs("fuse")):
            model.notes.append("nothing: the pass pack, or fuse, is switched off")
            return 0
        attachment = model.attachment
        assert attachment is not None
        alone = model.graph.alone()
        packed: list[PackedGroup] = []
        told: list[tuple[str, str]] = []
        for group in attachment.groups:
            pack = pack_weights(model.graph, group, alone)
            members = " + ".join(group.members)
            if pack is None:
                if len(group.sites) > 1:
                    told.append((group.parent, f"{members} {_APART}"))
                continue
            told.append((group.parent, f"the weights of {members} are views of one buffer"))
            packed.append(pack)
            for site in group.sites:
                mark = attachment.marks[site.path]
                mark.weight, mark.bias = pack.weight, pack.bias
        model.packed = tuple(packed)
        model.notes += alike(told)
        return len(packed)

"""The leaves of a node's arguments, told without torch's registry of trees.

torch.fx looks through the arguments of each new node, for sizes to warn of, and asks the registry
of every leaf: 5 µs a node, of which a compilation makes hundreds of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

#: What is in the containers that arguments are mostly of, by their type. The registry, too, takes
#: none of a derived type for them.
_ITEMS: dict[type, Callable[[Any], Iterable[Any]]] = {
    tuple: iter,
    list: iter,
    immutable_list: iter,
    dict: dict.values,
    immutable_dict: dict.values,
}
#: Types of what is mostly in them.
_LEAVES = frozenset(
    {fx.Node, int, float, bool, str, type(None), torch.SymInt, torch.dtype, torch.device}
)


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterable[Any]:
    """As `torch.utils._pytree.tree_iter`."""
    if is_leaf is not None:
        return pytree.tree_iter(tree, is_leaf)
    found: list[Any] = []
    _collect((tree,), found)
    return found


def _collect(items: Iterable[Any], found: list[Any]) -> None:
    for item in items:
        kind = item.__class__
        if kind in _LEAVES:
            found.append(item)
        elif kind in _ITEMS:
            _collect(_ITEMS[kind](item), found)
        else:
            found.extend(pytree.tree_iter(item))


#: Trees for torch.fx's graphs.
TREES = SimpleNamespace(**{**vars(pytree), "tree_iter": leaves})

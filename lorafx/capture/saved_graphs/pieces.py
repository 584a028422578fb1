"""The pieces of an executable that are saved, and how they become one again.

checks ( AOTAutograd's wrappers ( inputs that passes added ( the lowered graph ) ) )
"""

from __future__ import annotations

import json
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import metadata
from typing import Any, cast

import torch
from torch import fx

from lorafx.capture.checks import Checks
from lorafx.capture.executable import Lowered, checked, for_base, with_lookups
from lorafx.op_arguments import TRACED_WRITE
from lorafx.program.program import Program
from lorafx.torch_internals.frames import outside_of_frames
from lorafx.torch_internals.graph_parts import HigherOrderOperator, OpOverload, OpOverloadPacket
from lorafx.torch_internals.saved_graphs import BundledAOTAutogradResult

_KNOWN_NAMESPACES = ("aten", "prims", "prim", "lorafx", "inductor")
_KNOWN_HIGHER_ORDER = (torch.ops.higher_order.invoke_subgraph,)


@dataclass
class Wrappers:
    """The wrappers that AOTAutograd puts around a graph without gradients, and their settings;
    `subclasses` says which inputs are tensors that wrap others."""

    metadata: Any
    wrappers: list[Any]
    config: Any
    subclasses: Any = None

    def around(self, compiled: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        """AOTAutograd's function around `compiled`, a graph in the boxed convention."""
        # The other fields are only read when torch itself loads the graph.
        values = dict.fromkeys(item.name for item in fields(BundledAOTAutogradResult))
        values |= {"forward_time_taken_ns": 0, "backward_time_taken_ns": 0}
        values |= {"runtime_metadata": self.metadata, "dispatch_wrappers": self.wrappers}
        values |= {"sanitized_aot_config": self.config, "indices_of_inps_to_detach": []}
        values |= {"maybe_subclass_meta": self.subclasses}
        result: Any = cast(Any, BundledAOTAutogradResult)(**values)
        with outside_of_frames():
            run = result._apply_runtime_wrappers(compiled, None, False, self.config)
        return lambda *arguments: run(list(arguments))


@dataclass
class Pieces:
    """The pieces of an executable of calls with adapters, or without (`base`), beside the lowered
    graph. `extra`, `banks`: as in `Lowered`."""

    checks: Checks
    base: bool
    wrappers: Wrappers
    extra: Sequence[Any]
    banks: Sequence[Any]

    def executable(self, program: Program, run: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        """The executable around the lowered graph `run`."""
        owner = weakref.ref(program)
        if self.base:
            return for_base(self.checks, owner, self.wrappers.around(run))
        boxed = with_lookups(self.checks, owner, Lowered(run, self.extra, self.banks))
        return checked(self.checks, owner, self.wrappers.around(boxed))


def foreign_operators(gm: fx.GraphModule) -> list[str]:
    """Names of operators and functions in a graph whose code a saved graph's key does not cover: it
    has torch's, lorafx's, and the versions of installed packages, which name their operators after
    themselves."""
    found = set()
    for module in gm.modules():
        nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
        for node in nodes:
            if node.op != "call_function":
                continue
            target: Any = node.args[0] if node.target is TRACED_WRITE else node.target
            if isinstance(target, HigherOrderOperator):
                known = target in _KNOWN_HIGHER_ORDER
            elif isinstance(target, (OpOverload, OpOverloadPacket)):
                namespace = str(target).partition(".")[0]
                known = namespace in _KNOWN_NAMESPACES or _is_installed(namespace)
            elif isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType)):
                known = True  # written in C, by an installed package
            else:
                home = str(getattr(target, "__module__", "")).partition(".")[0]
                known = home in ("_operator", "math", "builtins", "torch")
            if not known:
                found.add(str(target))
    return sorted(found)


@cache
def _is_installed(package: str) -> bool:
    """Whether pip has installed a package, whose files then change with its version only."""
    names = metadata.packages_distributions().get(package, ())
    origins = [metadata.distribution(name).read_text("direct_url.json") for name in names]
    folders = [json.loads(origin or "{}").get("dir_info", {}) for origin in origins]
    return bool(folders) and not any(folder.get("editable") for folder in folders)

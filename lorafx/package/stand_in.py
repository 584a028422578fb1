"""What a package says of its model, and banks for it without that.

    model → paths of its modules, [{"path", "kind", "dtype", "in", "parts"}, …] of sites    export
          → a model of modules without weights → sites → banks                              load

So adapters are read, checked and placed by the code that does so for a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.config import LoraConfig
from lorafx.errors import TargetError
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.model.packed_names import ATTRIBUTE
from lorafx.model.sites import Group, Site
from lorafx.model_passes import run_model_passes
from lorafx.passes.alias import Alias
from lorafx.passes.attach import allocate_groups
from lorafx.passes.select import Select
from lorafx.program.program import Preparation, Program

#: The description's key in a package's metadata, and its version.
KEY, FORMAT = "lorafx", 1
#: How messages of a package's assertions begin.
REFUSED = "lorafx: "

_MODULES = {"linear": nn.Linear, "embedding": nn.Embedding}


class StandIn(nn.Module):
    """A module in the place of one that is no site."""

    base_model_prefix = ""

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module at a path; nothing lies below a site."""
        owner: Any = self
        *parents, name = path.split(".")
        for parent in parents:
            owner = owner._modules.get(parent)
            if not isinstance(owner, StandIn):
                return
        owner.add_module(name, module)


def described(program: Program) -> dict[str, Any]:
    """The sites and the room for adapters, as JSON. Raises TargetError for sites that are not
    exported."""
    config, names = program.config, set[str]()
    sites = []
    for site in program.sites:
        if site.eligible.kind not in _MODULES or not site.path or site.undeclared:
            raise TargetError(
                f"{site.path or 'the model itself'} ({type(site.module).__name__}) is not "
                "exported: packages have LoRA on linears and embeddings below the model, and on "
                "packed ones whose slices are declared; leave it out by exclude_modules"
            )
        parts = {site.part_path(n): part.out_features for n, part in enumerate(site.parts)}
        names |= {path.rpartition(".")[2] for path in parts}
        sizes = {"in": site.in_features, "parts": parts}
        kind = {"kind": site.eligible.kind, "dtype": site.dtype_name}
        sites.append({"path": site.path, **kind, **sizes})
    declared = [getattr(module, ATTRIBUTE, None) or {} for module in program.model.modules()]
    packed = {name: members for item in declared for name, members in item.items()}
    packed |= config.packed_modules
    return {
        "modules": [path for path, _ in program.model.named_modules() if path],
        "sites": sites,
        "prefix": getattr(program.model, "base_model_prefix", ""),
        "max_adapters": config.max_adapters,
        "max_rank": config.max_rank,
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "packed_modules": {k: members for k, members in packed.items() if names & set(members)},
    }


class Substitute(NamedTuple):
    """What stands in for a model, its sites, and banks of zeros for them."""

    model: StandIn
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    config: LoraConfig


def substitute_for(description: Mapping[str, Any]) -> Substitute:
    """The sites and banks that `described` tells."""
    model, paths = StandIn(), []
    model.base_model_prefix = description["prefix"]
    sites = {site["path"]: site for site in description["sites"]}
    for path in description["modules"]:
        if path not in sites:
            model.put(path, StandIn())
            continue
        site = sites[path]
        kind, dtype = _MODULES[site["kind"]], getattr(torch, site["dtype"])
        options = {"bias": False} if kind is nn.Linear else {}
        for part, columns in site["parts"].items():
            model.put(part, kind(site["in"], columns, device="meta", dtype=dtype, **options))
            paths.append(part)
    dtype = description["dtype"]
    config = LoraConfig(
        target_modules=paths,
        max_adapters=description["max_adapters"],
        max_rank=description["max_rank"],
        dtype=dtype and getattr(torch, dtype),
        packed_modules=description["packed_modules"],
    )
    preparation = Preparation(model, config)
    run_model_passes(preparation, (Alias(), Select()))
    host = torch.device("cpu")
    on_host = tuple(replace(site, device=host) for site in preparation.sites)
    return Substitute(model, on_host, allocate_groups(on_host, config), config)


def constants_of(groups: Sequence[Group]) -> dict[str, Tensor]:
    """The banks' tensors by the names of the package's constants."""
    fields = [name for name in BankArgs._fields if name != "slots"]
    return {
        f"lorafx.{group.sites[0].part_path(0)}.{name}": getattr(group.bank, name)
        for group in groups
        for name in fields
    }

"""Which module a path means, and the rule that makes it a site or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lorafx.config import LoraConfig
from lorafx.errors import ConfigError, nearest, some
from lorafx.model import targets
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.passes.select import left_out
from lorafx.registry import lookup_class, own_entry


@dataclass(frozen=True)
class Selection:
    """The meaning of a path: a module, or for routed experts' parameters their module; the site
    (and its `part`, None for all) that it is, if any; and the rule for it."""

    module: nn.Module
    path: str
    aliases: tuple[str, ...]
    site: Site | None
    part: int | None
    rule: str


def selection_of(
    graph: ModuleGraph, config: LoraConfig, sites: Sequence[Site], path: str
) -> Selection:
    """The meaning of `path`: of a module, of a part of a packed module ("...self_attn.q_proj"), or
    of a parameter of routed experts. Raises ConfigError with the nearest paths."""
    for site in sites:
        if path in site.paths:
            return Selection(
                site.module, site.path, site.aliases, site, None, why_selected(config, site)
            )
    for site, part in _parts(sites):
        if path == site.part_path(part):
            rule = f"a part of {site.path}; {why_selected(config, site)}"
            return Selection(site.module, site.path, site.aliases, site, part, rule)
    module = graph.find(path)
    if module is None:
        known = [own for own, _ in graph.modules() if own]
        known += [site.part_path(part) for site, part in _parts(sites)]
        raise ConfigError(
            f"{type(graph.root).__qualname__} has no module {path!r}{nearest(path, known)}"
        )
    own, *aliases = graph.paths(module)
    same = next((site for site in sites if site.module is module), None)
    if same is not None:  # an unlisted alias, or the module of routed experts
        rule = why_selected(config, same)
    else:
        rule = left_out(graph, config, module)
        below = [site.path for site in sites if not own or site.path.startswith(f"{own}.")]
        if below:
            rule += f". Sites below it: {some(below)}"
    return Selection(module, own, tuple(aliases), same, None, rule)


def _parts(sites: Sequence[Site]) -> Iterator[tuple[Site, int]]:
    return (
        (site, part) for site in sites if len(site.parts) > 1 for part in range(len(site.parts))
    )


def why_selected(config: LoraConfig, site: Site) -> str:
    """The rules of configuration and registry that select a site."""
    return f"{_named_by(config, site)}; {registered(type(site.module))}"


def registered(cls: type) -> str:
    """The registered class for a class, and the way there along its MRO."""
    entry = lookup_class(cls)
    if entry is None:
        return f"no class of the MRO of {cls.__qualname__} is registered"
    way = [base.__name__ for base in cls.__mro__]
    steps = next(i for i, base in enumerate(cls.__mro__) if own_entry(base) is not None)
    if not steps:
        return f"{cls.__name__} is registered itself"
    return f"{way[steps]} is registered, in the MRO {' > '.join(way[: steps + 1])}"


def _named_by(config: LoraConfig, site: Site) -> str:
    target = targets.checked(config.target_modules, "target_modules")
    if target is None:
        return "no target_modules are given, which means all linear layers"
    if targets.is_all_linear(target):
        return "target_modules='all-linear' means all linear layers"
    names = [path for own in site.paths for path in (own, own.rpartition(".")[0])]
    names += [site.part_path(part) for part in range(len(site.parts))]
    names += [
        f"{path.rpartition('.')[0]}.{packed.name}"
        for packed in site.member_of
        for path in site.paths
    ]
    if isinstance(target, str):
        if targets.names(target, names):
            return f"target_modules={target!r:.80} matches its path"
    else:
        found = [entry for entry in target if targets.names(targets.Entries([entry]), names)]
        whose = "the adapters' own names have" if isinstance(target, targets.SavedTargets) else ""
        if found:
            return f"{whose or 'target_modules has'} {', '.join(map(repr, found[:3]))}"
    if site.own_rows:
        return "modules_to_save or trainable_tokens name it"
    return "a module that carries it is among target_modules"

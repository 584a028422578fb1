"""The sites of a configuration.

    ModuleGraph, LoraConfig → (Site, ...) in canonical path order

Two parameters over one storage (a tied head and embedding) are two sites. One error reports all
named modules that cannot carry LoRA; modules of "all-linear" are left out with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lorafx.config import LoraConfig
from lorafx.errors import ConfigError, LorafxWarning, TargetError, nearest
from lorafx.model import targets
from lorafx.model.bank import SharedPair
from lorafx.model.candidates import (
    Candidate,
    ExpertsCandidate,
    by_raw_weight,
    impossible,
    weight_of,
)
from lorafx.model.experts import expert_weights, folded
from lorafx.model.extras import own_refusal, replaceable_rows, structure_refusal
from lorafx.model.module_graph import ModuleGraph, joined_lines
from lorafx.model.packed_names import PackedNames
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Site
from lorafx.model.weight_formats import is_dense, is_wrapped
from lorafx.program.program import Preparation
from lorafx.registry import Eligible, is_empty, lookup

#: Problems that an error lists; a regular expression can name thousands of containers.
_SHOWN = 20
_EMPTY = "its weight is empty, so LoRA has nothing to change"


@dataclass(frozen=True)
class Select:
    """Selects the configured modules that can carry LoRA.

    Raises TargetError for targets that name nothing, or modules that cannot carry LoRA.
    """

    name: ClassVar[str] = "select"

    def run(self, model: Preparation) -> int:
        selection = _Selection(model.graph, model.config)
        model.sites = selection.sites()
        model.notes += selection.notes(model.sites)
        paths = [site.path for site in model.sites]
        for path in model.options.plan:
            if path not in paths:
                raise ConfigError(
                    f"Options.plan names {path!r}, which is not a site{nearest(path, paths)}"
                )
        return len(model.sites)


def left_out(graph: ModuleGraph, config: LoraConfig, module: nn.Module) -> str:
    """Why a module that is no site was not selected."""
    selection = _Selection(graph, config)
    items = [item for item in selection.modules if item.module is module]
    return "; ".join(dict.fromkeys(map(selection.why_not, items)))


@dataclass
class _Selection:
    graph: ModuleGraph
    config: LoraConfig
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target = targets.checked(self.config.target_modules, "target_modules")
        self.exclude = targets.checked(self.config.exclude_modules, "exclude_modules")
        saved = self.config.modules_to_save
        self.saved = saved if isinstance(saved, targets.Entries) else targets.Entries(saved)
        tokens = self.config.trainable_tokens
        self.tokens = tokens if isinstance(tokens, Mapping) else {}
        self.suffixes = [name for name in self.tokens if self.graph.find(name) is None]
        self.by_default = self.target is None or targets.is_all_linear(self.target)
        self.packed = PackedNames(self.graph, self.config.packed_modules)
        self.modules = [
            item
            for path, module in self.graph.modules()
            for item in self._candidates_of(path, module)
        ]
        # An entry that is a path may be an unlisted alias of its module.
        paths = () if self.target is None or isinstance(self.target, str) else self.target
        modules = {path: self.graph.find(path) for path in paths}
        self.walked = {id(module) for module in modules.values()} - {id(None)}
        if isinstance(self.target, targets.SavedTargets):
            self.target = targets.Entries(e for e, module in modules.items() if module is None)
        lists = (item for _, item in self.graph.modules() if isinstance(item, ParametrizationList))
        self.makers = {id(module) for made in lists for module in made.modules()}
        self.head = targets.output_embedding(self.graph.root)
        self.eligible_paths = [item.path for item in self.modules if item.entry is not None]

    def _candidates_of(self, path: str, module: nn.Module) -> Iterator[Candidate]:
        entry, paths = lookup(module), self.graph.paths(module)
        weights = expert_weights(module)
        if weights is None:
            yield Candidate(path, module, paths, entry, self.packed)
        for weight in weights or ():
            yield ExpertsCandidate(path, module, paths, weight, self.packed)

    def sites(self) -> tuple[Site, ...]:
        sites: list[Site] = []
        left_out: list[str] = []
        named = excluded = 0
        for item in self.modules:
            if item.entry is not None and item.entry.carries and self._targeted(item):
                children = (getattr(item.module, name, None) for name in item.entry.carries)
                self.walked.update(id(child) for child in children)
        for item in self.modules:
            targeted = self._targeted(item)
            members = targeted - self._excluded(item)
            named += bool(targeted)
            excluded += bool(targeted) and not members
            rows = self._rows_asked(item)
            if not members and rows == 0:
                continue
            if is_empty(item.module):
                left_out.append(f"{item.label}: {_EMPTY}")
                _warn(f"{item.label} is left out: {_EMPTY}")
                continue
            site = self._site(item, members)
            refusal = own_refusal if rows is None else structure_refusal
            reason = None if rows == 0 else site if isinstance(site, str) else refusal(site)
            if reason is not None:
                self.problems.append(
                    f"{item.label} cannot have a weight of an adapter's own for each row "
                    f"(modules_to_save, trainable_tokens): {reason}"
                )
            elif isinstance(site, Site):
                every = site.weight_rows if rows != 0 else 0
                own = every if rows is None else min(rows, every)
                sites.append(replace(site, own_rows=own, pair=self._pair_for(site, own)))
            elif self.by_default:
                left_out.append(f"{item.label}: {site}")
                _warn(f"{item.label} carries no LoRA: {site}")
            else:
                inferred = isinstance(self.config.target_modules, targets.AdapterNames)
                origin = " (an adapter has factors for it)" if inferred else ""
                self.problems.append(f"{item.label}: {site}{self._eligible_below(item)}{origin}")
        self.problems.extend(self._unmatched_entries())
        self._warn_of_unmatched_exclusions()
        if not self.problems and not sites:
            self.problems.append(self._why_no_site(named, excluded, left_out))
        if self.problems:
            raise TargetError(_list_of_problems(self.problems))
        return tuple(sites)

    def _pair_for(self, site: Site, own_rows: int) -> SharedPair | None:
        if self.config.scaled_pair is None or not own_rows or not site.eligible.is_linear:
            return None
        pair = SharedPair(*self.config.scaled_pair)
        return None if pair.of(site.in_features, site.out_features) is None else pair

    def notes(self, sites: Sequence[Site]) -> list[str]:
        taken = {id(site.module) for site in sites}
        for site in sites:  # carried modules are selected with their site
            carried = (getattr(site.module, name, None) for name in site.eligible.carries)
            taken.update(map(id, carried))
        selected = ((site.path, _described(site)) for site in sites)
        unselected = (
            (item.path, f"not selected: {self.why_not(item)}")
            for item in self.modules
            if id(item.module) not in taken and (item.entry is not None or self._targeted(item))
        )
        return [*joined_lines(selected), *joined_lines(unselected)]

    def _targeted(self, item: Candidate) -> frozenset[str]:
        """The targeted members of the module; "" is a module that packs none."""
        if self.target is None or self.by_default:
            entry = item.entry
            linear = entry is not None and entry.is_linear and item.module is not self.head
            return item.members if linear else frozenset()
        if id(item.module) in self.walked:
            return item.members
        return item.named_by(self.target)

    def _excluded(self, item: Candidate) -> frozenset[str]:
        if self.exclude is None:
            return frozenset()
        if targets.is_all_linear(self.exclude):
            linear = item.entry is not None and item.entry.is_linear
            return item.members if linear else frozenset()
        return item.named_by(self.exclude)

    def why_not(self, item: Candidate) -> str:
        targeted, spec = self._targeted(item), self.config.target_modules
        if targeted and not targeted - self._excluded(item):
            return f"exclude_modules={self.config.exclude_modules!r:.200} names it"
        if targeted and is_empty(item.module):
            return _EMPTY
        if targeted:
            return f"it cannot carry LoRA: {self._site(item, targeted)}"
        if not self.by_default:
            if isinstance(spec, targets.SavedTargets):
                return "no adapter that was given has factors for it"
            return f"target_modules={spec!r:.200} does not name it"
        kind = type(item.module).__name__
        if item.entry is None:
            return (
                "all linear layers are selected, and its class is not known as one; if it computes "
                f"x Wᵀ, lorafx.register({kind}, ...) says so"
            )
        if item.module is self.head:
            return (
                "all linear layers but the output embedding are selected, as PEFT does; name it in "
                "target_modules"
            )
        return (
            f"all linear layers are selected, and a {kind} is of kind {item.entry.kind!r}; name it "
            "in target_modules"
        )

    def _rows_asked(self, item: Candidate) -> int | None:
        """How many rows of its weight adapters may replace; None for all."""
        names = (*self.suffixes, *item.paths)  # a full path names that module only
        tokens = {name: self.tokens[name] for name in names if name in self.tokens}
        rows = replaceable_rows(self.saved, tokens, item.paths)
        container = item.entry is None and not dict(item.module.named_parameters(recurse=False))
        # What is in a module that is saved as a whole need not have a weight.
        return 0 if rows is None and (container or id(item.module) in self.makers) else rows

    def _unmatched_entries(self) -> Iterator[str]:
        root = type(self.graph.root).__qualname__
        asked = self.config.target_modules
        of = asked.adapters if isinstance(asked, targets.AdapterNames) else {}
        moved = "; if it moved, say so by AdapterSource(..., key_mapping=...)" if of else ""
        lists = {
            "target_modules entry": () if isinstance(self.target, str) else self.target or (),
            "modules_to_save or trainable_tokens entry": (*self.saved, *self.tokens),
        }
        for title, entries in lists.items():
            for entry in entries:
                if not self._names_any(entry):
                    near = self._nearest(entry)
                    by = f" of the adapter {of[entry]!r}" if entry in of else ""
                    yield f"{title} {entry!r}{by} names no module of {root}{near}{moved}"
        for name in self.packed.unused():
            yield (
                f"packed_modules entry {name!r} matches no module, neither as a packed name nor "
                f"as a member{self._nearest(name)}"
            )

    def _why_no_site(self, named: int, excluded: int, left_out: Sequence[str]) -> str:
        """Why none of the `named` modules, of which `excluded` are excluded, is a site."""
        spec, root = self.config.target_modules, type(self.graph.root).__qualname__
        if named == 0:
            return f"target_modules={spec!r} names no module of {root}{self._nearest(str(spec))}"
        if named == excluded:
            return (
                f"exclude_modules={self.config.exclude_modules!r} excludes every module "
                f"that target_modules names ({named}); narrow one of the two"
            )
        return (
            f"target_modules names no module of {root} that can carry LoRA: "
            f"{'; '.join(left_out[:3])}"
        )

    def _warn_of_unmatched_exclusions(self) -> None:
        if self.exclude is None or isinstance(self.exclude, str):
            return
        for entry in self.exclude:
            if not self._names_any(entry):
                _warn(f"exclude_modules entry {entry!r} names no module{self._nearest(entry)}")

    def _names_any(self, entry: str) -> bool:
        known = self._suffixes
        return self.graph.find(entry) is not None or entry in known or folded(entry) in known

    @cached_property
    def _suffixes(self) -> frozenset[str]:
        return frozenset(
            suffix
            for item in self.modules
            for path in item.all_paths
            for suffix in targets.suffixes(path)
        )

    def _nearest(self, entry: str) -> str:
        near = targets.nearest_targets(entry, self.eligible_paths)
        if near or not self.eligible_paths:
            return near
        names = dict.fromkeys(path.rpartition(".")[2] for path in self.eligible_paths)
        return f"; modules that can carry LoRA: {', '.join(list(names)[:5])}"

    def _eligible_below(self, item: Candidate) -> str:
        """A fragment with modules inside of one that cannot carry LoRA itself."""
        if item.entry is not None or len(self.problems) >= _SHOWN:
            return ""
        below = [p for p in self.eligible_paths if not item.path or p.startswith(f"{item.path}.")]
        return f"; eligible below it: {', '.join(below[:3])}" if below else ""

    def _site(self, item: Candidate, selected: frozenset[str]) -> Site | str:
        module = item.module
        entry = item.entry
        if entry is None and not self.by_default:
            entry = by_raw_weight(module)
        reason = impossible(module, entry)
        if reason is not None:
            return reason
        assert entry is not None
        in_features, out_features = entry.sizes(module)
        try:
            slices = None if entry.output_sizes is None else entry.output_sizes(module)
            parts, undeclared = item.parts(slices, in_features, out_features)
        except (AttributeError, TypeError, ValueError) as error:
            return f"its output slices are not known: {error}"
        if slices is None and selected and selected < item.members:
            return (
                f"it packs {', '.join(sorted(item.members))} by packed_modules, but its "
                "class does not give the size of each; see "
                "lorafx.register(output_sizes=...)"
            )
        weight = weight_of(module, entry)
        return Site(
            path=item.path,
            aliases=item.paths[1:],
            module=module,
            eligible=entry,
            in_features=in_features,
            out_features=out_features,
            dtype=self._compute_dtype(module, entry, weight),
            device=weight.device if weight is not None else _device_of(module, self.graph.root),
            parts=tuple(
                replace(
                    part,
                    selected=bool(undeclared) or part.name in selected or selected == item.members,
                )
                for part in parts
            ),
            member_of=item.member_of,
            undeclared=undeclared,
            expert_weight=item.expert_weight,
        )

    def _compute_dtype(
        self, module: nn.Module, entry: Eligible, weight: Tensor | None
    ) -> torch.dtype:
        """The weight's dtype; if it is packed or has 8 bits, the dtype of its computation."""
        if weight is not None and (is_wrapped(weight) or not is_stored(module, entry)):
            return weight.dtype
        declared = getattr(module, "compute_dtype", None)  # bitsandbytes, HQQ
        if isinstance(declared, torch.dtype):
            return declared
        for holder in (module, self.graph.root):
            for tensor in holder.parameters():
                if is_dense(tensor):
                    return tensor.dtype
        return torch.get_default_dtype()


def _described(site: Site) -> str:
    """A site's class, K -> N, dtype and parts; a name of a part that no adapter may use is "-"."""
    cls, registered = type(site.module).__name__, site.eligible.cls.__name__
    text = cls if cls == registered else f"{cls} as {registered}"
    text += f", {site.in_features} -> {site.out_features}, {site.dtype_name}"
    if site.expert_weight is not None:
        text += f", {site.experts} experts"
    parts = [f"{(part.selected and part.name) or '-'} {part.out_features}" for part in site.parts]
    if len(parts) > 1:
        unknown = f"; {', '.join(site.undeclared)}, whose slices are not declared"
        text += f" [{', '.join(parts)}{unknown if site.undeclared else ''}]"
    return text + (f", room for {site.own_rows} rows of an adapter's own" if site.own_rows else "")


def _device_of(module: nn.Module, root: nn.Module) -> torch.device:
    """The device of a module without a weight tensor: that of its other tensors."""
    for holder in (module, root):
        for tensor in (*holder.parameters(), *holder.buffers()):
            return tensor.device
    return torch.get_default_device()


def _warn(message: str) -> None:
    warnings.warn(message, LorafxWarning, stacklevel=2)


def _list_of_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
    more = f"\n  - and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{len(problems)} problems with target_modules:{shown}{more}"

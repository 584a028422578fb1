"""Weights that an adapter has of its own, on their way from a checkpoint to their sites.

    base_model.model.<module>.weight, .bias                               modules_to_save
    base_model.model.<module>.token_adapter.trainable_tokens_delta        trainable_token_indices

PEFT also saves copies of embeddings that were resized or carry LoRA, and of heads
(`<module>.weight`, `<module>.base_layer.weight`). They are read as the first where they differ from
the model's and there is room.

The first are all rows of a weight, (N, K) or (V, N) of an embedding; the second are some rows, and
the configuration says which. Modules that are tied to the input embedding have its trained tokens
too, unless others are saved for them; what is tied to a head does not have the head's.
A module of another kind is refused unless its saved tensors are the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafx.adapter_store.findings import DTYPES, Findings, path_label
from lorafx.adapter_store.peft_keys import TRAINING_KEYS, parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import Setting
from lorafx.model.bank import OwnWeight
from lorafx.model.candidates import by_raw_weight
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.own_row_limits import OWN_KINDS, is_input_embedding, own_refusal, tied_paths
from lorafx.model.sites import Site
from lorafx.registry import lookup

#: As many modules are named in an error.
_NAMED = 8
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")


@dataclass(frozen=True)
class SavedModule:
    """A module whose weights an adapter's file holds: its tensors by attribute, with their keys.
    `named`: it was trained as a whole."""

    path: str
    module: nn.Module
    tensors: dict[str, tuple[str, Tensor]]
    named: bool = True

    @property
    def differs(self) -> bool:
        """Whether they are not what the model has."""
        held = ((getattr(self.module, name, None), t) for name, (_, t) in self.tensors.items())
        return not all(isinstance(own, Tensor) and same(saved, own) for own, saved in held)

    @property
    def eligible(self) -> bool:
        """Whether a row may have a weight of its own here, by the module's class."""
        entry = lookup(self.module) or by_raw_weight(self.module)
        return entry is not None and entry.kind in OWN_KINDS


def saved_modules(state: AdapterState, places: Places, *, with_copies: bool) -> list[SavedModule]:
    """The modules that `modules_to_save` names and the file has, each leaf by itself; and with
    copies, those for whose whole weights there is room."""
    found: dict[str, SavedModule] = {}
    if not (state.config.modules_to_save or with_copies):
        return []
    for key, tensor in state.tensors.items():
        owner, _, attribute = key.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        named = state.config.saves(without_prefix(owner))
        known = parse(key) is not None or key.endswith(TRAINING_KEYS)
        if known or not (named or with_copies):
            continue
        if attribute == "bias" and state.config.bias != "none" and not named:
            continue  # trained without its weight (lorafx.adapter_store.bias_reading)
        module = places.module(owner)
        site = None if module is None else places.site(module)
        if module is None or not (named or (site is not None and _has_room(site))):
            continue
        path = places.current(owner)
        saved = found.setdefault(path, SavedModule(path, module, {}, named))
        saved.tensors[attribute] = key, tensor
    return list(found.values())


def _has_room(site: Site) -> bool:
    """Whether an adapter may have all of the site's weight of its own."""
    return site.own_rows == site.weight_rows


def saved_tokens(state: AdapterState, places: Places) -> Iterator[tuple[str, str, Tensor, str]]:
    """(path of the module, key, its trained rows, path as it was saved)."""
    for key, tensor in state.tensors.items():
        found = _TOKENS.match(key)
        if found is not None:
            saved = without_prefix(found["module"])
            yield places.current(found["module"]), key, tensor, saved


def rows_wanted(state: AdapterState, model: nn.Module) -> tuple[list[str], dict[str, int]]:
    """The modules of `model` that an adapter was trained with as a whole, and the number of rows
    that it has of others, by path. What cannot be told is left to `OwnReading`."""
    if not state.config.modules_to_save and not state.config.trainable_token_indices:
        return [], {}
    places, graph = Places((), model), ModuleGraph.of(model)
    whole = [m.path for m in saved_modules(state, places, with_copies=False) if m.eligible]
    tokens: dict[str, int] = {}
    for path, _, tensor, _ in saved_tokens(state, places):
        module = graph.find(path)
        if module is not None and tensor.dim() == 2 and len(tensor):
            for own in (path, *tied_paths(graph, module)):
                tokens[own] = max(tokens.get(own, 0), len(tensor))
    return whole, tokens


class OwnReading:
    """The rows that one adapter has of its own, by site; problems are noted in the findings."""

    def __init__(self, findings: Findings) -> None:
        self.findings, self.places = findings, findings.places
        self.state, self.config = findings.state, findings.config
        self.keys: set[str] = set()
        self._graph: ModuleGraph | None = None
        self._apart: dict[str, tuple[int, ...] | None] = {}  # tokens by path, as they were saved
        self._reached: set[str] = set()  # paths of modules that have trained tokens
        self._served: list[str] = []  # paths of modules that may have a weight of the adapter's own
        self.found: dict[str, OwnWeight] = {}

    def decode(self) -> dict[str, OwnWeight]:
        """Rows by the path of the site; `keys` are those that are dealt with."""
        modules = saved_modules(self.state, self.places, with_copies=True)
        self._served = [each.path for each in modules if each.eligible and each.named]
        for saved in modules:
            self.keys.update(key for key, _ in saved.tensors.values())
            self.findings.compared |= not saved.named
            if (saved.eligible and saved.named) or saved.differs:
                self._whole(saved)
        tokens = [*saved_tokens(self.state, self.places)]
        self._apart = {path: self.config.tokens_of(name) for path, _, _, name in tokens}
        for path, key, rows, name in tokens:
            self.keys.add(key)
            self._tokens(path, key, rows, name)
        self._reached.update(name for _, _, _, name in tokens)
        self._complete(modules)
        return self.found

    def _complete(self, saved: list[SavedModule]) -> None:
        """Note what the configuration says was trained and the file lacks: rows of the adapter
        would get the base's."""
        if self.config.modules_to_save:
            held = {id(each.module): each.tensors for each in saved}
            for path, module in self.places.named_modules():
                if not self.config.trains(path):
                    continue
                for name, _ in module.named_parameters(recurse=False):
                    if name not in held.get(id(module), {}):
                        self._lacks(path, module, name)
        self.findings.problems.extend(
            f"trainable_token_indices names tokens{name and f' of {name!r}'}, but the file has no "
            "rows for them"
            for name, ids in self.config.trainable_token_indices.items()
            if ids and not any(path.endswith(name) for path in self._reached)
        )

    def _whole(self, saved: SavedModule) -> None:
        site, label = self.places.site(saved.module), self._label(saved.path, saved.module)
        if not saved.eligible:
            self.findings.unsupported.append(
                f"{label} was trained as a whole (modules_to_save), and only linears and "
                f"embeddings have another weight for each row; train the adapter {self._without()}"
                ", or merge it into a copy of the base model"
            )
            return
        if site is None or not _has_room(site):
            self._no_room(label, "modules_to_save", [saved.path])
            return
        shapes = {"weight": 2, "bias": 1}
        weight_name = site.eligible.weight
        for attribute, (key, tensor) in saved.tensors.items():
            known = shapes.get("weight" if attribute == weight_name else attribute)
            if known is None or not self._holds(saved.module, attribute):
                self.findings.unsupported.append(
                    f"{key}: {label} was trained as a whole (modules_to_save), and only a weight "
                    "and a bias that the base has too can be exchanged for each row"
                )
                return
            if not self.findings.sound(key, tensor):
                return
            if tensor.dim() != known:
                self.findings.problems.append(f"{key} has shape {tuple(tensor.shape)}")
                return
        held = [name for name in (weight_name, "bias") if self._holds(saved.module, name)]
        if lacks := [name for name in held if name not in saved.tensors]:
            self._lacks(saved.path, saved.module, lacks[0])
            return
        key, rows = saved.tensors[weight_name]
        rows = rows.mT if site.eligible.transposed else rows
        bias = saved.tensors["bias"][1] if "bias" in saved.tensors else None
        if not self._sized(label, key, rows, bias, site):
            return
        self._keep(saved.path, site, OwnWeight(rows, bias))

    def _without(self) -> str:
        """How to train what can be served."""
        if 0 < len(self._served) <= _NAMED:
            return f"with modules_to_save={self._served}"
        return "without this module"

    def _lacks(self, path: str, module: nn.Module, name: str) -> None:
        problem = (
            f"{self._label(path, module)} has a weight of the adapter's own (modules_to_save), but "
            f"the file has no {path}.{name}"
        )
        if problem not in self.findings.problems:
            self.findings.problems.append(problem)

    @staticmethod
    def _holds(module: nn.Module, name: str) -> bool:
        return isinstance(getattr(module, name, None), Tensor)

    def _sized(self, label: str, key: str, rows: Tensor, bias: Tensor | None, site: Site) -> bool:
        embedding = site.eligible.kind == "embedding"
        features = site.out_features if embedding else site.in_features
        if rows.shape[1] != features or (bias is not None and len(bias) != len(rows)):
            self.findings.problems.append(
                f"{key} has shape {tuple(rows.shape)}, {label} needs (…, {features})"
            )
            return False
        if len(rows) > site.weight_rows:
            self.findings.problems.append(
                f"{key} has {len(rows)} rows, and {label} has {site.weight_rows}: a larger "
                f"vocabulary needs model.resize_token_embeddings({len(rows)}) before compiling, "
                "more labels a base model that was loaded with as many"
            )
            return False
        return True

    def _tokens(self, path: str, key: str, rows: Tensor, saved: str) -> None:
        if self._graph is None:
            self._graph = ModuleGraph.of(self.places.model)
        graph = self._graph
        module = graph.find(path)
        if module is None:
            self.findings.problems.append(
                f"{key}: no such module in this model{self.places.nearest(path)}"
            )
            return
        at = self.config.tokens_of(saved)
        if at is None:
            self.findings.problems.append(
                f"{key} holds trained tokens, but trainable_token_indices does not say of "
                f"{saved} which"
            )
            return
        if not self.findings.sound(key, rows):
            return
        if rows.dim() != 2 or len(rows) != len(at):
            self.findings.problems.append(
                f"{key} has shape {tuple(rows.shape)}, trainable_token_indices names {len(at)} "
                "tokens"
            )
            return
        places = [path, *self._followers(path, module)]
        self._reached.update(places)
        for own in places:
            owner = graph.find(own)
            assert owner is not None
            site, label = self.places.site(owner), self._label(own, owner)
            if site is None or site.own_rows < len(rows):
                self._no_room(label, "trainable_tokens", len(rows))
                return
            beyond = [index for index in at if index >= site.weight_rows]
            if beyond:
                self.findings.problems.append(
                    f"{key}: token {beyond[0]} is not one of the {site.weight_rows} of {label}; "
                    f"call model.resize_token_embeddings({max(beyond) + 1}) before compiling"
                )
                return
            if isinstance(getattr(owner, "bias", None), Tensor):
                self.findings.unsupported.append(
                    f"{key}: {label} adds a bias, and what PEFT computes of trained tokens "
                    "leaves it out"
                )
                return
            # In order: all rows of a weight are then those that it has, one after the other.
            indices, order = torch.tensor(at, dtype=torch.int32).sort()
            if self._sized(label, key, rows, None, site):
                self._keep(own, site, OwnWeight(rows[order], None, indices))

    def _followers(self, path: str, module: nn.Module) -> list[str]:
        """Other modules that have the trained tokens of the one at `path`."""
        assert self._graph is not None
        if not is_input_embedding(self._graph, path, module):
            return []
        tied, mine = tied_paths(self._graph, module), self._apart[path]
        return [other for other in tied if self._apart.get(other, mine) == mine]

    def _keep(self, path: str, site: Site, weight: OwnWeight) -> None:
        reason = own_refusal(site)
        if reason is not None:
            self.findings.unsupported.append(
                f"{path_label(path)} cannot have a weight of its own for each row: {reason}"
            )
        elif site.path in self.found:
            self.findings.problems.append(f"{path_label(path)} is saved twice; keep one")
        else:
            self.found[site.path] = weight

    def _no_room(self, label: str, setting: str, value: object) -> None:
        asked = Setting.asked(setting, value, given=True)
        self.findings.settings.append(asked)
        self.findings.no_room.append(
            f"{label} has a weight of the adapter's own, for which there is no room; {asked}"
        )

    @staticmethod
    def _label(path: str, module: nn.Module) -> str:
        return f"{path_label(path)} ({type(module).__qualname__})"


def same(saved: Tensor, own: Tensor) -> bool:
    """Whether a saved copy is the model's tensor, up to the rounding of the narrower dtype."""
    if saved.shape != own.shape or not {saved.dtype, own.dtype} <= {*DTYPES}:
        return False
    if own.is_meta:
        return True  # no values to differ from; they are compared when the real model is loaded
    own = own.detach().cpu()
    return torch.equal(saved.to(own.dtype), own) or torch.equal(saved, own.to(saved.dtype))

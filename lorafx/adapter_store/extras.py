"""Reads the weights and biases that an adapter replaces.

    base_model.model.<module>.weight, .bias                               modules_to_save
    base_model.model.<module>.token_adapter.trainable_tokens_delta        trainable_token_indices
    base_model.model.<module>.base_layer.bias    bias="lora_only" or "all": b' for the base's b
    base_model.model.<module>.bias               bias="all": of a module without factors
    base_model.model.<module>.lora_W.weight      W′ = f(W), of another method (`ChangedWeight`)

A whole weight is (N, K), of an embedding (V, N). Modules tied to the input embedding get its
trained tokens, unless others are saved for them. Saved copies of heads and embeddings that differ
from the model's are whole weights if there is room. Other modules (norms) are refused unless their
saved values are the model's.

One file: what is read of a module and the room that it needs are told from the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.findings import (
    Findings,
    check_sound,
    equal,
    path_label,
)
from lorafx.adapter_store.peft_keys import TRAINING_KEY, parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.adapter_store.saved import AdapterState
from lorafx.adapter_store.stored import LoraWeights
from lorafx.model.bank import OwnWeight
from lorafx.model.candidates import by_raw_weight
from lorafx.model.extras import (
    EXTRAS,
    OWN_KINDS,
    Extra,
    bias_of,
    bias_refusal,
    is_input_embedding,
    own_refusal,
    structure_refusal,
    tied_paths,
)
from lorafx.model.made_weights import maker_of
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.registry import lookup

_NAMED = 8
_TOKENS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")


def check_vector(
    extra: Extra, key: str, vector: Tensor, label: str, sites: Iterable[Site], count: int
) -> None:
    """Raise `Problem` unless `vector` is (count,) and these sites can have it."""
    for site in sites:
        reason = extra.refusal(site)
        if reason is not None:
            raise Unsupported(f"{key}: {label} cannot have {extra.what}: {reason}")
    check_sound(key, vector)
    if tuple(vector.shape) != (count,):
        raise Problem(f"{key} has shape {tuple(vector.shape)}, {label} needs ({count},)")


@dataclass(frozen=True)
class SavedModule:
    """A module whose weights a file has, with their keys; `named` if it was trained as a whole."""

    path: str
    module: nn.Module
    tensors: dict[str, tuple[str, Tensor]]
    named: bool = True

    @property
    def differs(self) -> bool:
        pairs = ((getattr(self.module, name, None), t) for name, (_, t) in self.tensors.items())
        return not all(isinstance(base, Tensor) and equal(saved, base) for base, saved in pairs)

    @property
    def eligible(self) -> bool:
        """Whether adapters may replace rows of the weight, by the module's class."""
        entry = lookup(self.module) or by_raw_weight(self.module)
        return entry is not None and entry.kind in OWN_KINDS


def _saved_modules(state: AdapterState, places: Places, *, with_copies: bool) -> list[SavedModule]:
    """The modules of `modules_to_save` in the file; `with_copies` also others that have room."""
    modules: dict[str, SavedModule] = {}
    if not (state.config.modules_to_save or with_copies):
        return []
    for key, tensor in state.tensors.items():
        owner, _, attribute = key.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        named = state.config.saves(without_prefix(owner))
        is_factor = parse(key) is not None or TRAINING_KEY.fullmatch(key)
        bias = attribute == "bias" and state.config.bias != "none"  # trained without its weight
        if is_factor or not (named or (with_copies and not bias)):
            continue
        module = places.module(owner)
        site = None if module is None else places.site(module)
        if module is None or not (named or (site is not None and _has_room(site))):
            continue
        path = places.current(owner)
        saved = modules.setdefault(path, SavedModule(path, module, {}, named))
        saved.tensors[attribute] = key, tensor
    return list(modules.values())


def _has_room(site: Site) -> bool:
    return site.own_rows == site.weight_rows


def _saved_tokens(state: AdapterState, places: Places) -> Iterator[tuple[str, str, Tensor, str]]:
    """Yields (path of the module, key, its trained rows, path as it was saved)."""
    for key, tensor in state.tensors.items():
        match = _TOKENS.match(key)
        if match is not None:
            saved = without_prefix(match["module"])
            yield places.current(match["module"]), key, tensor, saved


def rows_wanted(state: AdapterState, model: nn.Module) -> tuple[list[str], dict[str, int]]:
    """The paths of `model`'s modules that were trained as a whole, and the numbers of trained rows
    of others. Problems are left to `ExtrasReading`."""
    changed = {key: made.weight for key, made in state.made.items() if made.weight is not None}
    config = state.config
    if not (changed or config.modules_to_save or config.trainable_token_indices):
        return [], {}
    places, graph = Places((), model), ModuleGraph(model)
    whole = [m.path for m in _saved_modules(state, places, with_copies=False) if m.eligible]
    tokens: dict[str, int] = {}
    for key, weight in changed.items():
        factor = parse(key)
        assert factor is not None
        path = places.current(factor.module)
        module = graph.find(path)
        entry = None if module is None else lookup(module)
        if module is not None and entry is not None and entry.is_linear:
            in_features, out_features = entry.sizes(module)
            made = bool(maker_of(module, entry.weight))
            with suppress(ValueError):
                weight = weight.fitted(out_features, in_features, made=made)
                if weight.structure is not None:
                    tokens[path] = weight.rows(out_features, in_features)
                    continue
        if entry is None or entry.kind in OWN_KINDS:
            whole.append(path)
    for path, _, tensor, _ in _saved_tokens(state, places):
        module = graph.find(path)
        if module is not None and tensor.dim() == 2 and len(tensor):
            for tied in (path, *tied_paths(graph, module)):
                tokens[tied] = max(tokens.get(tied, 0), len(tensor))
    return whole, tokens


class ExtrasReading:
    """The replaced rows and biases of a file, by site path; `keys` are the keys that were read."""

    def __init__(self, findings: Findings) -> None:
        self.findings, self.places = findings, findings.places
        self.state, self.config = findings.state, findings.config
        self.keys: set[str] = set()
        self.own_weights: dict[str, OwnWeight] = {}
        self.changed: dict[str, ChangedWeight] = {}
        self.biases: dict[str, tuple[Site, Tensor]] = {}
        self._token_ids: dict[str, tuple[int, ...] | None] = {}  # by path
        self._with_tokens: set[str] = set()  # paths of modules with trained tokens
        self._replaceable: list[str] = []  # paths of modules trained as a whole
        self._with_bias: set[int] = set()  # modules whose biases are in the file

    def decode(self) -> None:
        modules = _saved_modules(self.state, self.places, with_copies=True)
        self._replaceable = [saved.path for saved in modules if saved.eligible and saved.named]
        for saved in modules:
            self.keys.update(key for key, _ in saved.tensors.values())
            if (saved.eligible and saved.named) or saved.differs:
                with self.findings.noting():
                    self._add_module(saved)
        tokens = [*_saved_tokens(self.state, self.places)]
        self._token_ids = {path: self.config.tokens_of(name) for path, _, _, name in tokens}
        graph = ModuleGraph(self.places.model) if tokens else None
        for path, key, rows, name in tokens:
            assert graph is not None
            self.keys.add(key)
            self._with_tokens.add(name)
            with self.findings.noting():
                self._add_tokens(graph, path, key, rows, name)
        self._refuse_absent(modules)
        if self.config.bias != "none":
            for key, tensor in self.state.tensors.items():
                with self.findings.noting():
                    self._add_bias(key, tensor)

    def _refuse_absent(self, saved: list[SavedModule]) -> None:
        """Note trained modules that the file lacks: the base's weight would be served for them."""
        tensors = {id(item.module): item.tensors for item in saved}
        named = self.places.named_modules() if self.config.modules_to_save else ()
        for path, module in named:
            if self.config.trains(path):
                for name, _ in module.named_parameters(recurse=False):
                    if name not in tensors.get(id(module), {}):
                        self._note_absent(path, module, name)
        self.findings.problems.extend(
            f"trainable_token_indices names tokens{name and f' of {name!r}'}, but the file has no "
            "rows for them"
            for name, ids in self.config.trainable_token_indices.items()
            if ids and not any(path.endswith(name) for path in self._with_tokens)
        )

    def _add_module(self, saved: SavedModule) -> None:
        site, label = self.places.site(saved.module), _label(saved.path, saved.module)
        if not saved.eligible:
            few = 0 < len(self._replaceable) <= _NAMED
            advice = f"with modules_to_save={self._replaceable}" if few else "without this module"
            raise Unsupported(
                f"{label} was trained as a whole (modules_to_save), and only linears and "
                f"embeddings have another weight for each row; train the adapter {advice}, or "
                "merge it into a copy of the base model"
            )
        if site is None or not _has_room(site):
            self.findings.no_room[saved.path] = None
            return
        weight_name = site.eligible.weight
        dims = {weight_name: 2, "bias": 1}
        present = [name for name in dims if isinstance(getattr(saved.module, name, None), Tensor)]
        for attribute, (key, tensor) in saved.tensors.items():
            if attribute not in present:
                raise Unsupported(
                    f"{key}: {label} was trained as a whole (modules_to_save), and only a weight "
                    "and a bias that the base has too can be exchanged for each row"
                )
            check_sound(key, tensor)
            if tensor.dim() != dims[attribute]:
                raise Problem(f"{key} has shape {tuple(tensor.shape)}")
        if absent := [name for name in present if name not in saved.tensors]:
            self._note_absent(saved.path, saved.module, absent[0])
            return
        key, rows = saved.tensors[weight_name]
        rows = rows.mT if site.eligible.transposed else rows
        bias = saved.tensors["bias"][1] if "bias" in saved.tensors else None
        self._add_weight(saved.path, site, label, key, OwnWeight(rows, bias))

    def _note_absent(self, path: str, module: nn.Module, name: str) -> None:
        problem = (
            f"{_label(path, module)} has a weight of the adapter's own (modules_to_save), but "
            f"the file has no {path}.{name}"
        )
        if problem not in self.findings.problems:
            self.findings.problems.append(problem)

    def _add_tokens(self, graph: ModuleGraph, path: str, key: str, rows: Tensor, name: str) -> None:
        module, ids = graph.find(path), self.config.tokens_of(name)
        if module is None:
            raise Problem(f"{key}: no such module in this model{self.places.nearest(path)}")
        if ids is None:
            raise Problem(
                f"{key} holds trained tokens, but trainable_token_indices does not say of "
                f"{name} which"
            )
        check_sound(key, rows)
        if rows.dim() != 2 or len(rows) != len(ids):
            raise Problem(
                f"{key} has shape {tuple(rows.shape)}, trainable_token_indices names {len(ids)} "
                "tokens"
            )
        followers: list[str] = []
        if is_input_embedding(graph, path, module):
            tied, known = tied_paths(graph, module), self._token_ids
            followers = [other for other in tied if known.get(other, known[path]) == known[path]]
        # Sorted, so that a whole weight has its rows in order.
        indices, order = torch.tensor(ids, dtype=torch.int32).sort()
        for place in (path, *followers):
            self._with_tokens.add(place)
            owner = graph.find(place)
            assert owner is not None
            site, label = self.places.site(owner), _label(place, owner)
            if site is None or site.own_rows < len(rows):
                self.findings.no_room[place] = len(rows)
                return
            excess = [index for index in ids if index >= site.weight_rows]
            if excess:
                raise Problem(
                    f"{key}: token {excess[0]} is not one of the {site.weight_rows} of {label}; "
                    f"call model.resize_token_embeddings({max(excess) + 1}) before compiling"
                )
            if isinstance(getattr(owner, "bias", None), Tensor):
                raise Unsupported(
                    f"{key}: {label} adds a bias, and what PEFT computes of trained tokens "
                    "leaves it out"
                )
            self._add_weight(place, site, label, key, OwnWeight(rows[order], None, indices))

    def _add_weight(self, path: str, site: Site, label: str, key: str, weight: OwnWeight) -> None:
        rows, bias, *_ = weight
        embedding = site.eligible.kind == "embedding"
        features = site.out_features if embedding else site.in_features
        if rows.shape[1] != features or (bias is not None and len(bias) != len(rows)):
            raise Problem(f"{key} has shape {tuple(rows.shape)}, {label} needs (…, {features})")
        if len(rows) > site.weight_rows:
            raise Problem(
                f"{key} has {len(rows)} rows, and {label} has {site.weight_rows}: a larger "
                f"vocabulary needs model.resize_token_embeddings({len(rows)}) before compiling, "
                "more labels a base model that was loaded with as many"
            )
        reason = own_refusal(site)
        if reason is not None:
            raise Unsupported(
                f"{path_label(path)} cannot have a weight of its own for each row: {reason}"
            )
        if site.path in self.own_weights:
            raise Problem(f"{path_label(path)} is saved twice; keep one")
        self.own_weights[site.path] = weight

    def add_changed(self, site: Site, key: str, label: str, changed: ChangedWeight) -> None:
        """Note a weight that is a function of the base's."""
        sizes = (site.out_features, site.in_features)
        made = bool(maker_of(site.module, site.eligible.weight))
        try:
            changed = changed.fitted(*sizes, made=made)
        except ValueError as error:
            raise Problem(f"{key}: {label} has a weight of {sizes}, {error}") from None
        if site.eligible.kind != "linear":
            raise Unsupported(
                f"{key}: {label} cannot have a weight of its own for each row: only linears can, "
                "for what is no product of small factors; merge the adapter into a copy of the "
                "base model"
            )
        refusal = own_refusal if changed.structure is None else structure_refusal
        if reason := refusal(site):
            raise Unsupported(f"{key}: {label} cannot have a weight of its own: {reason}")
        (_, trained), base = self.biases.get(site.path, (site, None)), bias_of(site)
        same = trained is None or (base is not None and equal(trained, base))
        if changed.bias is not None and not same:
            raise Unsupported(
                f"{key} changes the bias of {label}, which was trained besides (bias = "
                f"{self.config.bias!r}); merge the adapter into a copy of the base model"
            )
        if (rows := changed.rows(*sizes)) > site.own_rows:
            self.findings.no_room[site.path] = None if changed.structure is None else rows
        elif site.path in self.own_weights or site.path in self.changed:
            raise Problem(f"{label} is saved twice; keep one")
        else:
            self.changed[site.path] = changed

    def _add_bias(self, key: str, bias: Tensor) -> None:
        owner, _, attribute = key.rpartition(".")
        if attribute != "bias" or parse(key) is not None:
            return
        path = owner.removesuffix(".base_layer")
        module = self.places.module(path)
        base = getattr(module, "bias", None)
        if module is None or not isinstance(base, Tensor):
            return  # reported as an unknown name
        self._with_bias.add(id(module))
        site, label = self.places.site(module), _label(self.places.current(path), module)
        if site is not None and site.path in self.own_weights:
            return
        self.keys.add(key)
        if site is not None and (bias_refusal(site) is None or not equal(bias, base)):
            check_vector(EXTRAS["bias"], key, bias, label, [site], site.out_features)
            self.biases[site.path] = site, bias
        elif not equal(bias, base):
            raise Unsupported(
                f"{key}: the bias of {label} was trained (bias = {self.config.bias!r}), and it "
                "carries no LoRA here; only linears and convolutions that are named by "
                "target_modules have another bias for each row"
            )

    def with_biases(self, weights: dict[str, LoraWeights]) -> dict[str, LoraWeights]:
        """The factors by part path with biases, and zero factors where only biases were trained.
        Biases equal to the base's are kept where there are factors, since the base's may change."""
        combined = dict(weights)
        for site, bias in self.biases.values():
            base = bias_of(site)
            sizes = [part.out_features for part in site.parts]
            for index, piece in enumerate(bias.split(sizes)):
                path, part = site.part_path(index), site.parts[index]
                if path not in combined:
                    if base is not None and equal(piece, base):
                        continue
                    a, b = torch.zeros(1, part.in_features), torch.zeros(len(piece), 1)
                    combined[path] = LoraWeights(a, b, 0.0)
                combined[path] = combined[path]._replace(own_bias=piece)
        return combined

    def refuse_absent_biases(self, sites: Sequence[Site]) -> None:
        if self.config.bias == "none":
            return
        for site in dict.fromkeys(sites):
            has_bias = isinstance(getattr(site.module, "bias", None), Tensor)
            if has_bias and id(site.module) not in self._with_bias:
                self.findings.problems.append(
                    f"bias = {self.config.bias!r} says that the bias of {path_label(site.path)} "
                    "was trained, but the file does not have it (some versions of PEFT do not "
                    "save it)"
                )


def _label(path: str, module: nn.Module) -> str:
    return f"{path_label(path)} ({type(module).__qualname__})"

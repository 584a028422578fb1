"""Reads LoRA checkpoints: every saved tensor is placed, or an error names it.

    ΔW = s · B A,  A (r, K), B (N, r);   embeddings: A (r, V), ΔE = s · (B A)ᵀ;   DoRA: m (N,)

If a name packs several sites, B is split by their output sizes and A is shared. A's rank must be
the configured rank, which s = α/r comes from. All problems of a file are found before anything is
raised, and reading changes nothing.

Targeted modules without factors keep W: correct for a language adapter whose `q_proj` also matches
the vision tower, but indistinguishable from lost tensors. So there is a warning, or an error if
`strict`. It covers the selected sites and parts, or, if adapters were the selection, every module.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.expert_reading import ExpertReading
from lorafx.adapter_store.extras import ExtrasReading, check_vector, rows_wanted
from lorafx.adapter_store.findings import (
    Findings,
    Problem,
    Unsupported,
    check_shape,
    check_sound,
    listed,
    path_label,
    same,
)
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import (
    TRAINING_KEYS,
    FactorKey,
    factor_sizes,
    parse,
    without_prefix,
)
from lorafx.adapter_store.places import (
    TARGETS,
    ExpertPlace,
    Places,
    SiteLanding,
    SitePart,
    saved_sizes,
)
from lorafx.adapter_store.stored import Adapter as Adapter
from lorafx.adapter_store.stored import LoraWeights
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning, some
from lorafx.model import targets
from lorafx.model.candidates import unsupported
from lorafx.model.convolutions import convolution_of, matrices
from lorafx.model.experts import PROJECTIONS, Columns, ExpertWeight, covers, overlapping, unnested
from lorafx.model.extras import EXTRAS, When
from lorafx.model.module_graph import join
from lorafx.model.packed_names import spans
from lorafx.model.sites import Site
from lorafx.registry import is_empty, lookup

#: With `save_embedding_layers`, which a grown vocabulary enables, `save_pretrained` writes
#: embeddings and heads with everything in their wrappers.
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")
#: Vectors over outputs: the field that enables them, and their keys' end.
_VECTORS: Mapping[When, tuple[str, str]] = {
    "dora": ("use_dora", "lora_magnitude_vector"),
    "bias": ("lora_bias", "lora_B.bias"),
}
_KINDS = {"embedding": "an embedding", "conv": "a convolution"}


class AdapterTargets(NamedTuple):
    """An adapter's module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: Any, model: nn.Module) -> AdapterTargets:
    """The modules of `model` that an adapter's keys name, under current names, and its largest
    rank. Raises as `read_adapter`, except for shapes and placement."""
    modules: dict[str, None] = {}
    rank = 0
    state, places = load_state(source, model), Places((), model)
    for path, sizes in factor_sizes(state.tensors).items():
        place, rows = places.meaning(path), sizes.rank
        if isinstance(place, ExpertPlace):
            modules.update(dict.fromkeys(_parameters(place, state.config)))
            rows = _rank_of(place, state.config, rows)
        else:
            modules[places.current(path)] = None
        rank = max(rank, rows)
    if (not modules or not rank) and not any(rows_wanted(state, model)):
        raise CheckpointError(f"{state.where} holds no LoRA factors (lora_A, lora_B)")
    return AdapterTargets(tuple(modules), max(rank, 1))


def read_adapter(
    source: Any,
    name: str,
    sites: Sequence[Site],
    *,
    model: nn.Module,
    max_rank: int | None = None,
    lora_config: LoraConfig | None = None,
    strict: bool = False,
    warn: bool = True,
) -> Adapter:
    """Read the adapter `source`, as in `load_state`, and place every tensor on one of `sites`.

    Args:
        sites: the selected sites; keys may use any of their paths, names of parts of packed sites,
            and packed names of separate sites (`LoraConfig.packed_modules`).
        model: root module of `sites`, with whose weights saved copies are compared.
        max_rank: largest rank of the banks.
        lora_config: the selection of `sites`. If adapters' targets were the selection, modules that
            are no sites count as left out too.
        strict: a targeted module without factors is a problem, not a warning.

    Raises:
        UnsupportedAdapterError: arithmetic beyond LoRA.
        CapacityError: only ranks over `max_rank`, or no room for replaced weights.
        CheckpointError: anything else, all problems of the file at once.
    """
    state = load_state(source, model, warn=warn)
    findings = Findings(state, Places(sites, model), max_rank)
    reading = Reading(findings)
    weights = reading.run()
    missing = () if reading.unknown else tuple(dict.fromkeys(_Search(reading, lora_config).run()))
    total = len(missing) + len(reading.landings) + len(reading.experts.paths)
    left_out = (
        f"its configuration targets {total} modules here, but its file has no factors for "
        f"{len(missing)} of them ({100 * len(missing) / (total or 1):.0f} %): {some(missing, 8)}"
    )
    if strict and missing:
        findings.problems.append(f"{left_out}; strict=True makes this an error")
    findings.raise_problems(name)
    if missing and warn:
        warnings.warn(
            f"adapter {name!r} in {state.where}: {left_out}. These modules keep the base "
            "weights, which is right if the adapter was trained on only a part of the "
            "model; otherwise the file is incomplete. strict=True makes this an error",
            LorafxWarning,
            stacklevel=2,
        )
    return Adapter(
        name,
        weights,
        findings.largest,
        state.where,
        own=reading.extras.own,
        replaces_biases=state.config.bias != "none",
        compared=reading.compared,
        invocation=state.config.invocation,
    )


def _parameters(place: ExpertPlace, config: PeftConfig) -> list[str]:
    experts, saved = place.experts, unnested(place.saved)
    targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
    weights = [place.weight] if place.weight is not None else targeted or experts.weights
    return [weight.path(experts.path) for weight in weights]


def _rank_of(place: ExpertPlace, config: PeftConfig, rows: int) -> int:
    if place.expert is not None:
        return rows
    configured = {config.r, *config.rank_pattern.values()} - {None} or {rows}
    stacked = place.weight is None or rows not in configured
    return max(rows // place.experts.count, 1) if stacked else rows


class Reading:
    """A checkpoint on its way into factors by site.

    Attributes:
        landings, factors: targets of factors, and their keys by letter.
        unselected, unknown: saved paths without a site, and without any meaning.
        decoded: part paths with factors, except experts'.
        compared: as in `Adapter`.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.state, self.config, self.places = findings.state, findings.config, findings.places
        self.problems, self.closed = findings.problems, findings.closed
        self.landings: dict[object, SiteLanding] = {}
        self.factors: dict[object, dict[str, FactorKey]] = {}
        self.unselected: dict[str, nn.Module] = {}
        self.unknown: dict[str, None] = {}
        self.experts = ExpertReading(findings)
        self.extras = ExtrasReading(findings)
        self.decoded: set[str] = set()
        self.compared = False

    def run(self) -> dict[str, LoraWeights]:
        """The factors by part path; problems go to the findings."""
        self.extras.decode()
        for key in self.state.tensors:
            factor = parse(key)
            if key in self.extras.keys:
                continue
            with self.findings.noting():
                if factor is None:
                    self._other_key(key)
                else:
                    self._place(factor)
        decoded: dict[str, LoraWeights] = {}
        saved_as: dict[str, str] = {}
        for meant, landing in self.landings.items():
            with self.findings.noting():
                for path, weights in self._decode(landing, self.factors[meant]):
                    if path in decoded:
                        raise Problem(
                            f"{landing.saved} and {saved_as[path]} both have factors for "
                            f"{path_label(path)}; keep one"
                        )
                    if weights.magnitude is not None and path in self.extras.own:
                        raise Unsupported(
                            f"{path}: the norms of DoRA are those of the base weight, and the "
                            "adapter has a weight of its own there"
                        )
                    decoded[path], saved_as[path] = weights, landing.saved
        experts = dict(self.experts.decode())
        if self.config.use_dora and self.experts.paths:
            self.findings.unsupported.append(
                "use_dora is set with factors of routed experts "
                f"({listed(sorted(self.experts.paths))}): the weight of each expert would "
                "have its own norms, which lorafx does not support"
            )
        self._report_placement()
        found = self.extras.with_biases(decoded)
        sites = [site for item in self.landings.values() for site, _ in item.places]
        self.extras.refuse_absent_biases(sites)
        self.decoded.update(found)
        some = self.factors or self.experts.paths or self.extras.keys or found
        if not (some or self.unknown or self.unselected or self.closed):
            self.problems.append("the file holds no LoRA factors (lora_A, lora_B)")
        return found | experts

    def _place(self, factor: FactorKey) -> None:
        found = self.places.meaning(factor.module)
        if found is None:
            self.unknown[factor.module] = None
            return
        if isinstance(found, ExpertPlace):
            self.experts.take(factor, found)
            return
        if isinstance(found, nn.Module):
            if not is_empty(found):  # else B A has no numbers either
                self.unselected[without_prefix(factor.module)] = found
            return
        if found.missing:
            self.closed[found.saved] = found.missing
            return
        self.landings.setdefault(found.key, found)
        factors = self.factors.setdefault(found.key, {})
        site = found.places[0][0]
        kind = site.eligible.kind
        if factor.letter in "AB" and factor.embedding != (kind == "embedding"):
            raise Problem(
                f"{factor.key}: {factor.factor} on {_label(found)}, which is "
                f"{_KINDS.get(kind, 'a linear layer')} here ({type(site.module).__name__})"
            )
        first = factors.setdefault(factor.letter, factor)
        self.findings.check_same(factor, first.key, _label(found))

    def _decode(
        self, landing: SiteLanding, keys: dict[str, FactorKey]
    ) -> Iterator[tuple[str, LoraWeights]]:
        if not keys:
            return  # factors of the wrong kind, noted when they were placed
        label = _label(landing)
        lacks = [letter for letter in "AB" if letter not in keys]
        if lacks:
            raise Problem(f"{next(iter(keys.values())).key}: {label} has no factor {lacks[0]}")
        a, b = self._matrices(landing, label, keys["A"].key, keys["B"].key)
        rank = a.shape[0] if a.dim() == 2 else 0
        places = self._covered(landing)
        sizes = [saved_sizes(place) for place in places]
        n, k = sum(size for _, size in sizes), sizes[0][0]
        check_shape(keys["A"].key, a, (rank, k), f"{label} needs (r, {k})")
        if len(places) == 1:
            check_shape(keys["B"].key, b, (n, rank), f"{label} needs ({n}, r = {rank})")
        elif tuple(b.shape) != (n, rank) or (landing.undeclared and places == landing.places):
            covered = ", ".join(
                f"{site.part_path(i).rpartition('.')[2]} {size}"
                for (site, i), (_, size) in zip(places, sizes, strict=True)
            )
            rows = b.shape[0] if b.dim() else 0
            raise Problem(
                f"{keys['B'].key} has shape {tuple(b.shape)}, whose {rows} rows cannot be split "
                f"over the slices of {label}: it covers {covered}, {n} rows in all (and r = "
                f"{rank}); declare with packed_modules which slices each name covers"
            )
        owner, times = self.places.carried(landing.saved)
        name = self.config.name_of(owner, places[0][0].eligible.weight)
        s = self.findings.scale(label, name, landing.saved, rank)
        if s is None:
            return
        m = self._vector("dora", label, keys.get("m"), places, n)
        bias = self._vector("bias", label, keys.get("b"), places, n)
        start = 0
        for (site, index), (_, size) in zip(places, sizes, strict=True):
            rows_of_part = slice(start, start + size)
            start += size
            part_a, part_b = a, b[rows_of_part]
            part_m, part_bias = (None if v is None else v[rows_of_part] for v in (m, bias))
            sharding, slices = site.eligible.sharding, site.parts[index].slices
            if sharding is not None:
                part_a, part_b = sharding.cut(site.module, slices, a, part_b)
                if part_m is not None:
                    part_m = sharding.cut(site.module, slices, a, part_m[:, None])[1].squeeze(1)
                    if part_a.shape[1] < a.shape[1]:
                        raise Unsupported(
                            f"{label}: DoRA's norm is over all inputs, which several ranks share "
                            "here"
                        )
            weights = LoraWeights(part_a, part_b, times * s, magnitude=part_m, bias=part_bias)
            yield site.part_path(index), weights

    def _covered(self, landing: SiteLanding) -> tuple[SitePart, ...]:
        """The parts that the factors are for: of a name without declared slices those that the rows
        of B determine beside the rows of the other names, or all, which it cannot be for."""
        if not landing.undeclared:
            return landing.places
        names = landing.places[0][0].undeclared
        keys = [self.factors.get(replace(landing, undeclared=name).key, {}) for name in names]
        shapes = (
            self.state.tensors[found["B"].key].shape if "B" in found else None for found in keys
        )
        rows = [None if shape is None else next(iter(shape), 0) for shape in shapes]
        sizes = [saved_sizes(place)[1] for place in landing.places]
        possible = spans(sizes, rows)[names.index(landing.undeclared)]
        return landing.places[slice(*possible.pop())] if len(possible) == 1 else landing.places

    def _matrices(
        self, landing: SiteLanding, label: str, key_a: str, key_b: str
    ) -> tuple[Tensor, Tensor]:
        a, b = self.state.tensors[key_a], self.state.tensors[key_b]
        check_sound(key_a, a)
        check_sound(key_b, b)
        site = landing.places[0][0]
        made = matrices(site.module, a, b) if site.eligible.kind == "conv" else (a, b)
        if made is None:
            conv = convolution_of(site.module)
            kernel = ", ".join(map(str, conv.kernel_size))
            groups = "" if conv.groups == 1 else f" / {conv.groups}"
            ones = ", 1" * len(conv.kernel_size)
            raise Problem(
                f"{key_a} {tuple(a.shape)} and {key_b} {tuple(b.shape)}: {label} needs "
                f"(r, {conv.in_channels}, {kernel}) and ({conv.out_channels}, r{groups}{ones})"
            )
        return made

    def _vector(
        self,
        name: When,
        label: str,
        factor: FactorKey | None,
        places: tuple[SitePart, ...],
        count: int,
    ) -> Tensor | None:
        """DoRA's m, or lora_B's bias, of a landing (count,)."""
        flag, ending = _VECTORS[name]
        wanted, layer = getattr(self.config, flag), places[0][0].eligible.kind
        if factor is None:
            if wanted and not (name == "bias" and layer == "embedding"):
                raise Problem(f"{flag} is set, but {label} has no {ending}")
            return None
        if not wanted:
            raise Unsupported(f"{factor.key} is there, but {flag} is not set")
        vector = self.state.tensors[factor.key]
        if layer == "conv" and vector.dim() > 1:
            vector = vector.flatten()  # (1, N, 1, ...)
        sites = [site for site, _ in places]
        check_vector(EXTRAS[name], factor.key, vector, label, sites, count)
        return vector

    def _other_key(self, key: str) -> None:
        if key.endswith(TRAINING_KEYS) or self._is_beside_own(key):
            return
        owner, _, attribute = key.rpartition(".")
        base = getattr(self.places.module(owner.removesuffix(".base_layer")), attribute, None)
        if not isinstance(base, Tensor):
            raise Problem(f"{key} is not a LoRA factor, and nothing in the model has this name")
        self.compared = True
        tensor = self.state.tensors[key]
        if not same(tensor, base):
            raise Problem(
                f"{key} {tuple(tensor.shape)} is a base weight that differs from "
                f"the model's {tuple(base.shape)}; load it into the base model (after "
                "resize_token_embeddings, where the vocabulary grew) before compiling, or make "
                "room for a weight of the adapter's own by LoraConfig(modules_to_save=...)"
            )

    def _is_beside_own(self, key: str) -> bool:
        """Whether `key` is a wrapper's copy of a replaced weight, or of the base weight."""
        copy, trained = _WRAPPED.search(key), _WRAPPED.sub(".", key)
        if copy is None or trained not in self.extras.keys:
            return False
        tensors = self.state.tensors
        return copy[1] == "original_module" or same(tensors[key], tensors[trained])

    def _report_placement(self) -> None:
        for path, module in self.unselected.items():
            why = unsupported(module)
            self.problems.append(
                f"{path_label(path)} ({type(module).__qualname__}) cannot have factors: {why}"
                if why is not None and lookup(module) is None
                else f"{path_label(path)} exists but was not selected to carry LoRA; add it to "
                f"{TARGETS}"
            )
        self.problems.extend(f"{path}: {missing}" for path, missing in self.closed.items())
        known = len(self.unselected) + len(self.factors)
        known += len(self.closed.keys() | self.experts.paths)
        total = len(self.unknown) + known
        names = list(self.unknown)
        if len(names) > total / 2:
            base = self.config.base_model
            origin = repr(base) if base else "it does not say which"
            examples = "; ".join(f"{n}{self.places.nearest(n)}" for n in names[:3])
            self.problems.insert(
                0,
                f"{len(names)} of the {total} modules that it names do not exist in this model, "
                f"so it was made for another model ({origin}), or they have moved, which "
                f"AdapterSource(..., key_mapping=...) would say: {examples}",
            )
            return
        for at, path in enumerate(names):
            hint = self.places.nearest(path) if at < 10 else ""
            self.problems.append(f"{path}: no such module in this model{hint}")


def _label(landing: SiteLanding) -> str:
    if len(landing.places) == 1:
        site, index = landing.places[0]
        return path_label(site.part_path(index))
    if len({id(site) for site, _ in landing.places}) == 1:
        return path_label(landing.places[0][0].path)
    return path_label(landing.saved)


class _Search:
    """Targeted paths without factors. The factors of a renamed module are not missing as well."""

    def __init__(self, reading: Reading, selection: LoraConfig | None) -> None:
        self.reading, self.places, self.config = reading, reading.places, reading.config
        selection = selection or LoraConfig()
        #: Whether the adapters were the selection, so that no module was left out of it.
        self.whole = isinstance(selection.target_modules, targets.AdapterNames)
        self.exclude = targets.checked(selection.exclude_modules, "exclude_modules")

    def run(self) -> Iterator[str]:
        modules = dict(self._modules())
        yield from modules
        yield from self._packed({id(module) for module in modules.values()})
        yield from self._experts()

    def _counts(self, path: str, module: nn.Module | None) -> bool:
        """Whether a module that is no site, or a module of a packed name, counts."""
        if not self.whole:
            return False
        entry = None if module is None else lookup(module)
        if module is not None and entry is None and not module._parameters:
            return False  # a container, which has no weight to keep
        if targets.is_all_linear(self.exclude):
            return entry is None or not entry.is_linear
        return self.exclude is None or not targets.names(self.exclude, [path])

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        reading, config = self.reading, self.config
        got = {id(site.module) for item in reading.landings.values() for site, _ in item.places}
        got |= {id(module) for module in reading.unselected.values()} | reading.experts.modules
        sites = self.places.selected_modules()
        for path, module in self.places.named_modules():
            counts = id(module) in sites or self._counts(path, module)
            if id(module) in got or not counts or is_empty(module):
                continue
            parameters = module._parameters.items() if config.target_parameters else ()
            matrices = (
                join(path, name) for name, p in parameters if p is not None and p.dim() == 2
            )
            if config.matches(path) or any(map(config.targets_parameter, matrices)):
                yield path, module

    def _packed(self, missing: Collection[int]) -> Iterator[str]:
        """Packed names that PEFT would have given factors, beyond the `missing` modules."""
        reading = self.reading
        for path, landing in self.places.packed_names().items():
            found = landing.places
            got = any(site.part_path(i) in reading.decoded for site, i in found)
            if landing.undeclared:
                whole = replace(landing, undeclared="").key
                got = landing.key in reading.landings or whole in reading.landings
            said = all(id(site.module) in missing for site, _ in found)
            if got or said or path in reading.closed:
                continue
            selected = any(site.parts[i].selected for site, i in found)
            if (selected or self._counts(path, None)) and self.config.matches(path):
                yield path

    def _experts(self) -> Iterator[str]:
        found = self.reading.experts
        if not self.config.target_parameters and not found.singly:
            return
        for path, module in self.places.named_modules():
            experts = self.places.experts_of(module, path)
            if experts is None or any(closed.startswith(path) for closed in self.reading.closed):
                continue
            for weight in experts.weights:
                whole = weight.path(path)
                touched = found.touched.get((id(module), weight.name), set())
                if not (weight.name in experts.sites or self._counts(whole, module)):
                    continue
                if not self.config.targets_parameter(whole):
                    yield from self._single(weight, path, touched)
                elif not touched:
                    yield whole

    def _single(self, weight: ExpertWeight, path: str, touched: set[Columns]) -> Iterator[str]:
        """Single experts' projections that PEFT gave factors before experts were fused."""
        known = set(touched)
        halves = [(name, half) for name in PROJECTIONS if (half := covers(weight, name))]
        for (name, half), expert in product(halves, range(weight.experts)):
            alike = {(h, expert) for h in overlapping(half)}
            if known.isdisjoint(alike) and self.config.matches(f"{path}.{expert}.{name}"):
                known.add((half, expert))
                yield f"{path}.{expert}.{name}"

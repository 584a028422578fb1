"""Places the factors of a checkpoint at their sites.

If a name packs several sites, B is split by their output sizes and A is shared. A's rank must be
the configured rank, which s = α/r comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from lorafx.adapter_store.expert_reading import ExpertReading
from lorafx.adapter_store.extras import ExtrasReading, check_vector
from lorafx.adapter_store.findings import (
    Findings,
    check_shape,
    check_sound,
    equal,
    listed,
    path_label,
)
from lorafx.adapter_store.methods.method import PlaceSizes
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import (
    TRAINING_KEY,
    FactorKey,
    parse,
    without_prefix,
)
from lorafx.adapter_store.places import (
    TARGETS,
    ExpertPlace,
    SiteLanding,
    SitePart,
    saved_sizes,
)
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.adapter_store.stored import LoraWeights
from lorafx.model.candidates import unsupported
from lorafx.model.convolutions import convolution_of, matrices, unmergeable
from lorafx.model.experts import unnested
from lorafx.model.extras import EXTRAS, When
from lorafx.model.packed_names import spans
from lorafx.registry import is_empty, lookup

#: With `save_embedding_layers`, which a larger vocabulary enables, `save_pretrained` writes
#: embeddings and heads with the contents of their wrappers.
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")
#: Vectors over outputs: the field that enables them, and the end of their keys.
_VECTORS: Mapping[When, tuple[str, str]] = {
    "dora": ("use_dora", "lora_magnitude_vector"),
    "bias": ("lora_bias", "lora_B.bias"),
}
_KINDS = {"embedding": "an embedding", "conv": "a convolution"}


def expert_parameters(place: ExpertPlace, config: PeftConfig) -> list[str]:
    experts, saved = place.experts, unnested(place.saved)
    targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
    weights = [place.weight] if place.weight is not None else targeted or experts.weights
    return [weight.path(experts.path) for weight in weights]


def rank_of_experts(place: ExpertPlace, config: PeftConfig, rows: int) -> int:
    if place.expert is not None:
        return rows
    configured = {config.r, *config.rank_pattern.values()} - {None} or {rows}
    stacked = place.weight is None or rows not in configured
    return max(rows // place.experts.count, 1) if stacked else rows


class Reading:
    """Reads the tensors of a checkpoint into factors by site.

    Attributes:
        landings, factors: the places of factors, and the keys of each place by letter.
        unselected, unknown: saved paths of modules that are no sites, and of no module.
        decoded: part paths with factors, except experts'.
        compared: as in `Adapter`.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.state, self.config, self.places = findings.state, findings.config, findings.places
        self.problems, self.unavailable = findings.problems, findings.unavailable
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
                    self._check_other_key(key)
                else:
                    self._place(factor)
        decoded: dict[str, LoraWeights] = {}
        saved_as: dict[str, str] = {}
        for place, landing in self.landings.items():
            with self.findings.noting():
                for path, weights in self._decode(landing, self.factors[place]):
                    if path in decoded:
                        raise Problem(
                            f"{landing.saved} and {saved_as[path]} both have factors for "
                            f"{path_label(path)}; keep one"
                        )
                    if weights.magnitude is not None and path in self.extras.own_weights:
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
        with_biases = self.extras.with_biases(decoded)
        sites = [site for item in self.landings.values() for site, _ in item.places]
        self.extras.refuse_absent_biases(sites)
        self.decoded.update(with_biases)
        placed = self.factors or self.experts.paths or self.extras.keys or with_biases
        if not (placed or self.unknown or self.unselected or self.unavailable):
            self.problems.append("the file holds no LoRA factors (lora_A, lora_B)")
        return with_biases | experts

    def _place(self, factor: FactorKey) -> None:
        place = self.places.meaning(factor.module)
        if place is None:
            self.unknown[factor.module] = None
            return
        if isinstance(place, ExpertPlace):
            self.experts.take(factor, place)
            return
        if isinstance(place, nn.Module):
            if not is_empty(place):  # else B A has no numbers either
                self.unselected[without_prefix(factor.module)] = place
            return
        if place.reason:
            self.unavailable[place.saved] = place.reason
            return
        self.landings.setdefault(place.key, place)
        factors = self.factors.setdefault(place.key, {})
        site = place.places[0][0]
        kind = site.eligible.kind
        if factor.letter in "AB" and factor.embedding != (kind == "embedding"):
            raise Problem(
                f"{factor.key}: {factor.factor} on {_label(place)}, which is "
                f"{_KINDS.get(kind, 'a linear layer')} here ({type(site.module).__name__})"
            )
        if factor.letter == "W" and factor.key not in self.state.made:
            raise Problem(f"{factor.key} is not a LoRA factor")
        first = factors.setdefault(factor.letter, factor)
        self.findings.check_same(factor, first.key, _label(place))

    def _decode(
        self, landing: SiteLanding, keys: dict[str, FactorKey]
    ) -> Iterator[tuple[str, LoraWeights]]:
        if not keys:
            return  # factors of the wrong kind, noted when they were placed
        label = _label(landing)
        if "W" in keys:
            self._decode_changed(landing, keys, label)
            return
        absent = [letter for letter in "AB" if letter not in keys]
        if absent:
            raise Problem(f"{next(iter(keys.values())).key}: {label} has no factor {absent[0]}")
        a, b = self._matrices(landing, label, keys["A"].key, keys["B"].key)
        rank = a.shape[0] if a.dim() == 2 else 0
        places = self._covered(landing)
        sizes = [saved_sizes(place) for place in places]
        n, k = sum(size for _, size in sizes), sizes[0][0]
        if self.config.method is not None and self.config.method.complete is not None:
            a, b = self.config.method.complete(
                a, b, PlaceSizes(k, n, self._widest), self.config.options
            )
        key_a, key_b = self._named(keys["A"].key), self._named(keys["B"].key)
        check_shape(key_a, a, (rank, k), f"{label} needs (r, {k})")
        if len(places) == 1:
            check_shape(key_b, b, (n, rank), f"{label} needs ({n}, r = {rank})")
        elif tuple(b.shape) != (n, rank) or (landing.undeclared and places == landing.places):
            covered = ", ".join(
                f"{site.part_path(i).rpartition('.')[2]} {size}"
                for (site, i), (_, size) in zip(places, sizes, strict=True)
            )
            rows = b.shape[0] if b.dim() else 0
            raise Problem(
                f"{key_b} has shape {tuple(b.shape)}, whose {rows} rows cannot be split "
                f"over the slices of {label}: it covers {covered}, {n} rows in all (and r = "
                f"{rank}); declare with packed_modules which slices each name covers"
            )
        configured, repeats = self.places.configured_module(landing.saved)
        carried = landing.saved.removeprefix(configured)  # ".base_layer.out_proj" of mha, or ""
        original = self.findings.original_path(landing.saved).removesuffix(carried)
        name = self.config.name_of(original, places[0][0].eligible.weight)
        scale = self.findings.scale(label, name, landing.saved, rank)
        if scale is None:
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
            weights = LoraWeights(part_a, part_b, repeats * scale, None, part_m, part_bias)
            yield site.part_path(index), weights

    @cached_property
    def _widest(self) -> int:
        """The largest K of the linears with factors, or that the configuration names."""
        places = [place for landing in self.landings.values() for place in landing.places]
        inputs = []
        for path, landing in self.places.packed_names().items():
            places += landing.places if self.config.matches(path) else ()
        for path, module in self.places.named_modules():
            entry = lookup(module) if self.config.matches(path) else None
            if (site := self.places.site(module)) is not None and entry is not None:
                places.append((site, 0))
            elif entry is not None and entry.is_linear:
                inputs.append(entry.sizes(module)[0])
        return max(*inputs, *(saved_sizes(place)[0] for place in places), 0)

    def _decode_changed(self, landing: SiteLanding, keys: dict[str, FactorKey], label: str) -> None:
        """Note a weight of the adapter's own that is a function of the base's."""
        key = keys["W"].key
        changed = self.state.made[key].weight
        assert changed is not None
        if others := [factor.key for letter, factor in keys.items() if letter != "W"]:
            raise Problem(f"{label} has {self._named(key)} and {others[0]}; keep one")
        if len(landing.places) > 1:
            raise Unsupported(
                f"{self._named(key)}: {label} holds several projections, and only the weight of "
                "one can be an adapter's own"
            )
        self.extras.add_changed(landing.places[0][0], self._named(key), label, changed)

    def _covered(self, landing: SiteLanding) -> tuple[SitePart, ...]:
        """The parts that the factors are for. For a name without declared slices, the rows of B of
        all such names determine them; if they do not, all parts, which no factors fit."""
        if not landing.undeclared:
            return landing.places
        names = landing.places[0][0].undeclared
        keys = [self.factors.get(replace(landing, undeclared=name).key, {}) for name in names]
        shapes = (self.state.tensors[k["B"].key].shape if "B" in k else None for k in keys)
        rows = [None if shape is None else next(iter(shape), 0) for shape in shapes]
        sizes = [saved_sizes(place)[1] for place in landing.places]
        possible = spans(sizes, rows)[names.index(landing.undeclared)]
        return landing.places[slice(*possible.pop())] if len(possible) == 1 else landing.places

    def _named(self, key: str) -> str:
        """`key` in messages, with the tensors that it was made of."""
        made = self.state.made.get(key)
        if made is None:
            return key
        return f"{key} ({made})" if made.weight is None else f"{made.of} of {made.method}"

    def _matrices(
        self, landing: SiteLanding, label: str, key_a: str, key_b: str
    ) -> tuple[Tensor, Tensor]:
        a, b = self.state.tensors[key_a], self.state.tensors[key_b]
        check_sound(key_a, a)
        check_sound(key_b, b)
        site = landing.places[0][0]
        pair = matrices(site.module, a, b) if site.eligible.kind == "conv" else (a, b)
        made = key_a in self.state.made and site.eligible.kind == "conv"
        if made and (reason := unmergeable(site.module)):
            raise Unsupported(f"{self._named(key_a)}: {label} cannot add it: {reason}")
        if pair is None:
            conv = convolution_of(site.module)
            kernel = ", ".join(map(str, conv.kernel_size))
            groups = "" if conv.groups == 1 else f" / {conv.groups}"
            ones = ", 1" * len(conv.kernel_size)
            raise Problem(
                f"{self._named(key_a)} {tuple(a.shape)} and {key_b} {tuple(b.shape)}: {label} "
                f"needs (r, {conv.in_channels}, {kernel}) and "
                f"({conv.out_channels}, r{groups}{ones})"
            )
        return pair

    def _vector(
        self,
        name: When,
        label: str,
        factor: FactorKey | None,
        places: tuple[SitePart, ...],
        count: int,
    ) -> Tensor | None:
        """DoRA's m, or lora_B's bias, of a landing, (count,)."""
        flag, ending = _VECTORS[name]
        is_set, kind = getattr(self.config, flag), places[0][0].eligible.kind
        if factor is None:
            if is_set and not (name == "bias" and kind == "embedding"):
                raise Problem(f"{flag} is set, but {label} has no {ending}")
            return None
        if not is_set:
            raise Unsupported(f"{factor.key} is there, but {flag} is not set")
        vector = self.state.tensors[factor.key]
        if kind == "conv" and vector.dim() > 1:
            vector = vector.flatten()  # (1, N, 1, ...)
        sites = [site for site, _ in places]
        check_vector(EXTRAS[name], factor.key, vector, label, sites, count)
        return vector

    def _check_other_key(self, key: str) -> None:
        if TRAINING_KEY.fullmatch(key) or self._is_wrappers_copy(key):
            return
        owner, _, attribute = key.rpartition(".")
        base = getattr(self.places.module(owner.removesuffix(".base_layer")), attribute, None)
        if not isinstance(base, Tensor):
            raise Problem(f"{key} is not a LoRA factor, and nothing in the model has this name")
        self.compared = True
        tensor = self.state.tensors[key]
        if not equal(tensor, base):
            raise Problem(
                f"{key} {tuple(tensor.shape)} is a base weight that differs from "
                f"the model's {tuple(base.shape)}; load it into the base model (after "
                "resize_token_embeddings, where the vocabulary grew) before compiling, or make "
                "room for a weight of the adapter's own by LoraConfig(modules_to_save=...)"
            )

    def _is_wrappers_copy(self, key: str) -> bool:
        """Whether `key` is a wrapper's copy of a replaced weight, or of the base's."""
        copy, trained = _WRAPPED.search(key), _WRAPPED.sub(".", key)
        if copy is None or trained not in self.extras.keys:
            return False
        tensors = self.state.tensors
        return copy[1] == "original_module" or equal(tensors[key], tensors[trained])

    def _report_placement(self) -> None:
        for path, module in self.unselected.items():
            why = unsupported(module)
            self.problems.append(
                f"{path_label(path)} ({type(module).__qualname__}) cannot have factors: {why}"
                if why is not None and lookup(module) is None
                else f"{path_label(path)} exists but was not selected to carry LoRA; add it to "
                f"{TARGETS}"
            )
        self.problems.extend(f"{path}: {reason}" for path, reason in self.unavailable.items())
        known = len(self.unselected) + len(self.factors)
        known += len(self.unavailable.keys() | self.experts.paths)
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
                f"AdapterSource(..., prefix=...) or key_mapping= would say: {examples}",
            )
            return
        for i, path in enumerate(names):
            hint = self.places.nearest(path) if i < 10 else ""
            self.problems.append(f"{path}: no such module in this model{hint}")


def _label(landing: SiteLanding) -> str:
    if len(landing.places) == 1:
        site, index = landing.places[0]
        return path_label(site.part_path(index))
    if len({id(site) for site, _ in landing.places}) == 1:
        return path_label(landing.places[0][0].path)
    return path_label(landing.saved)

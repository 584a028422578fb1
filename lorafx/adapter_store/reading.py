"""An adapter checkpoint on its way into factors by site, collecting every problem.

    ΔW = s · B A,   A (r, K), B (N, r);   embeddings: A (r, V), ΔE = s · (B A)ᵀ;   DoRA: m (N,)

If a name packs several sites, B is split by their output sizes and A is shared. A's rank must be
the configured rank, which s = α/r comes from. Only the rows of B tell the slices of some names:

    slices [8, 8, 8, 8];  in_proj_qkv with 24 rows, in_proj_z with 8  →  slices 0, 1, 2 and slice 3
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorafx.adapter_store.expert_reading import ExpertReading
from lorafx.adapter_store.extras import ExtrasReading, check_vector
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
from lorafx.adapter_store.peft_keys import TRAINING_KEYS, FactorKey, parse, without_prefix
from lorafx.adapter_store.places import TARGETS, ExpertPlace, SiteLanding, SitePart, saved_sizes
from lorafx.adapter_store.stored import LoraWeights
from lorafx.model.convolutions import convolution_of, matrices
from lorafx.model.extras import EXTRAS, When
from lorafx.model.packed_names import renamed, spans
from lorafx.model.refusals import unsupported
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


class Reading:
    """A checkpoint on its way into factors by site.

    Attributes:
        landings, factors: targets of factors, and their keys by letter.
        unselected, unknown: saved paths without a site, and without any meaning.
        decoded: part paths with factors, except experts'.
        spans: slices that saved names cover (`loose_names`).
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
        self.spans: dict[str, range] = {}
        #: Rows of B by loose name, by site.
        self._rows: dict[Site, dict[str, int]] = {}

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
        for meant, landing in self.landings.items():
            if landing.loose and "B" in self.factors[meant]:
                b = self.state.tensors[self.factors[meant]["B"].key]
                rows = self._rows.setdefault(landing.places[0][0], {})
                rows[landing.loose] = b.shape[0] if b.dim() == 2 else 0
        decoded: dict[str, LoraWeights] = {}
        saved_as: dict[str, str] = {}
        for meant, landing in self.landings.items():
            with self.findings.noting():
                for path, weights in self._decode(landing, self.factors[meant]):
                    if path in decoded and not _alike(weights, decoded[path]):
                        raise Problem(
                            f"{landing.saved} and {saved_as[path]} both have factors for "
                            f"{path_label(path)} and differ; keep one"
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
        if first is not factor and not self.findings.equal(factor.key, first.key):
            raise Problem(
                f"{factor.key} and {first.key} are both {factor.factor} of {_label(found)} and "
                "differ; keep one"
            )

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
        places = self._fitting(landing)
        sizes = [saved_sizes(place) for place in places or landing.places]
        n, k = sum(size for _, size in sizes), sizes[0][0]
        check_shape(keys["A"].key, a, (rank, k), f"{label} needs (r, {k})")
        if places is not None and len(places) == 1:
            check_shape(keys["B"].key, b, (n, rank), f"{label} needs ({n}, r = {rank})")
        elif places is None or tuple(b.shape) != (n, rank):
            rows = b.shape[0] if b.dim() else 0
            raise Problem(
                f"{keys['B'].key} has shape {tuple(b.shape)}, whose {rows} rows cannot be split "
                f"over the slices of {label}: {self._undivided(landing)} (and r = {rank}); declare "
                "with packed_modules which slices each name covers"
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

    def _undivided(self, landing: SiteLanding) -> str:
        sizes = [saved_sizes(place)[1] for place in landing.places]
        named = ", ".join(
            f"{site.part_path(i).rpartition('.')[2]} {size}"
            for (site, i), size in zip(landing.places, sizes, strict=True)
        )
        if not landing.loose:
            return f"it covers {named}, {sum(sizes)} rows in all"
        site = landing.places[0][0]
        given = self._rows.get(site, {})
        others = ", ".join(
            f"{name} ({given[name]} rows here)" if name in given else name
            for name in site.loose_names
            if name != landing.loose
        )
        return f"{landing.loose} takes some of {named}, while {others} takes all others"

    def _fitting(self, landing: SiteLanding) -> tuple[SitePart, ...] | None:
        """The places of the factors, if B's rows partition the site's slices unambiguously. Notes
        the slices of each loose name that the rows determine."""
        if not landing.loose:
            return landing.places
        site = landing.places[0][0]
        given = self._rows.get(site, {})
        sizes = [saved_sizes(place)[1] for place in landing.places]
        possible = spans(sizes, [given.get(name) for name in site.loose_names])
        for name, found in zip(site.loose_names, possible, strict=True):
            if len(found) == 1:
                self.spans[renamed(site.path, name)] = range(*next(iter(found)))
        covered = self.spans.get(renamed(site.path, landing.loose))
        return None if covered is None else tuple(landing.places[i] for i in covered)

    def _other_key(self, key: str) -> None:
        if key.endswith(TRAINING_KEYS) or self._is_beside_own(key):
            return
        owner, _, attribute = key.rpartition(".")
        base = getattr(self.places.module(owner.removesuffix(".base_layer")), attribute, None)
        if not isinstance(base, Tensor):
            raise Problem(f"{key} is not a LoRA factor, and nothing in the model has this name")
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
        if self.unselected or self.closed:
            self.findings.settings.append(TARGETS)
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
                f"so it was made for another model ({origin}): {examples}",
            )
            return
        for at, path in enumerate(names):
            hint = self.places.nearest(path) if at < 10 else ""
            self.problems.append(f"{path}: no such module in this model{hint}")


def _alike(first: LoraWeights, second: LoraWeights) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in pairs
    )


def _label(landing: SiteLanding) -> str:
    if len(landing.places) == 1:
        site, index = landing.places[0]
        return path_label(site.part_path(index))
    if not landing.loose and len({id(site) for site, _ in landing.places}) == 1:
        return path_label(landing.places[0][0].path)
    return path_label(landing.saved)

"""One adapter checkpoint on its way into factors by site, with every problem met on the way.

    ΔW = s · B A,   A (r, K), B (N, r);   embeddings: A (r, V), ΔE = s · (B A)ᵀ;   DoRA: m (N,)

A tensor belongs to a site, to a part of a packed one, or to several sites that its name packs:
then B is split by their output sizes and A is shared. The rank is A's; it must be the rank that
the configuration says, since s = α/r comes from there.

Names in a packed module whose slices only the row counts of an adapter's factors determine.

    slices [8, 8, 8, 8];  in_proj_qkv with 24 rows, in_proj_z with 8  →  slices 0, 1, 2 and slice 3

All names of one adapter are looked at together (lorafx.model.packed_names).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorafx.adapter_store.bias_reading import BiasReading
from lorafx.adapter_store.dora import dora_refusal
from lorafx.adapter_store.expert_places import ExpertPlace
from lorafx.adapter_store.expert_reading import ExpertReading
from lorafx.adapter_store.findings import Findings, listed, path_label
from lorafx.adapter_store.lora_weights import LoraWeights
from lorafx.adapter_store.own_reading import OwnReading, same
from lorafx.adapter_store.peft_keys import TRAINING_KEYS, FactorKey, parse, without_prefix
from lorafx.adapter_store.places import TARGETS, SiteLanding, SitePart, saved_sizes
from lorafx.model.convolutions import convolution_of, matrices
from lorafx.model.packed_names import renamed, spans
from lorafx.model.refusals import unsupported
from lorafx.registry import is_empty, lookup

#: Rows of B by loose name, by the identity of the packed site.
RowCounts = Mapping[int, Mapping[str, int]]


def given_rows(
    landings: Mapping[object, SiteLanding],
    factors: Mapping[object, Mapping[str, FactorKey]],
    tensors: Mapping[str, Tensor],
) -> RowCounts:
    """What a file has for loose names."""
    found: dict[int, dict[str, int]] = {}
    for meant, landing in landings.items():
        if landing.loose and "B" in factors[meant]:
            b = tensors[factors[meant]["B"].key]
            own = found.setdefault(id(landing.places[0][0]), {})
            own[landing.loose] = b.shape[0] if b.dim() == 2 else 0
    return found


def undivided(landing: SiteLanding, rows: RowCounts) -> str:
    """Which slices there are, and what the names of `landing`'s site have to do with them."""
    sizes = [saved_sizes(place)[1] for place in landing.places]
    named = ", ".join(
        f"{site.part_path(i).rpartition('.')[2]} {size}"
        for (site, i), size in zip(landing.places, sizes, strict=True)
    )
    if not landing.loose:
        return f"it covers {named}, {sum(sizes)} rows in all"
    site = landing.places[0][0]
    given = rows.get(id(site), {})
    others = [name for name in site.loose_names if name != landing.loose]
    beside = ", ".join(
        f"{name} ({given[name]} rows here)" if name in given else name for name in others
    )
    return f"{landing.loose} takes some of {named}, while {beside} takes all others"


def settled(landing: SiteLanding, rows: RowCounts) -> dict[str, range]:
    """The slices of each loose name of `landing`'s site, by its path, that the rows leave no doubt
    about: also of names that the file has no factors for."""
    if not landing.loose:
        return {}
    site = landing.places[0][0]
    sizes = [saved_sizes(place)[1] for place in landing.places]
    given = rows.get(id(site), {})
    found = spans(sizes, [given.get(name) for name in site.loose_names])
    return {
        renamed(site.path, name): range(*next(iter(own)))
        for name, own in zip(site.loose_names, found, strict=True)
        if len(own) == 1
    }


# Keys of features that the configuration would have been refused for, had it named them.
_FEATURE_KEYS = {
    "modules_to_save": "replaced modules (modules_to_save) under names that PEFT does not save",
    "lora_diag": "KaSA (kasa_config)",
}
#: With `save_embedding_layers`, which is on where a vocabulary grew, `save_pretrained` writes
#: embeddings and heads with all that their wrappers hold.
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")


class Reading:
    """One checkpoint on its way into site-keyed factors.

    Attributes:
        landings, factors: where factors go, and their keys by letter.
        unselected: modules that are no sites and have factors, by their paths.
        unknown: saved paths that name nothing.
        experts: the factors of routed experts.
        own: the weights that the adapter has of its own.
        decoded: part paths that got factors, those of experts aside.
        spans: the rows that saved names turned out to cover (`loose_names`).
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.state, self.config, self.places = findings.state, findings.config, findings.places
        self.problems, self.unsupported = findings.problems, findings.unsupported
        self.closed = findings.closed
        self.landings: dict[object, SiteLanding] = {}
        self.factors: dict[object, dict[str, FactorKey]] = {}
        self.unselected: dict[str, nn.Module] = {}
        self.unknown: dict[str, None] = {}
        self.experts = ExpertReading(findings)
        self.own = OwnReading(findings)
        self.biases = BiasReading(findings)
        self.decoded: set[str] = set()
        self.spans: dict[str, range] = {}

    def run(self) -> dict[str, LoraWeights]:
        """The factors by part path; problems are noted in the findings."""
        self.own.decode()
        self.biases.decode(self.own.found)
        for key in self.state.tensors:
            factor = parse(key)
            if key in self.own.keys or key in self.biases.keys:
                continue
            if factor is None:
                self._other_key(key)
            else:
                self._place(factor)
        self.rows = given_rows(self.landings, self.factors, self.state.tensors)
        decoded: dict[str, tuple[SiteLanding, LoraWeights]] = {}
        for meant, landing in self.landings.items():
            for path, weights in self._decode(landing, self.factors[meant]):
                if path in decoded and not _alike(weights, decoded[path][1]):
                    self.problems.append(
                        f"{landing.saved} and {decoded[path][0].saved} both have factors for "
                        f"{path_label(path)} and differ; keep one"
                    )
                decoded[path] = landing, weights
        experts = dict(self.experts.decode())
        if self.config.use_dora and self.experts.paths:
            self.unsupported.append(
                "use_dora is set with factors of routed experts "
                f"({listed(sorted(self.experts.paths))}): the weight of each expert would "
                "have its own norms, which lorafx does not support"
            )
        self._report_placement()
        self.unsupported.extend(
            f"{path}: the norms of DoRA are those of the base weight, and the adapter has a weight "
            "of its own there"
            for path, (_, weights) in decoded.items()
            if weights.magnitude is not None and path in self.own.found
        )
        biased = self.biases.added({path: weights for path, (_, weights) in decoded.items()})
        self.biases.complete(site for item in self.landings.values() for site, _ in item.places)
        self.decoded.update(biased)
        if not (self.factors or self.experts.paths or self.own.keys or biased) and not (
            self.unknown or self.unselected or self.closed
        ):
            self.problems.append("the file holds no LoRA factors (lora_A, lora_B)")
        return biased | experts

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
        mine = self.factors.setdefault(found.key, {})
        site = found.places[0][0]
        if factor.letter in "AB" and factor.embedding != (site.eligible.kind == "embedding"):
            self.problems.append(
                f"{factor.key}: {factor.factor} on {_label(found)}, which is "
                f"{_article(site.eligible.kind)} here ({type(site.module).__name__})"
            )
        elif factor.letter not in mine:
            mine[factor.letter] = factor
        elif not self.findings.equal(factor.key, mine[factor.letter].key):
            self.problems.append(
                f"{factor.key} and {mine[factor.letter].key} are both {factor.factor} of "
                f"{_label(found)} and differ; keep one"
            )

    def _decode(
        self, landing: SiteLanding, keys: dict[str, FactorKey]
    ) -> Iterator[tuple[str, LoraWeights]]:
        """The factors of each part by its path; none when a problem was noted."""
        if not keys:
            return  # factors of the wrong kind, noted when they were placed
        lacks = [letter for letter in "AB" if letter not in keys]
        if lacks:
            have = next(iter(keys.values()))
            self.problems.append(f"{have.key}: {_label(landing)} has no factor {lacks[0]}")
            return
        a, b = (self.state.tensors[keys[letter].key] for letter in "AB")
        if not all([self.findings.sound(keys["A"].key, a), self.findings.sound(keys["B"].key, b)]):
            return
        shaped = self._convolved(landing, keys, a, b)
        if shaped is None:
            return
        a, b = shaped
        rank = a.shape[0] if a.dim() == 2 else 0
        places = landing.fitting(self.rows.get(id(landing.places[0][0]), {}))
        sizes = [saved_sizes(place) for place in places or landing.places]
        n, k = sum(size for _, size in sizes), sizes[0][0]
        label = _label(landing)
        fits = [self.findings.shaped(keys["A"].key, a, (rank, k), f"{label} needs (r, {k})")]
        if places is None or len(places) > 1:
            fits.append(self._divides(keys["B"].key, b, rank, landing, places))
        else:
            needs = f"{label} needs ({n}, r = {rank})"
            fits.append(self.findings.shaped(keys["B"].key, b, (n, rank), needs))
        owner, times = self.places.carried(landing.saved)
        name = self.config.name_of(owner, places[0][0].eligible.weight) if places else ""
        if not all(fits) or places is None:
            return
        if not self.findings.rank_fits(label, name, landing.saved, rank):
            return
        self.spans.update(settled(landing, self.rows))
        m = self._magnitude(label, keys, places, n)
        bias = self._bias(label, keys, places, n)
        scale, start = times * self.findings.scale(name, landing.saved, rank), 0
        for (site, index), rows in zip(places, b.split([size for _, size in sizes]), strict=True):
            sharding, slices = site.eligible.sharding, site.parts[index].slices
            own_a, own_b = a, rows
            own_m = None if m is None else m[start : start + len(rows)]
            own_bias = None if bias is None else bias[start : start + len(rows)]
            start += len(rows)
            if sharding is not None:
                own_a, own_b = sharding.cut(site.module, slices, a, rows)
                if own_m is not None:
                    own_m = sharding.cut(site.module, slices, a, own_m[:, None])[1].squeeze(1)
                if own_m is not None and own_a.shape[1] < a.shape[1]:
                    self.unsupported.append(
                        f"{label}: DoRA's norm is over all inputs, which several ranks share here"
                    )
            yield (
                site.part_path(index),
                LoraWeights(own_a, own_b, scale, magnitude=own_m, bias=own_bias),
            )

    def _convolved(
        self, landing: SiteLanding, keys: dict[str, FactorKey], a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """A and B of a convolution as matrices, others as they are; None when a problem was
        noted."""
        site = landing.places[0][0]
        if site.eligible.kind != "conv":
            return a, b
        made = matrices(site.module, a, b)
        if made is None:
            conv = convolution_of(site.module)
            kernel = ", ".join(map(str, conv.kernel_size))
            groups = "" if conv.groups == 1 else f" / {conv.groups}"
            ones = ", 1" * len(conv.kernel_size)
            self.problems.append(
                f"{keys['A'].key} {tuple(a.shape)} and {keys['B'].key} {tuple(b.shape)}: "
                f"{_label(landing)} needs (r, {conv.in_channels}, {kernel}) and "
                f"({conv.out_channels}, r{groups}{ones})"
            )
        return made

    def _magnitude(
        self, label: str, keys: dict[str, FactorKey], places: tuple[SitePart, ...], count: int
    ) -> Tensor | None:
        """DoRA's m (count,) of a landing; None where it has none, or a problem was noted."""
        if "m" not in keys:
            if self.config.use_dora:
                self.problems.append(f"use_dora is set, but {label} has no lora_magnitude_vector")
            return None
        key, m = keys["m"].key, self.state.tensors[keys["m"].key]
        if not self.config.use_dora:
            self.unsupported.append(f"{key} belongs to DoRA, but use_dora is not set")
            return None
        reasons = {dora_refusal(site) for site, _ in places} - {None}
        self.unsupported.extend(f"{label} cannot carry DoRA: {reason}" for reason in reasons)
        if not self.findings.sound(key, m) or reasons:
            return None
        if places[0][0].eligible.kind == "conv" and m.dim() > 1:
            m = m.flatten()  # (1, N, 1, ...)
        if tuple(m.shape) != (count,):
            self.problems.append(f"{key} has shape {tuple(m.shape)}, {label} needs ({count},)")
            return None
        return m

    def _bias(
        self, label: str, keys: dict[str, FactorKey], places: tuple[SitePart, ...], count: int
    ) -> Tensor | None:
        """The bias of lora_B (count,) of a landing; None where it has none, or a problem was
        noted."""
        if "b" not in keys:
            if self.config.lora_bias and places[0][0].eligible.kind != "embedding":
                self.problems.append(f"lora_bias is set, but {label} has no lora_B.bias")
            return None
        key, bias = keys["b"].key, self.state.tensors[keys["b"].key]
        if not self.config.lora_bias:
            self.unsupported.append(f"{key} belongs to lora_bias, but lora_bias is not set")
            return None
        return self.biases.checked(key, bias, label, [site for site, _ in places], count)

    def _divides(
        self,
        key: str,
        b: Tensor,
        rank: int,
        landing: SiteLanding,
        places: tuple[SitePart, ...] | None,
    ) -> bool:
        """Whether the rows of a B that serves several parts are those of all parts together."""
        if places is not None and tuple(b.shape) == (_rows(places), rank):
            return True
        rows = b.shape[0] if b.dim() else 0
        self.problems.append(
            f"{key} has shape {tuple(b.shape)}, whose {rows} rows cannot be split over the "
            f"slices of {_label(landing)}: {undivided(landing, self.rows)} (and r = "
            f"{rank}); declare with packed_modules which slices each name covers"
        )
        return False

    def _other_key(self, key: str) -> None:
        if key.endswith(TRAINING_KEYS) or self._is_beside_own(key):
            return
        for mark, feature in _FEATURE_KEYS.items():
            if f".{mark}" in f".{key}":
                self.unsupported.append(
                    f"{key} belongs to {feature}, which lorafx does not support"
                )
                return
        owner, _, attribute = key.rpartition(".")
        own = getattr(self.places.module(owner.removesuffix(".base_layer")), attribute, None)
        if not isinstance(own, Tensor):
            self.problems.append(
                f"{key} is not a LoRA factor, and nothing in the model has this name"
            )
            return
        self.findings.compared = True
        if not same(self.state.tensors[key], own):
            self.problems.append(
                f"{key} {tuple(self.state.tensors[key].shape)} is a base weight that differs from "
                f"the model's {tuple(own.shape)}; load it into the base model (after "
                "resize_token_embeddings, where the vocabulary grew) before compiling, or make "
                "room for a weight of the adapter's own by LoraConfig(modules_to_save=...)"
            )

    def _is_beside_own(self, key: str) -> bool:
        """Whether PEFT saved the tensor beside the adapter's own weight, from the wrapper of its
        module: that weight once more, or the base's, in whose place it is."""
        copy, trained = _WRAPPED.search(key), _WRAPPED.sub(".", key)
        if copy is None or trained not in self.own.keys:
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
    same = first.A.shape == second.A.shape and bool(first.scale == second.scale)
    for m, other in ((first.magnitude, second.magnitude), (first.bias, second.bias)):
        equal = m is not None and other is not None and torch.equal(m, other)
        same = same and (m is other or equal)
    return same and torch.equal(first.A, second.A) and torch.equal(first.B, second.B)


def _rows(places: tuple[SitePart, ...]) -> int:
    return sum(saved_sizes(place)[1] for place in places)


def _label(landing: SiteLanding) -> str:
    """What messages call the place of some factors."""
    if len(landing.places) == 1:
        site, index = landing.places[0]
        return path_label(site.part_path(index))
    sites = {id(site): site for site, _ in landing.places}
    if len(sites) == 1 and not landing.loose:
        return path_label(landing.places[0][0].path)
    return path_label(landing.saved)


def _article(kind: str) -> str:
    return {"embedding": "an embedding", "conv": "a convolution"}.get(kind, "a linear layer")

"""Reads factors of routed experts: saved tensors become terms, and terms a pair for each part.

    experts.3.gate_proj.lora_A (r, K), lora_B (N, r)    a term of expert 3
    experts.gate_up_proj.lora_A, lora_B                 a term of every expert
    experts.lora_A, experts.base_layer.lora_A           PEFT's wrappers, the outer and the inner

    ΔW[e] = Σ_t s_t · B_t[e] A_t[e],   W (E, N, K),   A (E, r, K),   B (E, N, r)

    in PEFT's wrappers        A (r·E, K), row e·r + j;   B (N, r·E), column j·E + e
    exchanged there           A (r·E, N), B (K, r·E):    ΔW[e] = s · (B[e] A[e])ᵀ
    there as vLLM stacks it   A (E, r, K), B (N, r, E)
    under a parameter's name  A (E, r, K), B (E, N, r); a shared one has E = 1, or is (r, K) or
                              (N, r) beside the other's three dimensions
    shared, of single experts experts.gate_proj.lora_A (1, r, K), experts.3.gate_proj.lora_B (N, r)

The inner wrapper belongs to the first registered parameter; a single wrapper has the outer name.
PEFT exchanges A and B if the module's `is_transposed`, or before 0.19 the order of dimensions,
disagrees with its computation. The shapes tell, or if K = N, PEFT's version. A term is of the whole
parameter, its gate, or its up projection; interleaved gate and up terms become a pair of rank
r_gate + r_up, with zeros in B at the columns of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.findings import Findings, check_shape, check_sound
from lorafx.adapter_store.peft_keys import FactorKey
from lorafx.adapter_store.places import ExpertPlace, Experts, not_selected, saved_sizes
from lorafx.adapter_store.problems import Problem, Unsupported
from lorafx.adapter_store.stored import LoraWeights
from lorafx.model.experts import Columns, ExpertWeight, Half, unnested
from lorafx.model.sites import Site
from lorafx.placements import own_indices

#: The first release that reads `is_transposed`.
_READS_TRANSPOSED = (0, 19)
#: A (E, r, K) and B (E, N, r).
_Stacked = tuple[Tensor, Tensor]


class _SavedTensor(NamedTuple):
    key: str
    tensor: Tensor
    saved: str


#: A and B, by letter.
_Pair = dict[str, _SavedTensor]


class _Target(NamedTuple):
    """What a pair of factors belongs to; `parameter` is "" in PEFT's wrappers, which omit it."""

    parameter: str
    half: Half
    expert: int | None
    nested: bool


class ExpertReading:
    """The factors of routed experts in a checkpoint, at `paths`; `singly`: some are of one expert.
    `touched`: columns with factors, by module and parameter, complete after `decode`."""

    def __init__(self, findings: Findings) -> None:
        self.findings, self.config = findings, findings.config
        self.paths: set[str] = set()
        self.singly = False
        self.touched: dict[tuple[int, str], set[Columns]] = {}
        self._modules: dict[int, tuple[Experts, dict[_Target, _Pair]]] = {}

    def take(self, factor: FactorKey, place: ExpertPlace) -> None:
        self.paths.add(place.saved)
        self.singly |= place.expert is not None
        experts, weight = place.experts, place.weight
        if factor.letter in "mb":
            feature = "DoRA" if factor.letter == "m" else "a bias of lora_B"
            raise Unsupported(f"{factor.key}: {feature} on routed experts")
        if place.reason or factor.embedding:
            reason = place.reason or "experts have no embedding factors"
            raise Problem(f"{factor.key}: {reason}")
        if place.expert is not None and place.expert >= experts.count:
            raise Problem(
                f"{factor.key}: {experts.path} has {experts.count} experts here (0 … "
                f"{experts.count - 1}), so the adapter was made for a model with more"
            )
        if weight is not None and weight.name not in experts.sites:
            self.findings.unavailable[place.saved] = not_selected([weight.path(experts.path)])
        elif not experts.sites:
            self.findings.unavailable[place.saved] = not_selected([experts.path])
        else:
            tensor = self.findings.state.tensors[factor.key]
            if weight and not (weight.halves or weight.down) and tensor.shape == (0,):
                return  # Tinker's w3 of experts that have no gate, whose only projection is w1
            _, pairs = self._modules.setdefault(id(experts.module), (experts, {}))
            name = "" if weight is None else weight.name
            pair = pairs.setdefault(_Target(name, place.half, place.expert, place.nested), {})
            first = pair.setdefault(factor.letter, _SavedTensor(factor.key, tensor, place.saved))
            self.findings.check_same(factor, first.key, place.saved)

    def decode(self) -> Iterator[tuple[str, LoraWeights]]:
        """Yields (part path, factors) of each part whose factors have no problem."""
        for experts, pairs in self._modules.values():
            for name, terms in self._terms(experts, pairs).items():
                touched = self.touched.setdefault((id(experts.module), name), set())
                touched.update((term.half, expert) for term in terms for expert in term.experts)
                with self.findings.noting():
                    yield from _assemble(experts.sites[name], terms)

    @property
    def modules(self) -> set[int]:
        return set(self._modules)

    def _terms(self, experts: Experts, pairs: Mapping[_Target, _Pair]) -> dict[str, list[_Term]]:
        terms: dict[str, list[_Term]] = {}
        weights = {weight.name: weight for weight in experts.weights}
        wrappers = {target.nested: pair for target, pair in pairs.items() if not target.parameter}
        assigned: list[tuple[ExpertWeight, _Pair]] = []
        with self.findings.noting():
            assigned = self._assign_wrappers(experts, wrappers)
        for weight, pair in assigned:
            with self.findings.noting():
                terms.setdefault(weight.name, []).extend(self._wrapper_terms(experts, weight, pair))
        for target, pair in _with_shared(pairs).items():
            if target.parameter:
                with self.findings.noting():
                    named_terms = self._named_terms(weights[target.parameter], target, pair)
                    terms.setdefault(target.parameter, []).extend(named_terms)
        return {name: items for name, items in terms.items() if items}

    def _assign_wrappers(
        self, experts: Experts, wrappers: dict[bool, _Pair]
    ) -> list[tuple[ExpertWeight, _Pair]]:
        """Match wrappers with parameters: by order, by the configuration, by the shapes."""
        for pair in wrappers.values():
            _check_pair(pair)
        pairs = [wrappers[nested] for nested in (True, False) if nested in wrappers]
        orders = [
            [*zip(order, pairs, strict=True)] for order in permutations(experts.weights, len(pairs))
        ]
        fitting = [o for o in orders if all(self._fits(experts, w, pair) for w, pair in o)]
        if len(pairs) != 1:
            return (*fitting, *orders)[0]
        saved = unnested(pairs[0]["A"].saved)
        targeted = [o for o in orders if self.config.targets_parameter(o[0][0].path(saved))]
        for candidates in (targeted, fitting):
            if len(candidates) == 1:
                return candidates[0]
        names = " and ".join(weight.name for weight in experts.weights)
        shapes = ", ".join(f"{f.key} {tuple(f.tensor.shape)}" for f in pairs[0].values())
        if fitting:
            raise Problem(
                f"{shapes}: these fit {names} equally, and adapter_config.json does not say "
                "which of them was trained; add target_parameters there"
            )
        sizes = "; ".join(
            f"{w.name} needs A (r·{w.experts}, {w.in_features}), B ({w.out_features}, "
            f"r·{w.experts})"
            for w in experts.weights
        )
        raise Problem(f"{shapes}: these fit neither {names} of {experts.path}: {sizes}")

    def _fits(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> bool:
        try:
            self._unwrapped(experts, weight, pair)
        except Problem:
            return False
        return True

    def _unwrapped(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> _Stacked:
        """The factors of a wrapper. Which of A and B takes the input depends on PEFT's release."""
        a, b = pair["A"].tensor, pair["B"].tensor
        count, k, n = _sizes_of(weight, "all")
        rank = a.shape[1] if a.dim() == 3 else 0
        if rank and a.shape == (count, rank, k) and b.shape == (n, rank, count):  # vLLM's
            return a, b.permute(2, 0, 1)
        version, swapped = self.config.peft_version, None
        if version is not None:
            old = version < _READS_TRANSPOSED
            transposed = old or bool(getattr(experts.module, "is_transposed", False))
            swapped = transposed != weight.transposed
        straight, crossed = _fit_sizes(a, b, count, k, n), _fit_sizes(a, b, count, n, k)
        if crossed and (swapped or not straight):
            return _split_columns(b, count).mT, _split_rows(a, count).mT
        if straight and (not crossed or swapped is not None):
            return _split_rows(a, count), _split_columns(b, count)
        label = f"{pair['A'].key}, {pair['B'].key} (of {weight.name})"
        if straight:
            raise Problem(
                f"{label}: {k} = {n}, so the shapes do not show which of the two factors takes the "
                "input; adapter_config.json lacks peft_version, which would"
            )
        hint = ""
        if _fit_sizes(a, b, 1, k, n) or _fit_sizes(a, b, 1, n, k):
            hint = f"; {a.shape[0]} is not a multiple of that, so it is for another number"
        raise Problem(
            f"{label}: shapes {tuple(a.shape)} and {tuple(b.shape)} are not (r·{count}, {k}) and "
            f"({n}, r·{count}) for the {count} experts of this model{hint}"
        )

    def _wrapper_terms(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> list[_Term]:
        key, saved = pair["A"].key, pair["A"].saved
        if weight.name not in experts.sites:
            self.findings.unavailable[saved] = not_selected([weight.path(experts.path)])
            return []
        a, b = self._unwrapped(experts, weight, pair)
        name, rank = weight.path(unnested(saved)), a.shape[1]
        rows = rank * weight.experts
        original = weight.path(unnested(self.findings.original_path(saved)))
        configured = self.config.rank(original)
        if configured not in (None, rank) and rows % configured == 0:
            raise Problem(
                f"{key} has {rows} rows, which at the rank {configured} of adapter_config.json "
                f"are those of {rows // configured} experts; {name} has {weight.experts} here"
            )
        return self._term("all", range(weight.experts), a, b, name, saved, original)

    def _named_terms(self, weight: ExpertWeight, target: _Target, pair: _Pair) -> list[_Term]:
        _check_pair(pair)
        (key_a, a, saved), (key_b, b, _) = pair["A"], pair["B"]
        count, k, n = _sizes_of(weight, target.half)
        if target.expert is None:
            experts = range(count)
            a, b = (_of_each(t, count) if 3 in (a.dim(), b.dim()) else t for t in (a, b))
            rank = b.shape[-1] if b.dim() else 0
            if a.shape != (count, rank, k) or b.shape != (count, n, rank) or not a.numel():
                raise Problem(
                    f"{key_a}, {key_b}: shapes {tuple(a.shape)} and {tuple(b.shape)} are not "
                    f"({count}, r, {k}) and ({count}, {n}, r), of which one may be shared (1, …)"
                )
        else:
            experts, rank = range(target.expert, target.expert + 1), len(a) if a.dim() else 0
            check_shape(key_a, a, (rank, k), f"{saved} needs (r, {k})")
            check_shape(key_b, b, (n, rank), f"{saved} needs ({n}, r = {rank})")
            a, b = a[None], b[None]
        original = self.findings.original_path(saved)
        return self._term(target.half, experts, a, b, saved, saved, original)

    def _term(
        self, half: Half, experts: range, a: Tensor, b: Tensor, name: str, saved: str, original: str
    ) -> list[_Term]:
        scale = self.findings.scale(name, original, saved, a.shape[1])
        return [] if scale is None else [_Term(half, experts, a, b, scale, name)]


def _with_shared(pairs: Mapping[_Target, _Pair]) -> Mapping[_Target, _Pair]:
    """The pairs, where a factor of all experts completes those of single ones that lack it."""
    completed, used = dict(pairs), set()
    for target, pair in pairs.items():
        everyone = target._replace(expert=None)
        shared = pairs.get(everyone, {})
        if target.expert is None or len(shared) != 1 or len(pair) != 1 or shared.keys() & pair:
            continue
        used.add(everyone)
        ((letter, saved),) = shared.items()
        if saved.tensor.dim() == 3 and len(saved.tensor) == 1:
            saved = saved._replace(tensor=saved.tensor[0])
        completed[target] = {**pair, letter: saved}
    return {target: pair for target, pair in completed.items() if target not in used}


def _of_each(factor: Tensor, experts: int) -> Tensor:
    """A factor for each expert, of one that all may share: (r, K) or (1, r, K)."""
    alone = factor.dim() == 2 or (factor.dim() == 3 and len(factor) == 1)
    return factor.expand(experts, -1, -1) if alone else factor


def _check_pair(pair: _Pair) -> None:
    for letter in "AB":
        if letter not in pair:
            (other,) = pair.values()
            raise Problem(f"{other.key}: {other.saved} has no factor {letter}")
    for factor in pair.values():
        check_sound(factor.key, factor.tensor)


def _sizes_of(weight: ExpertWeight, half: Half) -> tuple[int, int, int]:
    """E, K, and N of a half of a parameter's columns."""
    divided = half != "all" and bool(weight.halves)
    n = weight.out_features // 2 if divided else weight.out_features
    return weight.experts, weight.in_features, n


def _fit_sizes(a: Tensor, b: Tensor, experts: int, k: int, n: int) -> bool:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return False
    return a.shape[1] == k and b.shape[0] == n and a.shape[0] % experts == 0


def _split_rows(a: Tensor, experts: int) -> Tensor:
    return a.reshape(experts, -1, a.shape[1])


def _split_columns(b: Tensor, experts: int) -> Tensor:
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


class _Term(NamedTuple):
    """Factors A (n, r, K) and B (n, N, r) of n experts, N the columns of a half, and s."""

    half: Half
    experts: range
    A: Tensor
    B: Tensor
    scale: float
    label: str


def _check_overlap(terms: Sequence[_Term], name: str) -> None:
    seen: dict[tuple[int, Half], _Term] = {}
    for term in terms:
        halves: tuple[Half, ...] = ("gate", "up") if term.half == "all" else (term.half,)
        for key in ((expert, half) for expert in term.experts for half in halves):
            other = seen.setdefault(key, term)
            if other is not term:
                raise Problem(
                    f"{other.label} and {term.label} both have factors for the same columns of "
                    f"{name}; keep one"
                )


def _assemble(site: Site, terms: Sequence[_Term]) -> Iterator[tuple[str, LoraWeights]]:
    """Yields (part path, factors) in the terms' widest dtype. Raises `Problem` if terms overlap."""
    assert site.expert_weight is not None
    _check_overlap(terms, site.expert_weight.name)
    for index in range(len(site.parts)):
        part_terms = [
            (term, b)
            for term in terms
            if (b := _columns(site, index, term.half, term.B)) is not None
        ]
        if not part_terms:
            continue
        weight = site.module._parameters.get(site.expert_weight.name)  # None: it is computed
        count = site.experts if weight is None else len(weight)
        joined, sharding = _join_terms(count, part_terms), site.eligible.sharding
        own = None if weight is None else own_indices(weight, 0)
        if own is not None:  # this rank's experts
            tensors = (item for item in joined if isinstance(item, Tensor))
            joined = LoraWeights(*(tensor[own] for tensor in tensors))
        if sharding is not None:  # this rank's share
            a, b = sharding.cut(site.module, site.parts[index].slices, joined.A, joined.B)
            joined = joined._replace(A=a, B=b)
        yield site.part_path(index), joined


def _columns(site: Site, part: int, half: Half, b: Tensor) -> Tensor | None:
    weight, size = site.expert_weight, saved_sizes((site, part))[1]
    assert weight is not None
    if weight.halves == "stacked":
        if half == "all":
            return b[:, part * size : (part + 1) * size]
        return b if ("gate", "up")[part] == half else None
    if weight.halves == "interleaved" and half != "all":
        wide = b.new_zeros(b.shape[0], size, b.shape[2])
        wide[:, 0 if half == "gate" else 1 :: 2] = b
        return wide
    return b


def _join_terms(experts: int, terms: Sequence[tuple[_Term, Tensor]]) -> LoraWeights:
    ranks = torch.zeros(experts, dtype=torch.int32)
    for term, _ in terms:
        ranks[term.experts.start : term.experts.stop] += term.A.shape[1]
    first, b = terms[0]
    dtypes = (tensor.dtype for term, columns in terms for tensor in (term.A, columns))
    dtype = reduce(torch.promote_types, dtypes)
    max_rank = int(ranks.max())
    joined_a = torch.zeros(experts, max_rank, first.A.shape[2], dtype=dtype)
    joined_b = torch.zeros(experts, b.shape[1], max_rank, dtype=dtype)
    scales = torch.zeros(experts)
    ends = [0] * experts
    for term, columns in terms:
        for i, expert in enumerate(term.experts):
            start, end = ends[expert], ends[expert] + term.A.shape[1]
            joined_a[expert, start:end] = term.A[i]
            joined_b[expert, :, start:end] = columns[i]
            ends[expert] = end
            if start and float(scales[expert]) != term.scale:
                # An expert has a single scale, so B absorbs unequal scales of terms.
                joined_b[expert, :, :start] *= scales[expert].to(dtype)
                joined_b[expert, :, start:end] *= term.scale
                scales[expert] = 1
            else:
                scales[expert] = term.scale
    return LoraWeights(joined_a, joined_b, scales, ranks)

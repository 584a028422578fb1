"""Factors of routed experts: from saved tensors to terms, and to a pair for each part.

    experts.3.gate_proj.lora_A (r, K), lora_B (N, r)    a term of expert 3
    experts.gate_up_proj.lora_A, lora_B                 a term of every expert, by the shapes
    experts.gate_up_proj.lora_A, experts.3.…lora_B      terms that share their A
    experts.lora_A, experts.base_layer.lora_A           PEFT's wrappers, the outer and the inner

    ΔW[e] = Σ_t s_t · B_t[e] A_t[e],   W (E, N, K),   A (E, r, K),   B (E, N, r)

    stacked by PEFT    A (r·E, K), row e·r + j;   B (N, r·E), column j·E + e
    exchanged          A (r·E, N), B (K, r·E):    ΔW[e] = s · (B[e] A[e])ᵀ
    apart              A (E, r, K), B (E, N, r)
    shared             A (r, K) or B (N, r), the same for all experts

The inner wrapper is of the first registered parameter; a single wrapper has the outer name. PEFT
exchanges A and B where the module's `is_transposed`, or before 0.19 the order of dimensions,
disagrees with its computation. The shapes tell unless K = N; then PEFT's version does. Terms are of
the whole parameter, its gate, or its up projection; interleaved gate and up terms become a pair of
rank r_gate + r_up, with zeros in B at the other's columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.findings import (
    Findings,
    Problem,
    Unsupported,
    check_shape,
    check_sound,
)
from lorafx.adapter_store.peft_keys import FactorKey
from lorafx.adapter_store.places import ExpertPlace, Experts, not_selected, saved_sizes
from lorafx.adapter_store.stored import LoraWeights
from lorafx.errors import some
from lorafx.model.experts import Columns, ExpertWeight, Half, unnested
from lorafx.model.sites import Site

#: The first release that reads `is_transposed`.
_READS_TRANSPOSED = (0, 19)
#: A (E, r, K) and B (E, N, r).
_Stacked = tuple[Tensor, Tensor]


class _Found(NamedTuple):
    key: str
    letter: str
    tensor: Tensor
    place: ExpertPlace


_Pair = dict[str, _Found]


@dataclass
class _Module:
    """A file's pairs for a module; `touched` are the columns with factors, by parameter."""

    experts: Experts
    wrappers: dict[bool, _Pair] = field(default_factory=dict)
    named: dict[tuple[str, Half], dict[int | None, _Pair]] = field(default_factory=dict)
    touched: dict[str, set[Columns]] = field(default_factory=dict)

    def touch(self, weight: ExpertWeight, half: Half = "all", expert: int | None = None) -> None:
        self.touched.setdefault(weight.name, set()).add((half, expert))

    def pair(self, place: ExpertPlace) -> _Pair:
        if place.weight is None:
            return self.wrappers.setdefault(place.nested, {})
        self.touch(place.weight, place.half, place.expert)
        by_expert = self.named.setdefault((place.weight.name, place.half), {})
        return by_expert.setdefault(place.expert, {})


class ExpertReading:
    """Routed experts' factors of a checkpoint at `paths`, some of a single expert if `singly`."""

    def __init__(self, findings: Findings) -> None:
        self.findings, self.config = findings, findings.config
        self.paths: set[str] = set()
        self.singly = False
        self._modules: dict[int, _Module] = {}
        self._beyond: dict[int, tuple[Experts, set[int]]] = {}

    def take(self, factor: FactorKey, place: ExpertPlace) -> None:
        self.paths.add(place.saved)
        self.singly |= place.expert is not None
        experts, weight = place.experts, place.weight
        if factor.letter in "mb":
            what = "DoRA" if factor.letter == "m" else "a bias of lora_B"
            raise Unsupported(f"{factor.key}: {what} on routed experts")
        if place.reason or factor.embedding:
            reason = place.reason or "experts have no embedding factors"
            raise Problem(f"{factor.key}: {reason}")
        if place.expert is not None and place.expert >= experts.count:
            self._beyond.setdefault(id(experts), (experts, set()))[1].add(place.expert)
        elif weight is not None and weight.name not in experts.sites:
            self.findings.closed[place.saved] = not_selected([weight.path(experts.path)])
        elif not experts.sites:
            self.findings.closed[place.saved] = not_selected([experts.path])
        else:
            module = self._modules.setdefault(id(experts.module), _Module(experts))
            tensor = self.findings.state.tensors[factor.key]
            found = _Found(factor.key, factor.letter, tensor, place)
            first = module.pair(place).setdefault(factor.letter, found)
            if first is not found and not self.findings.equal(found.key, first.key):
                raise Problem(
                    f"{found.key} and {first.key} are both {factor.factor} of {place.saved} and "
                    "differ; keep one"
                )

    def decode(self) -> Iterator[tuple[str, LoraWeights]]:
        """(part path, factors) of each part whose factors have no problem."""
        for experts, indices in self._beyond.values():
            self.findings.problems.append(
                f"{experts.path} has {experts.count} experts here (0 … {experts.count - 1}), and "
                f"the adapter has factors for {some(map(str, sorted(indices)), 8)}: it was made "
                "for a model with more"
            )
        for module in self._modules.values():
            terms: dict[str, list[_Term]] = {}
            self._unwrap(module, terms)
            self._named(module, terms)
            for name in [name for name, of_weight in terms.items() if of_weight]:
                with self.findings.noting():
                    yield from _assembled(module.experts.sites[name], terms[name])

    @property
    def modules(self) -> set[int]:
        return set(self._modules)

    def touched(self, experts: Experts, weight: ExpertWeight) -> Collection[Columns]:
        module = self._modules.get(id(experts.module))
        return () if module is None else module.touched.get(weight.name, ())

    def _named(self, module: _Module, terms: dict[str, list[_Term]]) -> None:
        weights = {weight.name: weight for weight in module.experts.weights}
        for (name, half), pairs in module.named.items():
            weight, found = weights[name], terms.setdefault(name, [])
            common = pairs.pop(None, {})
            if len(common) == 2 or not pairs:
                with self.findings.noting():
                    found += self._term_of_all(weight, half, common)
                common = {}
            for expert, pair in sorted(pairs.items(), key=lambda item: item[0] or 0):
                assert expert is not None
                with self.findings.noting():
                    for letter in common.keys() & pair.keys():
                        raise Problem(
                            f"{common[letter].key} is for all experts, but {pair[letter].key} for "
                            "one of them; keep only one of the two"
                        )
                    found += self._term_of_one(weight, half, expert, {**common, **pair})

    def _unwrap(self, module: _Module, terms: dict[str, list[_Term]]) -> None:
        parameters: list[tuple[bool, ExpertWeight]] = []
        with self.findings.noting():
            for pair in module.wrappers.values():
                _check_pair(pair)
            parameters = self._parameters(module.experts, module.wrappers)
        if module.wrappers and not parameters:
            for weight in module.experts.weights:
                module.touch(weight)
        for nested, weight in parameters:
            module.touch(weight)
            with self.findings.noting():
                terms.setdefault(weight.name, []).extend(
                    self._term_of_wrapper(module.experts, weight, module.wrappers[nested])
                )

    def _term_of_wrapper(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> list[_Term]:
        key, saved = pair["A"].key, pair["A"].place.saved
        if weight.name not in experts.sites:
            self.findings.closed[saved] = not_selected([weight.path(experts.path)])
            return []
        a, b = self._stacked(experts, weight, pair)
        name, rank = weight.path(unnested(saved)), a.shape[1]
        rows, configured = rank * weight.experts, self.config.rank(name)
        if configured not in (None, rank) and rows % configured == 0:
            raise Problem(
                f"{key} has {rows} rows, which at the rank {configured} of adapter_config.json "
                f"are those of {rows // configured} experts; {name} has {weight.experts} here"
            )
        return self._term("all", range(weight.experts), a, b, name, saved)

    def _parameters(
        self, experts: Experts, pairs: dict[bool, _Pair]
    ) -> list[tuple[bool, ExpertWeight]]:
        """The parameter of each wrapper: by order, by the configuration, by the shapes."""
        if len(pairs) == 2:
            orders = [experts.weights, experts.weights[::-1]]
            fitting = [
                (inner, outer)
                for inner, outer in orders
                if self._fits(experts, inner, pairs[True])
                and self._fits(experts, outer, pairs[False])
            ]
            inner, outer = (*fitting, orders[0])[0]
            return [(True, inner), (False, outer)]
        if not pairs:
            return []
        ((nested, pair),) = pairs.items()
        saved = unnested(pair["A"].place.saved)
        targeted = [w for w in experts.weights if self.config.targets_parameter(w.path(saved))]
        fits = [w for w in experts.weights if self._fits(experts, w, pair)]
        for candidates in (targeted, fits):
            if len(candidates) == 1:
                return [(nested, candidates[0])]
        names = " and ".join(weight.name for weight in experts.weights)
        shapes = ", ".join(f"{found.key} {tuple(found.tensor.shape)}" for found in pair.values())
        if fits:
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
            self._stacked(experts, weight, pair)
        except Problem:
            return False
        return True

    def _stacked(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> _Stacked:
        """Factors of a wrapper. Releases know differently which of A and B takes the input."""
        version, swapped = self.config.peft_version, None
        if version is not None:
            reads = version >= _READS_TRANSPOSED
            transposed = not reads or bool(getattr(experts.module, "is_transposed", False))
            swapped = transposed != weight.transposed
        with _naming(pair, f" (of {weight.name})"):
            return _wrapped(pair["A"].tensor, pair["B"].tensor, _sizes_of(weight, "all"), swapped)

    def _term_of_all(self, weight: ExpertWeight, half: Half, pair: _Pair) -> list[_Term]:
        _check_pair(pair)
        saved, sizes = pair["A"].place.saved, _sizes_of(weight, half)
        name = self.config.name_of(saved)
        rank = self.config.rank(name)
        with _naming(pair):
            a, b = _named_factors(pair["A"].tensor, pair["B"].tensor, sizes, rank)
        return self._term(half, range(weight.experts), a, b, name, saved)

    def _term_of_one(
        self, weight: ExpertWeight, half: Half, expert: int, pair: _Pair
    ) -> list[_Term]:
        _check_pair(pair)
        saved = next(f.place.saved for f in pair.values() if f.place.expert is not None)
        a, b = (_of_expert(pair[letter], expert) for letter in "AB")
        rank = a.shape[0] if a.dim() == 2 else 0
        _, k, n = _sizes_of(weight, half)
        check_shape(pair["A"].key, a, (rank, k), f"{saved} needs (r, {k})")
        check_shape(pair["B"].key, b, (n, rank), f"{saved} needs ({n}, r = {rank})")
        return self._term(half, range(expert, expert + 1), a[None], b[None], saved, saved)

    def _term(
        self, half: Half, experts: range, a: Tensor, b: Tensor, name: str, saved: str
    ) -> list[_Term]:
        scale = self.findings.scale(name, name, saved, a.shape[1])
        return [] if scale is None else [_Term(half, experts, a, b, scale, name)]


def _check_pair(pair: _Pair) -> None:
    if len(pair) == 1:
        (have,) = pair.values()
        lacks = "B" if have.letter == "A" else "A"
        raise Problem(f"{have.key}: {have.place.saved} has no factor {lacks}")
    for found in pair.values():
        check_sound(found.key, found.tensor)


@contextmanager
def _naming(pair: _Pair, what: str = "") -> Iterator[None]:
    try:
        yield
    except Problem as problem:
        raise Problem(f"{pair['A'].key}, {pair['B'].key}{what}: {problem}") from None


def _of_expert(found: _Found, expert: int) -> Tensor:
    shared = found.place.expert is None and found.tensor.dim() == 3
    return found.tensor[expert] if shared and expert < len(found.tensor) else found.tensor


def _sizes_of(weight: ExpertWeight, half: Half) -> tuple[int, int, int]:
    """E, K, and the N of a half of a parameter's columns."""
    divided = half != "all" and bool(weight.halves)
    n = weight.out_features // 2 if divided else weight.out_features
    return weight.experts, weight.in_features, n


def _wrapped(a: Tensor, b: Tensor, sizes: tuple[int, int, int], swapped: bool | None) -> _Stacked:
    """Factors from PEFT's wrapper; `swapped` decides where both orders fit. Raises `Problem`."""
    experts, k, n = sizes
    if a.dim() == b.dim() == 3:
        return _named_factors(a, b, sizes, None)
    straight, crossed = _stacks(a, b, experts, k, n), _stacks(a, b, experts, n, k)
    if straight and crossed and swapped is None:
        raise Problem(
            f"{k} = {n}, so the shapes do not show which of the two factors takes the "
            "input; adapter_config.json lacks peft_version, which would"
        )
    if crossed and (swapped or not straight):
        return _stacked_columns(b, experts).mT, _rows(a, experts).mT
    if straight:
        return _rows(a, experts), _stacked_columns(b, experts)
    other = ""
    if _stacks(a, b, 1, k, n) or _stacks(a, b, 1, n, k):
        other = f"; {a.shape[0]} is not a multiple of that, so it is for another number of experts"
    raise Problem(
        f"shapes {tuple(a.shape)} and {tuple(b.shape)} are not (r·{experts}, {k}) and "
        f"({n}, r·{experts}) for the {experts} experts of this model{other}"
    )


def _named_factors(a: Tensor, b: Tensor, sizes: tuple[int, int, int], rank: int | None) -> _Stacked:
    """Factors under a parameter's name: each stacked, apart or shared. The configured `rank`
    decides where shared and stacked shapes coincide. Raises `Problem` where nothing fits."""
    experts, k, n = sizes
    matrices = a.dim() == b.dim() == 2
    if matrices and k != n and _stacks(a, b, experts, n, k):
        return _wrapped(a, b, sizes, True)
    fits = {a.dim(), b.dim()} <= {2, 3} and a.shape[-1] == k and b.shape[-2] == n
    fits = fits and a.numel() > 0 and b.numel() > 0
    fits = fits and all(t.dim() == 2 or t.shape[0] == experts for t in (a, b))
    found = _rank(a, b, experts, rank) if fits else None
    if found is None:
        raise Problem(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit {experts} experts with A "
            f"(r, {k}) and B ({n}, r) each, or one for all"
        )
    if a.dim() == 2:
        a = a.expand(experts, -1, -1) if a.shape[0] == found else _rows(a, experts)
    if b.dim() == 2:
        b = b.expand(experts, -1, -1) if b.shape[1] == found else _stacked_columns(b, experts)
    return a, b


def _rank(a: Tensor, b: Tensor, experts: int, configured: int | None) -> int | None:
    """r of factors in any layout, None if shapes disagree; raises `Problem` if ambiguous."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 3 or b.dim() == 3:
        if a.dim() == b.dim():
            return rows if rows == columns else None
        apart, other = (rows, columns) if a.dim() == 3 else (columns, rows)
        return apart if other in (apart, apart * experts) else None
    if rows == columns and experts > 1:
        if configured is not None and rows in (configured, configured * experts):
            return configured
        raise Problem(
            f"{rows} rows are those of rank {rows} for all experts or of r·{experts} = {rows} for "
            f"each of them; r in adapter_config.json, which would tell, is {configured}"
        )
    if rows == columns * experts:
        return columns
    return rows if columns in (rows, rows * experts) else None


def _stacks(a: Tensor, b: Tensor, experts: int, k: int, n: int) -> bool:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return False
    return a.shape[1] == k and b.shape[0] == n and a.shape[0] % experts == 0


def _rows(a: Tensor, experts: int) -> Tensor:
    return a.reshape(experts, -1, a.shape[1])


def _stacked_columns(b: Tensor, experts: int) -> Tensor:
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


class _Term(NamedTuple):
    """Factors of n experts, A (n, r, K) and B (n, N, r), N the columns of a half, and s."""

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


def _assembled(site: Site, terms: Sequence[_Term]) -> Iterator[tuple[str, LoraWeights]]:
    """(part path, factors) in the terms' widest dtype. Raises `Problem` where terms overlap."""
    assert site.expert_weight is not None
    _check_overlap(terms, site.expert_weight.name)
    for index in range(len(site.parts)):
        touching = [
            (term, b)
            for term in terms
            if (b := _columns(site, index, term.half, term.B)) is not None
        ]
        if not touching:
            continue
        whole, sharding = _joined(site.experts, touching), site.eligible.sharding
        if sharding is not None:  # this rank's share
            a, b = sharding.cut(site.module, site.parts[index].slices, whole.A, whole.B)
            whole = whole._replace(A=a, B=b)
        yield site.part_path(index), whole


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


def _joined(experts: int, terms: Sequence[tuple[_Term, Tensor]]) -> LoraWeights:
    ranks = torch.zeros(experts, dtype=torch.int32)
    for term, _ in terms:
        ranks[term.experts.start : term.experts.stop] += term.A.shape[1]
    first, b = terms[0]
    dtypes = (tensor.dtype for term, columns in terms for tensor in (term.A, columns))
    dtype = reduce(torch.promote_types, dtypes)
    most = int(ranks.max())
    joined_a = torch.zeros(experts, most, first.A.shape[2], dtype=dtype)
    joined_b = torch.zeros(experts, b.shape[1], most, dtype=dtype)
    scales = torch.zeros(experts)
    used = [0] * experts
    for term, columns in terms:
        for at, expert in enumerate(term.experts):
            start, end = used[expert], used[expert] + term.A.shape[1]
            joined_a[expert, start:end] = term.A[at]
            joined_b[expert, :, start:end] = columns[at]
            used[expert] = end
            if start and float(scales[expert]) != term.scale:
                # An expert has a single scale, so B absorbs unequal scales of terms.
                joined_b[expert, :, :start] *= scales[expert].to(dtype)
                joined_b[expert, :, start:end] *= term.scale
                scales[expert] = 1
            else:
                scales[expert] = term.scale
    return LoraWeights(joined_a, joined_b, scales, ranks)

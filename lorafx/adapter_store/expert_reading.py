"""From saved tensors of routed experts to terms (see `expert_factors`).

    experts.3.gate_proj.lora_A (r, K), lora_B (N, r)    a term of expert 3
    experts.gate_up_proj.lora_A, lora_B                 a term of every expert, by the shapes
    experts.gate_up_proj.lora_A, experts.3.…lora_B      terms that share their A
    experts.lora_A, experts.base_layer.lora_A           PEFT's wrappers, the outer and the inner

The inner wrapper is of the first registered parameter; a single wrapper has the outer name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lorafx.adapter_store.adapter import LoraWeights
from lorafx.adapter_store.expert_factors import (
    ExpertTerm,
    Stacked,
    assembled,
    exchanged,
    named,
    sizes_of,
    wrapped,
)
from lorafx.adapter_store.findings import (
    Findings,
    Problem,
    Unsupported,
    check_shape,
    check_sound,
)
from lorafx.adapter_store.peft_keys import FactorKey
from lorafx.adapter_store.places import ExpertPlace, Experts, not_selected
from lorafx.errors import some
from lorafx.model.experts import Columns, ExpertWeight, Half, unnested


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
            terms: dict[str, list[ExpertTerm]] = {}
            self._unwrap(module, terms)
            self._named(module, terms)
            for name in [name for name, of_weight in terms.items() if of_weight]:
                with self.findings.noting():
                    yield from assembled(module.experts.sites[name], terms[name])

    @property
    def modules(self) -> set[int]:
        return set(self._modules)

    def touched(self, experts: Experts, weight: ExpertWeight) -> Collection[Columns]:
        module = self._modules.get(id(experts.module))
        return () if module is None else module.touched.get(weight.name, ())

    def _named(self, module: _Module, terms: dict[str, list[ExpertTerm]]) -> None:
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

    def _unwrap(self, module: _Module, terms: dict[str, list[ExpertTerm]]) -> None:
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

    def _term_of_wrapper(
        self, experts: Experts, weight: ExpertWeight, pair: _Pair
    ) -> list[ExpertTerm]:
        a, saved = pair["A"], pair["A"].place.saved
        if weight.name not in experts.sites:
            self.findings.closed[saved] = not_selected([weight.path(experts.path)])
            return []
        found = self._stacked(experts, weight, pair)
        name = weight.path(unnested(saved))
        rows, configured = found.rank * weight.experts, self.config.rank(name)
        if configured not in (None, found.rank) and rows % configured == 0:
            raise Problem(
                f"{a.key} has {rows} rows, which at the rank {configured} of adapter_config.json "
                f"are those of {rows // configured} experts; {name} has {weight.experts} here"
            )
        return self._term("all", range(weight.experts), found, name, saved)

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

    def _stacked(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> Stacked:
        swapped = exchanged(experts.module, weight, self.config.peft_version)
        with _naming(pair, f" (of {weight.name})"):
            return wrapped(pair["A"].tensor, pair["B"].tensor, sizes_of(weight, "all"), swapped)

    def _term_of_all(self, weight: ExpertWeight, half: Half, pair: _Pair) -> list[ExpertTerm]:
        _check_pair(pair)
        saved = pair["A"].place.saved
        name, sizes = self.config.name_of(saved), sizes_of(weight, half)
        with _naming(pair):
            found = named(pair["A"].tensor, pair["B"].tensor, sizes, self.config.rank(name))
        return self._term(half, range(weight.experts), found, name, saved)

    def _term_of_one(
        self, weight: ExpertWeight, half: Half, expert: int, pair: _Pair
    ) -> list[ExpertTerm]:
        _check_pair(pair)
        single = next(found for found in pair.values() if found.place.expert is not None)
        a, b = (_of_expert(pair[letter], expert) for letter in "AB")
        rank, saved = a.shape[0] if a.dim() == 2 else 0, single.place.saved
        _, k, n = sizes_of(weight, half)
        check_shape(pair["A"].key, a, (rank, k), f"{saved} needs (r, {k})")
        check_shape(pair["B"].key, b, (n, rank), f"{saved} needs ({n}, r = {rank})")
        return self._term(half, range(expert, expert + 1), Stacked(a[None], b[None]), saved, saved)

    def _term(
        self, half: Half, experts: range, found: Stacked, name: str, saved: str
    ) -> list[ExpertTerm]:
        scale = self.findings.scale(name, name, saved, found.rank)
        return [] if scale is None else [ExpertTerm(half, experts, found.A, found.B, scale, name)]


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

"""Factors of routed experts on their way from saved tensors to terms (see `expert_terms`).

    experts.3.gate_proj.lora_A (r, K), lora_B (N, r)    a term of expert 3
    experts.gate_up_proj.lora_A, lora_B                 a term of every expert, by the shapes
    experts.gate_up_proj.lora_A, experts.3.…lora_B      terms that share their A
    experts.lora_A, experts.base_layer.lora_A           PEFT's wrappers, the outer and the inner

PEFT wraps the parameters in the order in which the module registers them, so the inner wrapper is
the first of two. A wrapper alone has the outer one's name, whichever parameter it is of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lorafx.adapter_store.expert_factors import ExpertSizes, Stacked, exchanged, named, wrapped
from lorafx.adapter_store.expert_places import ExpertPlace, Experts
from lorafx.adapter_store.expert_terms import ExpertTerm, assembled, columns_of, overlap
from lorafx.adapter_store.findings import Findings
from lorafx.adapter_store.lora_weights import LoraWeights
from lorafx.adapter_store.peft_keys import FactorKey
from lorafx.adapter_store.places import not_selected
from lorafx.model.experts import Columns, ExpertWeight, Half, unnested


class _Found(NamedTuple):
    """A saved factor and what its path means."""

    key: FactorKey
    place: ExpertPlace


_Pair = dict[str, _Found]


@dataclass
class _Module:
    """What a file has for one module: pairs by wrapper, and by parameter, half and expert.

    `touched` are the halves of which experts (None: all) that it has factors for, by parameter.
    """

    experts: Experts
    wrappers: dict[bool, _Pair] = field(default_factory=dict)
    named: dict[tuple[str, Half], dict[int | None, _Pair]] = field(default_factory=dict)
    touched: dict[str, set[Columns]] = field(default_factory=dict)

    def touch(self, weight: ExpertWeight, half: Half = "all", expert: int | None = None) -> None:
        self.touched.setdefault(weight.name, set()).add((half, expert))

    def pair(self, place: ExpertPlace) -> _Pair:
        if place.weight is None:
            return self.wrappers.setdefault(place.nested, {})
        own = self.named.setdefault((place.weight.name, place.half), {})
        self.touch(place.weight, place.half, place.expert)
        return own.setdefault(place.expert, {})


class ExpertReading:
    """The factors of one checkpoint that belong to routed experts.

    `paths` are the saved paths that do; `singly` is whether one of them is of a single expert.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.paths: set[str] = set()
        self.singly = False
        self._modules: dict[int, _Module] = {}
        self._beyond: dict[int, tuple[Experts, set[int]]] = {}

    def take(self, factor: FactorKey, place: ExpertPlace) -> None:
        """Keep a factor that belongs to routed experts, or note a problem."""
        self.paths.add(place.saved)
        self.singly |= place.expert is not None
        experts, weight = place.experts, place.weight
        if factor.letter == "m":
            self.findings.unsupported.append(f"{factor.key}: DoRA on routed experts")
        elif factor.letter == "b":
            self.findings.unsupported.append(f"{factor.key}: a bias of lora_B on routed experts")
        elif place.reason or factor.embedding:
            self._problem(f"{factor.key}: {place.reason or 'experts have no embedding factors'}")
        elif place.expert is not None and place.expert >= experts.count:
            self._beyond.setdefault(id(experts), (experts, set()))[1].add(place.expert)
        elif weight is not None and weight.name not in experts.sites:
            self.findings.closed[place.saved] = not_selected([weight.path(experts.path)])
        elif not experts.sites:
            self.findings.closed[place.saved] = not_selected([experts.path])
        else:
            self._keep(_Found(factor, place))

    def decode(self) -> Iterator[tuple[str, LoraWeights]]:
        """(part path, factors) of each part that the file has factors for and no problem with."""
        for experts, indices in self._beyond.values():
            self._problem(
                f"{experts.path} has {experts.count} experts here (0 … {experts.count - 1}), and "
                f"the adapter has factors for {_numbers(indices)}: it was made for a model with "
                "more"
            )
        for module in self._modules.values():
            terms: dict[str, list[ExpertTerm]] = {}
            for weight, term in self._terms(module):
                terms.setdefault(weight.name, []).append(term)
            for name, own in terms.items():
                twice = overlap(own)
                if twice is None:
                    yield from assembled(module.experts.sites[name], own)
                else:
                    self._problem(
                        f"{twice[0].label} and {twice[1].label} both have factors for the same "
                        f"columns of {name}; keep one"
                    )

    @property
    def modules(self) -> set[int]:
        """Identities of the modules that the file has factors for."""
        return set(self._modules)

    def touched(self, experts: Experts, weight: ExpertWeight) -> Collection[Columns]:
        """What the file has factors for of the parameter."""
        module = self._modules.get(id(experts.module))
        return () if module is None else module.touched.get(weight.name, ())

    def _keep(self, found: _Found) -> None:
        experts = found.place.experts
        module = self._modules.setdefault(id(experts.module), _Module(experts))
        pair, letter = module.pair(found.place), found.key.letter
        if letter not in pair:
            pair[letter] = found
        elif not self.findings.equal(found.key.key, pair[letter].key.key):
            self._problem(
                f"{found.key.key} and {pair[letter].key.key} are both {found.key.factor} of "
                f"{found.place.saved} and differ; keep one"
            )

    def _terms(self, module: _Module) -> Iterator[tuple[ExpertWeight, ExpertTerm]]:
        yield from self._unwrapped(module)
        weights = {weight.name: weight for weight in module.experts.weights}
        for (name, half), pairs in module.named.items():
            weight = weights[name]
            common = pairs.pop(None, {})
            if len(common) == 2 or not pairs:
                term = self._term_of_all(weight, half, common)
                if term is not None:
                    yield weight, term
                common = {}
            for expert, pair in sorted(pairs.items(), key=lambda item: item[0] or 0):
                assert expert is not None
                term = self._term_of_one(weight, half, expert, {**common, **pair})
                twice = common.keys() & pair.keys()
                if twice:
                    other = common[twice.pop()]
                    self._problem(
                        f"{other.key.key} is for all experts, but "
                        f"{pair[other.key.letter].key.key} for one of them; keep only one "
                        "of the two"
                    )
                elif term is not None:
                    yield weight, term

    def _unwrapped(self, module: _Module) -> Iterator[tuple[ExpertWeight, ExpertTerm]]:
        """The terms of PEFT's wrappers, each on the parameter that it is of."""
        pairs = {nested: pair for nested, pair in module.wrappers.items() if self._complete(pair)}
        if len(pairs) < len(module.wrappers):
            for weight in module.experts.weights:
                module.touch(weight)
            return
        for nested, weight in self._parameters(module, pairs):
            module.touch(weight)
            a, b = pairs[nested]["A"], pairs[nested]["B"]
            saved = a.place.saved
            if weight.name not in module.experts.sites:
                self.findings.closed[saved] = not_selected([weight.path(module.experts.path)])
                continue
            found = self._stacked(module.experts, weight, a, b)
            if isinstance(found, str):
                self._problem(f"{a.key.key}, {b.key.key} (of {weight.name}): {found}")
                continue
            name = weight.path(unnested(saved))
            rows, said = found.rank * weight.experts, self.findings.config.rank(name)
            if said not in (None, found.rank) and rows % said == 0:
                self._problem(
                    f"{a.key.key} has {rows} rows, which at the rank {said} of adapter_config.json "
                    f"are those of {rows // said} experts; {name} has {weight.experts} here"
                )
                continue
            term = self._term("all", range(weight.experts), found, name, saved)
            if term is not None:
                yield weight, term

    def _parameters(
        self, module: _Module, pairs: dict[bool, _Pair]
    ) -> list[tuple[bool, ExpertWeight]]:
        """The parameter that each wrapper is of: by order, by the configuration, by the shapes."""
        experts = module.experts
        first, second = experts.weights
        if len(pairs) == 2:
            orders = [(first, second), (second, first)]
            fitting = [
                (inner, outer)
                for inner, outer in orders
                if self._fits(experts, inner, pairs[True])
                and self._fits(experts, outer, pairs[False])
            ]
            inner, outer = (*fitting, orders[0])[0]
            return [(True, inner), (False, outer)]
        ((nested, pair),) = pairs.items() if pairs else ((False, {}),)
        if not pair:
            return []
        saved = unnested(pair["A"].place.saved)
        config = self.findings.config
        targeted = [w for w in experts.weights if config.targets_parameter(w.path(saved))]
        if len(targeted) == 1:
            return [(nested, targeted[0])]
        fitting_weights = [w for w in experts.weights if self._fits(experts, w, pair)]
        if len(fitting_weights) == 1:
            return [(nested, fitting_weights[0])]
        for weight in experts.weights:
            module.touch(weight)
        names = " and ".join(weight.name for weight in experts.weights)
        shapes = ", ".join(
            f"{found.key.key} {tuple(self._tensor(found).shape)}" for found in pair.values()
        )
        if fitting_weights:
            self._problem(
                f"{shapes}: these fit {names} equally, and adapter_config.json does not say "
                "which of them was trained; add target_parameters there"
            )
        else:
            sizes = "; ".join(
                f"{w.name} needs A (r·{w.experts}, {w.in_features}), B ({w.out_features}, "
                f"r·{w.experts})"
                for w in experts.weights
            )
            self._problem(f"{shapes}: these fit neither {names} of {experts.path}: {sizes}")
        return []

    def _fits(self, experts: Experts, weight: ExpertWeight, pair: _Pair) -> bool:
        return not isinstance(self._stacked(experts, weight, pair["A"], pair["B"]), str)

    def _stacked(
        self, experts: Experts, weight: ExpertWeight, a: _Found, b: _Found
    ) -> Stacked | str:
        swapped = exchanged(experts.module, weight, self.findings.config.peft_version)
        return wrapped(self._tensor(a), self._tensor(b), _sizes(weight, "all"), swapped)

    def _term_of_all(self, weight: ExpertWeight, half: Half, pair: _Pair) -> ExpertTerm | None:
        if not self._complete(pair):
            return None
        a, b = pair["A"], pair["B"]
        config, saved = self.findings.config, a.place.saved
        name = config.name_of(saved)
        found = named(self._tensor(a), self._tensor(b), _sizes(weight, half), config.rank(name))
        if isinstance(found, str):
            self._problem(f"{a.key.key}, {b.key.key}: {found}")
            return None
        return self._term(half, range(weight.experts), found, name, saved)

    def _term_of_one(
        self, weight: ExpertWeight, half: Half, expert: int, pair: _Pair
    ) -> ExpertTerm | None:
        """The term of one expert; a factor for all experts may serve it."""
        if not self._complete(pair):
            return None
        own = next(found for found in pair.values() if found.place.expert is not None)
        a, b = (self._of_expert(pair[letter], expert) for letter in "AB")
        rank = a.shape[0] if a.dim() == 2 else 0
        n, k = columns_of(weight, half), weight.in_features
        saved = own.place.saved
        fits = [
            self.findings.shaped(pair["A"].key.key, a, (rank, k), f"{saved} needs (r, {k})"),
            self.findings.shaped(
                pair["B"].key.key, b, (n, rank), f"{saved} needs ({n}, r = {rank})"
            ),
        ]
        if not all(fits):
            return None
        return self._term(half, range(expert, expert + 1), Stacked(a[None], b[None]), saved, saved)

    def _term(
        self, half: Half, experts: range, found: Stacked, name: str, saved: str
    ) -> ExpertTerm | None:
        if not self.findings.rank_fits(name, name, saved, found.rank):
            return None
        scale = self.findings.scale(name, saved, found.rank)
        return ExpertTerm(half, experts, found.A, found.B, scale, name)

    def _complete(self, pair: _Pair) -> bool:
        """Whether both factors are there and sound; a problem is noted where they are not."""
        if len(pair) == 1:
            (have,) = pair.values()
            lacks = "B" if have.key.letter == "A" else "A"
            self._problem(f"{have.key.key}: {have.place.saved} has no factor {lacks}")
            return False
        sound = [self.findings.sound(f.key.key, self._tensor(f)) for f in pair.values()]
        return bool(sound) and all(sound)

    def _of_expert(self, found: _Found, expert: int) -> Tensor:
        tensor = self._tensor(found)
        shared = found.place.expert is None and tensor.dim() == 3
        return tensor[expert] if shared and expert < tensor.shape[0] else tensor

    def _tensor(self, found: _Found) -> Tensor:
        return self.findings.state.tensors[found.key.key]

    def _problem(self, text: str) -> None:
        self.findings.problems.append(text)


def _sizes(weight: ExpertWeight, half: Half) -> ExpertSizes:
    return ExpertSizes(weight.experts, weight.in_features, columns_of(weight, half))


def _numbers(indices: set[int]) -> str:
    listed = sorted(indices)
    return ", ".join(map(str, listed[:8])) + (" …" if len(listed) > 8 else "")

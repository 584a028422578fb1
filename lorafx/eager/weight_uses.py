"""Uses of sites' weights in Python, past the module's call, where nothing would add the delta.

A touched site's weight is known by its memory, and copies of it by their values, as in graphs
(`lorafx.program.derived`). What is made of it alone, by a parametrisation, a hook or a cast, is the
weight again. A use is served where the site's module is being called and its mark follows; a call
of a module has one product. All else is refused, wherever the code that uses the weight comes from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorafx.errors import MatchError
from lorafx.model.marks import SiteMark
from lorafx.model.module_graph import ByStorage, storage_key
from lorafx.model.sites import Site
from lorafx.model.weight_formats import plain_tensors
from lorafx.ownership.memory import storage_of
from lorafx.ownership.model_memory import in_containers
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.program.derived import DISTINCT, named_tensors, replaces
from lorafx.program.inputs import Holder
from lorafx.program.program import Program
from lorafx.program.stack import python_line, running_modules
from lorafx.program.weight_uses import SAME_VALUE
from lorafx.registry import lookup
from lorafx.torch_internals.transforms import in_backward


class WeightProduct(NamedTuple):
    """What an operator computed of a weight: its operands, and its result, if it is one tensor,
    with the version that it had then; and whether the weight had other values than its own."""

    operands: Sequence[Tensor] = ()
    result: Tensor | None = None
    version: int = 0
    changed: bool = False

    @classmethod
    def of(
        cls, operands: Sequence[Tensor], results: Sequence[Tensor], *, changed: bool
    ) -> WeightProduct:
        if len(results) != 1:
            return cls(changed=changed)
        return cls(operands, results[0], results[0]._version, changed)

    def is_of(self, x: Tensor, y: Tensor) -> bool:
        """Whether y is, and still holds, the product with x."""
        if self.result is None or self.result._version != self.version:
            return False
        return _is_all_of(y, self.result) and any(_is_all_of(x, item) for item in self.operands)


_UNSEEN = WeightProduct()


def _is_all_of(used: Tensor, whole: Tensor) -> bool:
    """Whether `used` is this tensor, or a view of all of it; a composite one is taken to be."""
    if storage_of(used) is None:
        return True
    return used.numel() == whole.numel() and used.data_ptr() == whole.data_ptr()


def _tensors_near(near: str, parent: nn.Module) -> Iterator[tuple[Tensor, Holder | None]]:
    """Tensors that the module at `near` or a child holds, and where, if not in a container."""
    for name, module in (("", parent), *parent.named_children()):
        for attribute, value in named_tensors(module):
            yield value, Holder(f"{near}.{name}".strip("."), module, attribute)
    yield from ((value, None) for value in in_containers(parent))


class WeightUses:
    """The uses of touched sites' weights by the operators that a call runs in Python."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._error: MatchError | None = None
        #: What was made of weights in this call: the storage, their sites, and whether it has
        #: other values, by its id.
        self._made: dict[int, tuple[StorageWeakRef, list[Site], bool]] = {}
        #: Products with a site's weight in its module's call since its last mark, by path.
        self._products: dict[str, list[WeightProduct]] = {}
        #: The paths of sites whose marks have added deltas.
        self._marked: set[str] = set()

    @cached_property
    def _sites(self) -> ByStorage[Site]:
        """The sites by the plain tensors that hold their weights, and the biases that adapters
        change."""
        sites: list[tuple[Site, Tensor]] = []
        extras = self._program.batch.extras
        changed = {*extras.get("own", ()), *extras.get("bias", ())}
        for site in self._program.sites:
            bias = getattr(site.module, "bias", None) if site.path in changed else None
            biases = [bias] if isinstance(bias, Tensor) else []
            for weight in (*self._program.weights_of(site), *biases):
                sites += ((site, part) for part in plain_tensors(weight))
        return ByStorage(sites)

    @property
    def makes_weights(self) -> bool:
        """Whether the call has made something of weights alone."""
        return bool(self._made)

    def near(self, tensor: Tensor) -> list[Site] | None:
        """The touched sites with weights in the tensor's memory; None if no site's is there."""
        if storage_of(tensor) is not None:
            return self._stored(tensor)
        known = [sites for sites in map(self._stored, plain_tensors(tensor)) if sites is not None]
        return [site for sites in known for site in sites] if known else None

    def _stored(self, tensor: Tensor) -> list[Site] | None:
        made = self._made.get(storage_key(tensor)) if self._made else None
        if made is not None and not made[0].expired():
            return made[1]
        if not self._sites.beside(tensor):
            return None
        sites = (site for site, _ in self._sites.overlapping(tensor))
        return list(filter(self._program.is_touched, sites))

    def copied(self, tensor: Tensor) -> list[Site] | None:
        """The touched sites of whose weights the tensor has copies; None if it is no copy."""
        if tensor.layout is not torch.strided:  # by its sizes: its numbers are not compared
            touched = filter(self._program.is_touched, self._program.sites)
            sizes = sorted(tensor.shape)
            alike = (s for s in touched if sorted((s.out_features, s.in_features)) == sizes)
            return list(alike) or None
        derived = self._program.derived.look(tensor) if tensor.numel() >= DISTINCT else None
        return None if derived is None else list(filter(self._program.is_touched, derived.sites))

    def look(
        self,
        func: Any,
        used: Mapping[Tensor, list[Site]],
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
        *,
        owned: bool,
    ) -> None:
        """Note that an operator reads touched sites' weights, in those of its operands that are
        `used`. `owned`: its results may depend on requests, too; else they are the weights again.

        Raises:
            MatchError: outside of the calls of the sites' modules.
        """
        if func.namespace == "lorafx" or func.overloadpacket in READS_NO_VALUES:
            return
        if in_backward():  # of a product that was checked, and of the delta of its mark
            return
        memory = set(map(storage_of, used))
        if results and all(storage_of(item) in memory for item in results):
            return  # the results are views
        sites = list(dict.fromkeys(site for each in used.values() for site in each))
        changed = any(made[2] for storage, made in self._made.items() if storage in memory)
        product = WeightProduct.of(operands, results, changed=changed) if owned else None
        self.read(func.overloadpacket, sites, product)
        if owned:
            return
        changed = changed or func not in SAME_VALUE
        for result in results:
            if (storage := storage_of(result)) is not None:
                self._made[storage] = StorageWeakRef(result.untyped_storage()), sites, changed

    def read(
        self, reader: object, sites: Sequence[Site], product: WeightProduct | None = _UNSEEN
    ) -> None:
        """As `look`, for what is named `reader`; `product` is what it computes of the weights."""
        bypassed = []
        for site in sites:
            own = self._called(site)
            if own is None:
                bypassed.append(site.path or "the model")
            elif own and product is not None:
                self._products.setdefault(site.path, []).append(product)
        if bypassed:
            self._error = MatchError(
                f"LoRA cannot be applied at {', '.join(bypassed)}: {reader} at {python_line()} "
                "uses the weight without calling its module, in a function that "
                "Dynamo does not trace, so the delta would be lost. Call the module there, "
                "let Dynamo trace the function, or leave the module out by exclude_modules"
            )
            raise self._error

    def marked(self, mark: SiteMark) -> list[WeightProduct]:
        """The mark adds its delta. Returns the products that it follows."""
        self._marked.add(mark.path)
        return self._products.pop(mark.path, [])

    @property
    def unmarked(self) -> Collection[str]:
        """The paths of sites with products that no mark has followed."""
        return self._products.keys()

    @property
    def replaced_between_graphs(self) -> str | None:
        """As `replaced`, of sites that no graph has reached, where Python runs parts of calls."""
        program = self._program
        why = self.replaced(program.reached) if program.in_pieces or not program.reached else None
        return why and f"LoRA cannot be applied at {why}. Leave the module out by exclude_modules"

    def replaced(self, reached: Set[str] = frozenset()) -> str | None:
        """Why a touched linear that nothing has used may have been computed without its weight, as
        `match` finds it in graphs. `reached`: paths of sites that `match` has looked at."""
        unused: dict[str, list[Site]] = {}
        paths = self._program.batch.touched - self._marked - reached
        for site in self._program.sites if paths else ():  # each call comes here
            if site.path in paths:
                unused.setdefault(site.path.rpartition(".")[0], []).append(site)
        for near, sites in unused.items():
            for value, holder in _tensors_near(near, self._program.graph.at(near)):
                for site in sites:
                    if replaces(site, near, value, value, holder):
                        return f"{site.path}: nothing uses its weight, {holder or near} may hold it"
        return None

    def of_unknown_origin(self, tensor: Tensor) -> str:
        """Why a call with adapters does not use this tensor."""
        return (
            f"LoRA cannot be applied in this call: torch did not see on its thread what made the "
            f"tensor {tuple(tensor.shape)} that {python_line()} uses or the model returns. Another "
            "thread, numpy, a list of numbers or an extension may have used weights there without "
            "their deltas"
        )

    @property
    def refusal(self) -> str | None:
        """What `read` has raised, which the model's code, or TorchScript, may have caught."""
        return None if self._error is None else str(self._error)

    def refuse(self) -> None:
        """Raise the error of `read` again."""
        if self._error is not None:
            raise self._error

    def _called(self, site: Site) -> bool | None:
        """Whether the site's module is being called, whose mark adds the delta (True), or another
        one that has the weight as its own (False); None if neither is."""
        weights: list[int] = []
        for module in running_modules():
            if module is site.module or module is site.marked:
                return True
            weights = weights or list(map(id, self._program.weights_of(site)))
            held = module._parameters.values()
            known = lookup(module) is not None and self._program.graph.has(module)
            if known and any(id(item) in weights for item in held):
                return False
        return None

"""Uses of sites' weights in Python, past the module's call, where nothing would add the delta.

A touched site's weight is known by its memory, and copies of it by their values, as in graphs
(`lorafx.program.derived`). What is made of it alone, by a parametrisation, a hook or a cast, is the
weight again. A use is served where the site's module is being called and its mark follows; a call
of a module has one product. All else is refused, wherever the code that uses the weight comes from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cached_property
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lorafx.eager.linear_calls import LinearCall
from lorafx.errors import LorafxError
from lorafx.model.marks import MARKS, SiteMark
from lorafx.model.module_graph import ByStorage, Holder, storage_key
from lorafx.model.sites import Site
from lorafx.model.weight_formats import plain_tensors
from lorafx.ownership.effects import graph_of_call, tensors_in
from lorafx.ownership.memory import Geometry, geometry_of, storage_of
from lorafx.ownership.model_memory import in_containers
from lorafx.ownership.pointwise import READS_NO_VALUES
from lorafx.program.derived import DISTINCT, HeldTensor, named_tensors, replacement
from lorafx.program.frame import fake_value
from lorafx.program.program import Program
from lorafx.program.refusals import LastingRefusal
from lorafx.program.stack import python_line, running_modules
from lorafx.program.weight_forms import WeightForm, strided_form
from lorafx.program.weight_uses import SAME_VALUE, uses_of
from lorafx.registry import lookup
from lorafx.torch_internals.dynamo import any_global_hook
from lorafx.torch_internals.transforms import in_backward


class WeightProduct(NamedTuple):
    """An operator's call that has computed something of a weight, and the version that its result
    had then, if there is one; and whether the weight had other values than its own."""

    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    result: Any = None
    version: int | None = None
    changed: bool = False


class MadeWeight(NamedTuple):
    """What the call has made of weights of `sites`, in a storage of its own. `transposed`: whether
    it is all of W, as (out, in) or as (in, out), by its geometry; None if it may be anything."""

    storage: StorageWeakRef
    sites: list[Site]
    changed: bool
    geometry: Geometry
    transposed: bool | None


_UNSEEN = WeightProduct()
_BYPASSED = (
    "{} at {} uses its weight without calling its module, in a function that Dynamo does not trace,"
    " so the delta would be lost; call the module there, or let Dynamo trace the function"
)


def _is_all_of(used: Tensor, whole: Tensor) -> bool:
    """Whether `used` is this tensor, or a view of all of it; a composite one is taken to be."""
    if storage_of(used) is None:
        return True
    return used.numel() == whole.numel() and used.data_ptr() == whole.data_ptr()


def _is_plain(site: Site, mark: SiteMark) -> bool:
    """Whether the mark gets what the forward of the registered class has returned."""
    own = site.has_own_forward and not isinstance(vars(site.module).get("forward"), LinearCall)
    before = takewhile(lambda hook: hook is not mark, site.marked._forward_hooks.values())
    return not own and not any_global_hook() and all(isinstance(hook, MARKS) for hook in before)


def _tensors_near(near: str, parent: nn.Module) -> Iterator[HeldTensor]:
    """The tensors that the module at `near` or a child holds."""
    for name, module in (("", parent), *parent.named_children()):
        for attribute, value in named_tensors(module):
            holder = Holder(f"{near}.{name}".strip("."), module, attribute)
            yield HeldTensor(value, value, holder, str(holder))
    for value in in_containers(parent):
        yield HeldTensor(value, value, None, "a tensor in a container that it holds")


class WeightUses:
    """The uses of touched sites' weights by the operators that a call runs in Python."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._error: LorafxError | None = None
        #: What was made of weights in this call, by the id of its storage.
        self._made: dict[int, MadeWeight] = {}
        #: The ids of the storages of weights that the call has written.
        self._written: set[int | None] = set()
        #: Products with a site's weight in its module's call since its last mark, by path.
        self._products: dict[str, list[WeightProduct]] = {}
        #: The ids of the storages of weights that parametrisations have computed.
        self._computed: set[int] = set()
        #: The paths of sites of whose weights Python has read numbers.
        self.numbers: set[str] = set()
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

    @cached_property
    def _by_path(self) -> dict[str, Site]:
        return {site.path: site for site in self._program.sites}

    @property
    def makes_weights(self) -> bool:
        """Whether the call has made something of weights alone."""
        return bool(self._made)

    def note_made(self, tensor: Tensor, path: str) -> None:
        """The tensor is what the module at `path` computes as its weight."""
        if (key := storage_of(tensor)) is not None and path in self._program.batch.touched:
            storage, sites = StorageWeakRef(tensor.untyped_storage()), [self._by_path[path]]
            self._made[key] = MadeWeight(storage, sites, True, geometry_of(tensor), None)
            self._computed.add(key)

    def is_own(self, tensor: Tensor, path: str) -> bool:
        """Whether the tensor lies in the weight of the site at `path`, which this call has neither
        replaced nor written."""
        parts = [*plain_tensors(tensor)]
        keys = set(map(storage_of, parts))
        own = keys <= self._computed or not any(map(self._made_in, parts))
        return (
            own
            and keys.isdisjoint(self._written)
            and self._by_path[path] in (self.near(tensor) or ())
        )

    def near(self, tensor: Tensor) -> list[Site] | None:
        """The touched sites with weights in the tensor's memory; None if no site's is there."""
        if storage_of(tensor) is not None:
            return self._stored(tensor)
        known = [sites for sites in map(self._stored, plain_tensors(tensor)) if sites is not None]
        return [site for sites in known for site in sites] if known else None

    def _stored(self, tensor: Tensor) -> list[Site] | None:
        if (made := self._made_in(tensor)) is not None:
            return made.sites
        if not self._sites.beside(tensor):
            return None
        sites = (site for site, _ in self._sites.overlapping(tensor))
        return list(filter(self._program.is_touched, sites))

    def _made_in(self, tensor: Tensor) -> MadeWeight | None:
        """What the call has made of weights in the tensor's memory."""
        made = self._made.get(storage_key(tensor)) if self._made else None
        return None if made is None or made.storage.expired() else made

    def copied(self, tensor: Tensor) -> list[Site] | None:
        """The touched sites of whose weights the tensor has copies; None if it is no copy."""
        if tensor.layout is not torch.strided:  # by its sizes: its numbers are not compared
            touched = filter(self._program.is_touched, self._program.sites)
            sizes = sorted(tensor.shape)
            alike = (s for s in touched if sorted((s.out_features, s.in_features)) == sizes)
            return list(alike) or None
        derived = self._program.derived.look(tensor) if tensor.numel() >= DISTINCT else None
        if derived is None or not derived.copied:  # the call has put it in the place of a weight
            return None
        return list(filter(self._program.is_touched, derived.sites))

    def look(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        used: Mapping[Tensor, list[Site]],
        results: Any,
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
        memory, outputs = set(map(storage_of, used)) - {None}, list(tensors_in(results))
        if outputs and all(storage_of(item) in memory for item in outputs):  # views, or weights
            self._written.update(memory if func._schema.is_mutable else ())
            return
        made = (made for key, made in self._made.items() if key in memory)
        changed = not memory.isdisjoint(self._written) or any(item.changed for item in made)
        sites = list(dict.fromkeys(site for each in used.values() for site in each))
        product = None
        if owned:
            counts = isinstance(results, Tensor) and not results.is_inference()
            version = results._version if counts else None
            product = WeightProduct(func, args, kwargs, results, version, changed)
        self.read(func.overloadpacket, sites, product)
        if not outputs:
            self.numbers.update(site.path for site in sites)
        if not owned:
            changed, first = changed or func not in SAME_VALUE, next(iter(used))
            transposed = None if changed else self._orientation(first, sites[0])
            for result in outputs:
                if (key := storage_of(result)) is not None:
                    storage, place = StorageWeakRef(result.untyped_storage()), geometry_of(result)
                    self._made[key] = MadeWeight(storage, sites, changed, place, transposed)

    def read(
        self, reader: object, sites: Sequence[Site], product: WeightProduct | None = _UNSEEN
    ) -> None:
        """As `look`, for what is named `reader`; `product` is what it computes of the weights."""
        bypassed = []
        for site in sites:
            own = self._called(site)
            if own is None:
                bypassed.append(site.path)
            elif own and product is not None:
                self._products.setdefault(site.path, []).append(product)
        if bypassed:
            refused = LastingRefusal(
                tuple(bypassed), "always", _BYPASSED.format(reader, python_line())
            )
            self._error = refused.error()
            raise self._error

    def marked_alone(self, mark: SiteMark) -> list[WeightProduct]:
        """The mark adds its delta. Returns the products that it follows."""
        self._marked.add(mark.path)
        return self._products.pop(mark.path, [])

    def marked(self, mark: SiteMark, x: Tensor, y: Tensor) -> str | None:
        """The mark adds the delta of x to y. Returns why that would be another one than that of
        W + ΔW, or None."""
        products = self.marked_alone(mark)
        if mark.stored or mark.handler is not None or mark.path not in self._program.batch.touched:
            return None
        if not y.numel():
            return None  # an expert that no token chose: torch multiplies nothing
        if len(products) != 1:
            if not products:
                return "no product with its weight was seen in its module's call"
            return f"its module multiplies by the weight {len(products)} times"
        if products[0].changed and not mark.made:
            return "its module multiplies by what was made of its weight"
        site = self._by_path[mark.path]
        if mark.kind == "embedding" and mark.derived:
            return None  # the mark has compared y, which may be scaled, with its rows
        if _is_plain(site, mark) or self._is_product(products[0], mark, site, x, y):
            return None
        return "its forward does more than the product with its weight"

    def _is_product(
        self, product: WeightProduct, mark: SiteMark, site: Site, x: Tensor, y: Tensor
    ) -> bool:
        """Whether y is, and still holds, x Wᵀ or W[x], by the rules of graphs; with the module's
        own bias if adapters change that, or scale what it is added to."""
        func, args, kwargs, result, version, _ = product
        if version is None or result._version != version or not _is_all_of(y, result):
            return False
        with graph_of_call(func, args, kwargs, result) as (_, nodes):
            parts = ((nodes[id(t)], self._part(t, site)) for t in tensors_in((args, dict(kwargs))))
            uses = [u for n, part in parts if part for u in uses_of(n, transposed=False, part=part)]
            if len(uses) != 1 or uses[0].kind != mark.kind or uses[0].swapped:
                return False
            used, bias = (None if n is None else fake_value(n) for n in (uses[0].x, uses[0].bias))
        own = getattr(site.module, "bias", None)
        return used is not None and _is_all_of(x, used) and (mark.is_plain or bias is own)

    def _part(self, tensor: Tensor, site: Site) -> tuple[WeightForm, tuple[int, int]] | None:
        """Which entries of the site's weight a tensor holds, and their sizes (N, K); None if that
        is not known."""
        made, known = self._made_in(tensor), list[tuple[Geometry, bool | None]]()
        if made is not None:
            known = [(made.geometry, made.transposed)]
        elif storage_of(tensor) is not None:
            of_site = (whole for other, whole in self._sites.overlapping(tensor) if other is site)
            known = [(geometry_of(whole), site.eligible.transposed) for whole in of_site]
        for whole, transposed in known:
            if transposed is not None:
                form = strided_form(geometry_of(tensor), whole, transposed=transposed)
                if form is not None:
                    rows, columns = whole[0]
                    return form, (columns, rows) if transposed else (rows, columns)
        return None

    def _orientation(self, tensor: Tensor, site: Site) -> bool | None:
        """Whether a tensor is the site's weight as (in, out), or as (out, in); None if neither."""
        form, shape = self._part(tensor, site) or (None, ())
        for transposed in (False, True):
            sizes = shape[::-1] if transposed else shape
            if form == WeightForm.of_weight(transposed=transposed) and tensor.shape == sizes:
                return transposed
        return None

    @property
    def unmarked(self) -> Collection[str]:
        """The paths of sites with products that no mark has followed."""
        return self._products.keys()

    @property
    def replaced_between_graphs(self) -> str | None:
        """As `replaced`, of sites that no graph has reached, where Python runs parts of calls."""
        program = self._program
        return self.replaced(program.reached) if program.in_pieces or not program.reached else None

    def replaced(self, reached: Set[str] = frozenset()) -> str | None:
        """Why a touched linear that nothing has used may have been computed without its weight, as
        `match` finds it in graphs. `reached`: paths of sites that `match` has looked at."""
        paths = self._program.batch.touched - self._marked - reached
        for site in self._program.sites if paths else ():  # each call comes here
            if site.path not in paths:
                continue
            near = site.path.rpartition(".")[0]
            held = _tensors_near(near, self._program.graph.at(near))
            if (reason := replacement(site, near, held)) is not None:
                return str(LastingRefusal((site.path,), "always", reason).error())
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

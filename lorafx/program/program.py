"""A program: a marked model with everything that is needed to compile its frames; and the results
of the passes that prepare it.

One file: what passes ask about the model is answered from its sites, groups and watches together.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from lorafx.adapter_store.saved import AdapterState, Origin
from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter
from lorafx.config import LoraConfig, Options
from lorafx.errors import LorafxWarning
from lorafx.interrupts import Rollback
from lorafx.model.attachment import Attachment
from lorafx.model.bank import Bank
from lorafx.model.changes_watch import HookWatch, SiteWatch, SwitchWatch, method_watch, weight_watch
from lorafx.model.extras import When
from lorafx.model.module_graph import Holder, ModuleGraph
from lorafx.model.packing import PackedGroup, PackWatch
from lorafx.model.quantized import QuantisedModules
from lorafx.model.runtime import Runtime
from lorafx.model.sites import Group, Site
from lorafx.model.stored_experts import StoredExperts, held_parts
from lorafx.ownership.labels import One
from lorafx.ownership.memory import Memory
from lorafx.ownership.model_memory import (
    ModelMemory,
    Remembered,
    TensorVersions,
    in_code,
    in_containers,
)
from lorafx.ownership.real_labels import SHARED, Listed, repeated_owners, settled
from lorafx.placements import is_placed, local
from lorafx.program.argument_roles import Role, RoleTable, choices, new_tokens, tensor_leaves
from lorafx.program.derived import DerivedTensors
from lorafx.program.frame import Frame
from lorafx.program.inputs import MADE, FrameInput, InputKind
from lorafx.program.row_handoff import role_of
from lorafx.torch_internals.frames import size_source, source_name
from lorafx.torch_internals.graph_parts import unset_fake_temporarily


@dataclass(eq=False)
class Preparation:
    """The results of the passes so far: `graph` (alias), `sites` (select), `adapters` (read, from
    `saved`), `attachment` (attach), `store` (load) and `packed` siblings (pack_weights). The model
    is unchanged until `attachment`; `rollback` undoes all changes."""

    model: nn.Module
    config: LoraConfig
    options: Options = field(default_factory=Options)
    saved: dict[str, AdapterState] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    graph: ModuleGraph = field(init=False)
    sites: tuple[Site, ...] = ()
    adapters: list[Adapter] = field(default_factory=list)
    attachment: Attachment | None = None
    store: AdapterStore | None = None
    packed: tuple[PackedGroup, ...] = ()
    notes: list[str] = field(default_factory=list)
    rollback: Rollback = field(default_factory=Rollback)


@dataclass(frozen=True)
class PassReport:
    """The result of a pass: its `edits` of a graph, or items of a model, and the `nodes` after it,
    0 for a model. Passes over the model leave `notes`."""

    name: str
    edits: int
    seconds: float
    nodes: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        heading = f"{self.name}: {self.edits}, {self.seconds * 1e3:.1f} ms"
        return "\n  ".join([heading, *self.notes])


#: Bank fields of every site op, and additional fields of ops that rescale.
BANK_FIELDS = ("A", "B", "ranks", "scales")
GAINS, SHIFTS = "gains", "shifts"


@dataclass(eq=False)
class Call:
    """The running call: roles and arguments by name, and labels of its memory. `tracked`: tensors
    are followed through Python between graphs, as in calls that mix adapters."""

    roles: RoleTable | None
    named: Mapping[str, Any]
    memory: Memory
    tracked: bool = False


class Batch(NamedTuple):
    """The running call, if any; the canonical paths of the sites that its adapters touch; and, by
    name, of those where they have `EXTRAS`. It is replaced as a whole."""

    call: Call | None = None
    touched: frozenset[str] = frozenset()
    extras: Mapping[When, frozenset[str]] = MappingProxyType({})


#: The batch between calls.
AT_REST = Batch()


@dataclass(eq=False)
class Program:
    """A marked model, as passes see it. It lives as long as the CompiledModel."""

    model: nn.Module
    graph: ModuleGraph
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    packed: tuple[PackedGroup, ...]
    runtime: Runtime
    config: LoraConfig
    options: Options
    prepared: tuple[PassReport, ...] = ()
    #: Assigned by sessions only.
    batch: Batch = AT_REST
    #: Tensor attributes of modules from before the first call are constants; later ones may hold
    #: data of an earlier call. By identity, with weak references, since ids are reused.
    constants: Mapping[int, weakref.ref[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.remembered = Remembered()
        self.note_constants()
        #: Whether some graph takes results of another, so that results get labels.
        self.in_pieces = False
        #: Canonical paths of the sites that some graph serves or refuses.
        self.reached: set[str] = set()
        #: Canonical paths of sites that a graph seems to compute without their weight.
        self.replaced: set[str] = set()
        #: Canonical paths of sites whose own forward changes its input before the product.
        self.changed_inputs: set[str] = set()
        self.derived = DerivedTensors(self)
        self.site_watch = SiteWatch(self.graph, self.sites)
        self.hook_watch = HookWatch(self.model, self.sites)
        self.method_watch = method_watch(module for _, module in self.graph.modules())
        self.switch_watch = SwitchWatch(module for _, module in self.graph.modules())
        self.pack_watch = PackWatch(self.packed)
        #: What guards of graphs look at, which have no strong reference to it.
        self.watched_places: list[Any] = []
        self.model_memory = ModelMemory(lambda: map(local, self._model_tensors()))
        self.quantised = QuantisedModules.of(module for _, module in self.graph.modules())
        self.weight_watch = weight_watch(self.quantised.wrapped)
        self.stored_experts = StoredExperts(self.graph.modules())
        self._by_weight: dict[int, list[Site]] = {}
        #: Tensors that are known to be no site's weight.
        self._no_sites: dict[int, weakref.ref[Tensor]] = {}
        self._site_banks: dict[int, Bank] = {}
        self._home = {
            id(site): (group, index)
            for group in self.groups
            for index, site in enumerate(group.sites)
        }
        self._by_bank = {id(group.bank.A): group for group in self.groups}
        #: Whether ranks share some weight as a DTensor.
        self.is_placed = any(map(is_placed, self.model.parameters()))

    @property
    def call(self) -> Call | None:
        return self.batch.call

    def note_constants(self) -> None:
        """Record the modules' tensor attributes as constants, before the first call."""
        self.remembered.keep(in_containers(self.model))
        plain = [tensor for _, tensor in _plain_attributes(self.model)]
        self.constants = {id(tensor): weakref.ref(tensor) for tensor in plain}
        self.versions = TensorVersions([*self.model.buffers(), *plain])

    def unguarded_state(self) -> tuple[int, ...]:
        """The states of sites, hooks, methods, weights and experts' implementations, which no guard
        of a graph compares; 0 for those that are as they were when the model was marked."""
        watches = (self.hook_watch, self.method_watch, self.weight_watch, self.switch_watch)
        return self.site_watch.state, *(watch.look() for watch in watches)

    def look_at_modules(self) -> None:
        """Compare the sites' modules, and renew `graph` if the model has changed."""
        self._look_at_sites()
        if not self.site_watch.missing and not self.graph.is_current:
            self.graph = ModuleGraph(self.model)

    def _look_at_sites(self) -> None:
        if self.site_watch.look():
            self._no_sites.clear()  # so that they are compared again

    def refuse_missing(self, paths: Collection[str] | None = None) -> None:
        """Raise ReplacedModuleError if sites at these paths (None: any) have been replaced."""
        if self.site_watch.needs_look:
            self.look_at_modules()
            self.site_watch.refuse(paths)

    def note_changed_input(self, site: Site) -> None:
        """Record a site whose own forward changes its input, with a warning if it is a new one."""
        if site.path in self.changed_inputs:
            return
        self.changed_inputs.add(site.path)
        if self.options.delta_of == "argument":
            name = f"{site.path or 'the model'} ({type(site.module).__qualname__})"
            warnings.warn(
                f"{name} changes its input before it multiplies it by its weight. Its adapters "
                "add the delta of the module's argument, as PEFT trains them, which is not W + ΔW; "
                'Options(delta_of="weight") serves W + ΔW',
                LorafxWarning,
                stacklevel=2,
            )

    def home(self, site: Site) -> tuple[Group, int]:
        return self._home[id(site)]

    def weight_of(self, site: Site) -> Tensor | None:
        """The tensor that is the site's weight; None if there is none, or it is made anew whenever
        it is read (`weights_of`)."""
        if is_parametrized(site.module, site.eligible.weight):
            return None
        value = getattr(site.module, site.eligible.weight, None)
        return value if isinstance(value, Tensor) else None

    def weights_of(self, site: Site) -> list[Tensor]:
        """The tensors of the site's module that hold its weight, or that its weight is made of in
        each call, by a parametrisation or a hook."""
        module, name = site.module, site.eligible.weight
        held = (module._parameters.get(name), module._buffers.get(name), vars(module).get(name))
        tensors = [item for item in held if isinstance(item, Tensor)]
        if held[0] is None and held[1] is None:
            bias, maker = module._parameters.get("bias"), module
            if is_parametrized(module, name):
                maker = module.get_submodule(f"parametrizations.{name}")
            tensors += (item for item in maker.parameters() if item is not bias)
        if site.expert_weight is not None:
            tensors += (part for _, part in held_parts(module, name))
        return tensors

    def _expert_parts(self) -> Iterator[tuple[str, Tensor]]:
        """The parts of quantised experts, with their paths, of modules without sites, too."""
        for path, module, name in self.stored_experts:
            for part, tensor in held_parts(module, name):
                yield f"{path}.{part}", tensor

    def is_touched(self, site: Site) -> bool:
        return site.path in self.batch.touched

    def _sites_by_weight(self) -> dict[int, list[Site]]:
        sites: dict[int, list[Site]] = {}
        for site in self.sites:
            weights = self.weights_of(site)
            for tensor in {*map(id, weights), *map(id, map(local, weights))}:
                sites.setdefault(tensor, []).append(site)
        return sites

    def _is_weight_of(self, site: Site, tensor: Tensor) -> bool:
        """Whether a tensor is the site's weight, or this rank's part of it."""
        return any(weight is tensor or local(weight) is tensor for weight in self.weights_of(site))

    def site_of_weight(self, weight: Tensor, index: int = 0) -> Site | None:
        """The site with this base weight or derived tensor; among tied sites, that at `index`."""
        if not self._knows(weight):
            self._look_at_sites()
            self._by_weight = self._sites_by_weight()
            self._no_sites[id(weight)] = weakref.ref(weight)
        tied = self._by_weight.get(id(weight), [])
        if not tied:
            derived = self.derived.of(weight)
            return derived.sites[index] if derived and index < len(derived.sites) else None
        if index >= len(tied) or not self._is_weight_of(tied[index], weight):
            return None
        return tied[index]

    def site_of_part(self, tensor: Tensor, index: int = 0) -> Site | None:
        """As `site_of_weight`, but a tensor of a module is first compared with the weights."""
        site = self.site_of_weight(tensor, index)
        if site is not None:
            return site
        derived = self.derived.of_attribute(tensor)
        return derived.sites[index] if derived and index < len(derived.sites) else None

    def _knows(self, weight: Tensor) -> bool:
        if tied := self._by_weight.get(id(weight)):
            return self._is_weight_of(tied[0], weight)
        reference = self._no_sites.get(id(weight))
        return reference is not None and reference() is weight

    def bank_of_weight(self, weight: Tensor, index: int = 0) -> Bank | None:
        site = self.site_of_weight(weight, index)
        if site is None:
            return None
        if id(site) not in self._site_banks:
            self._site_banks[id(site)] = self.site_bank(site)
        return self._site_banks[id(site)]

    def site_bank(self, site: Site) -> Bank:
        """The site's columns of its group's bank, as views."""
        group, index = self.home(site)
        bank, offset = group.bank, group.offsets[index]
        first, siblings = group.firsts[index], bank.ranks.shape[1]
        last = first + len(site.parts)
        inputs = slice(None)
        if site.eligible.kind in ("linear", "conv"):
            features = bank.A.shape[2] // siblings
            inputs = slice(first * features, last * features)
        with unset_fake_temporarily():  # passes run while AOTAutograd's fake mode is on
            return Bank(
                A=bank.A[..., inputs],
                B=bank.B[:, :, offset : offset + site.out_features],
                ranks=bank.ranks[:, first:last],
                scales=bank.scales[:, first:last],
                alike=bank.alike,  # experts' banks have one site
                gains=_columns(bank.gains, offset, site),
                shifts=_columns(bank.shifts, offset, site),
                **bank.own_rows._asdict(),  # groups with such rows have one site
            )

    def group_of_bank(self, A: Tensor) -> Group | None:
        group = self._by_bank.get(id(A))
        return group if group is not None and group.bank.A is A else None

    def known_tensors(self) -> dict[int, FrameInput]:
        """The meanings of all tensors without data of requests, by identity."""
        known: dict[int, FrameInput] = {}
        for path, module in self._modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    holder = Holder(path, module, name)
                    known.setdefault(id(tensor), FrameInput("state", str(holder), holder=holder))
        for holder, tensor in _plain_attributes(self.model):
            constant = self.constants.get(id(tensor))
            if constant is not None and constant() is tensor:
                known.setdefault(id(tensor), FrameInput("state", str(holder), holder=holder))
        parts = {id(tensor): path for path, tensor in self._expert_parts()}
        known |= {key: FrameInput("state", path) for key, path in parts.items()}
        for key, sites in self._sites_by_weight().items():
            label, of_experts = sites[0].path, sites[0].expert_weight is not None
            label += "" if of_experts else f".{sites[0].eligible.weight}"
            weight = self.weight_of(sites[0])
            whole = weight is not None and key in (id(weight), id(local(weight)))
            made = "" if whole else parts.get(key, MADE)
            placed = is_placed(weight)
            known[key] = FrameInput("weight", label, sites=tuple(sites), part=made, placed=placed)
        for group in self.groups:
            for name, tensor in group.bank.tensors.items():
                known[id(tensor)] = FrameInput("bank", name, group=group)
        for packed in self.packed:
            for name in ("weight", "bias"):
                tensor = getattr(packed, name)
                if tensor is not None:
                    known[id(tensor)] = FrameInput("packed", name, group=packed.group)
        known[id(self.runtime.slots)] = FrameInput("slots", "slots")
        return known

    def _modules(self) -> Iterable[tuple[str, nn.Module]]:
        yield from self.graph.modules()
        if self.site_watch.missing:
            yield from self.model.named_modules()

    def buffers(self) -> Iterator[Tensor]:
        return (tensor for tensor in self._model_tensors() if not isinstance(tensor, nn.Parameter))

    def _model_tensors(self) -> Iterator[Tensor]:
        for _, module in self.graph.modules():
            yield from (t for t in module._parameters.values() if t is not None)
            yield from (t for t in module._buffers.values() if t is not None)
        yield from (tensor for _, tensor in self._expert_parts())
        for reference in self.constants.values():
            if (constant := reference()) is not None:
                yield constant

    def new_call(self, roles: RoleTable | None, named: Mapping[str, Any]) -> Call:
        """A call with an empty memory."""
        memory = Memory(self.shared_in_one_call(), lambda: not self.runtime.uniform)
        return Call(roles, named, memory)

    def keep_constants(self, memory: Memory) -> None:
        """Remember the tensors that the model keeps, and an eager call computed of nothing but its
        own tensors and sizes."""
        if memory.made_of_nothing():
            plain = (tensor for _, tensor in _plain_attributes(self.model))
            self.remembered.keep(
                tensor
                for tensor in (*in_containers(self.model), *plain)
                if memory.computed(tensor) and memory.look(tensor) is SHARED
            )

    def shared_in_one_call(self) -> Callable[[Tensor], bool]:
        """A predicate that is valid for one call: whether a tensor is the model's."""
        if hooks := self.hook_watch.new():
            self.remembered.keep(item for hook in hooks for item in in_code(hook, set()))
        in_model = self.model_memory.in_one_call()
        return lambda tensor: self.remembered.holds(tensor) or in_model(tensor)

    def _earlier_result(self, tensor: Tensor) -> Role | None:
        """The role, in a new graph, of a tensor that the running call has computed."""
        if self.call is None:
            return None
        role = role_of(self.call.memory.look(tensor))
        if role is None and not self.call.tracked:
            dims = (d for d, n in enumerate(tensor.shape) if n == len(self.runtime.rows) > 1)
            dim = next(dims, None)
            role = None if dim is None else Role("not tracked in this call", dim)
        return role

    def _holds_several(self, tensor: Tensor) -> bool:
        """Whether a result of the running call has equally many entries of each request, in
        turn."""
        label = None if self.call is None else self.call.memory.look(tensor)
        requests = tuple(range(len(self.runtime.rows)))
        if not isinstance(label, Listed) or label.owners == requests:
            return False
        return label.owners == repeated_owners(requests, label.owners)

    def _only_request(self, tensor: Tensor) -> int | None:
        """The request of a tensor that the running call has computed, if it has only one."""
        label = None if self.call is None else settled(self.call.memory.look(tensor))
        return label.request if isinstance(label, One) else None

    def is_result(self, tensor: Tensor) -> bool:
        return self.call is not None and self.call.memory.computed(tensor)

    def call_arguments(self) -> dict[int, Role]:
        roles: dict[int, Role] = {}
        if self.call is None or self.call.roles is None:
            return roles
        for name, value in self.call.named.items():
            for tensor in tensor_leaves(value):
                roles[id(tensor)] = self.call.roles.role(name, tensor, self.call.named)
        return roles

    def frame(self, graph: fx.Graph, examples: Sequence[Any]) -> Frame:
        """The frame of a Dynamo graph. Its inputs are identified by their example values."""
        known, arguments = self.known_tensors(), self.call_arguments()
        derived = self.derived.inputs(examples, known, arguments)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = []
        for node, example in zip(placeholders, examples, strict=True):
            label = source_name(node)
            if not isinstance(example, Tensor):
                counts = self._counts_requests(node, arguments, known)
                inputs.append(FrameInput("symbol", label, counts=counts))
            elif id(example) in derived:
                part = derived[id(example)]
                inputs.append(FrameInput("weight", label, sites=part.sites, derived=part))
            elif id(example) in known:
                inputs.append(known[id(example)])
            elif id(example) in arguments:
                inputs.append(FrameInput("argument", label, role=arguments[id(example)]))
            elif example.dim() == 0 and example.numel() == 1:
                # Dynamo turns modules' Python floats into 0-d tensors.
                inputs.append(FrameInput("state", label))
            else:
                role = self._earlier_result(example)
                kind: InputKind = "unknown" if role is None else "result"
                inputs.append(FrameInput(kind, label, role=role))
        frame = Frame(self._with_results(placeholders, inputs, examples))
        if self.call is not None:
            frame.token_dims = new_tokens(self.call.named)
            frame.choices = choices(self.call.named)
        frame.writable = tuple(
            position
            for position, (item, example) in enumerate(zip(inputs, examples, strict=True))
            if item.holder is not None and not isinstance(example, nn.Parameter)
        )
        return frame

    def _counts_requests(
        self, node: fx.Node, arguments: Mapping[int, Role], known: Mapping[int, FrameInput]
    ) -> bool:
        """Whether a size is that of a dimension of requests, in a tensor that is not `known`."""
        source = size_source(node)
        if source is None:
            return False
        tensor, dim = source
        role = arguments.get(id(tensor))
        if role is None and id(tensor) not in known:
            role = self._earlier_result(tensor)
        return role is not None and role.known and role.dim == dim and tensor.shape[dim] > 1

    def _with_results(
        self, nodes: Sequence[fx.Node], inputs: Sequence[FrameInput], examples: Sequence[Any]
    ) -> list[FrameInput]:
        """The inputs, with roles of results that have one request, or several entries of each."""
        requests, updated = len(self.runtime.rows), list(inputs)
        have_all_rows = any(
            item.requests_dim is not None and example.shape[item.requests_dim] == requests
            for item, example in zip(inputs, examples, strict=True)
        )
        only = {
            position: request
            for position, (item, example) in enumerate(zip(inputs, examples, strict=True))
            if item.kind == "result" and (request := self._only_request(example)) is not None
        }
        separate = len(set(only.values())) > 1
        for position, (node, item, example) in enumerate(zip(nodes, inputs, examples, strict=True)):
            if item.role is not None and position in only and separate:
                role = replace(item.role, dim=None, request=only[position], requests=requests)
                updated[position] = replace(item, role=role)
            elif item.counts and (source := size_source(node)) is not None:
                single = separate and self._only_request(source[0]) is not None
                counts = not single and not (have_all_rows and self._holds_several(source[0]))
                updated[position] = replace(item, counts=counts)
            elif item.kind == "result" and item.role is not None and have_all_rows:
                several = item.role.dim is not None and self._holds_several(example)
                updated[position] = replace(item, role=replace(item.role, several=several))
        return updated


def _plain_attributes(model: nn.Module) -> list[tuple[Holder, Tensor]]:
    return [
        (Holder(path, module, name), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _columns(table: Tensor | None, offset: int, site: Site) -> Tensor | None:
    return None if table is None else table[:, offset : offset + site.out_features]

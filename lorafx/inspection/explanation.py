"""What `explain` shows: what lorafx made of a model, or would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorafx.adapter_store.store import AdapterInfo
from lorafx.errors import numbered, some
from lorafx.inspection.report import Report, size
from lorafx.model.module_graph import joined_lines
from lorafx.passes.alias import Alias
from lorafx.passes.select import Select
from lorafx.program.program import PassReport
from lorafx.program.refusals import LastingRefusal

#: Names of compilation phases in `GraphReport.seconds` -> words.
_PHASES = {"passes": "lorafx's passes", "inductor": "Inductor", "triton": "Inductor with Triton"}
#: How many names a line lists.
_MOST = 5
#: Passes over the model whose notes say what was selected, and why other modules were not.
_SELECTING = (Alias.name, Select.name)


@dataclass(frozen=True)
class SiteReport:
    """A module, or a weight of routed experts, that carries LoRA.

    Attributes:
        aliases: other paths to it.
        registered: the registered class along its MRO.
        in_features, out_features: K and N; an embedding's K is the vocabulary.
        parts: name and columns of each projection of several; "-" if unnamed or not selected.
        own_rows: how many rows of its weight an adapter may replace.
    """

    path: str
    aliases: tuple[str, ...]
    cls: str
    registered: str
    in_features: int
    out_features: int
    dtype: str
    parts: tuple[tuple[str, int], ...] = ()
    own_rows: int = 0


@dataclass(frozen=True)
class BankReport:
    """The factors of a group's sites for all slots: parent path, last names, device bytes."""

    parent: str
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class AdapterReport(AdapterInfo):
    """A loaded adapter, and what it changes.

    Attributes:
        merged: whether it is merged into base weights.
        norms: Frobenius norm of ΔW = s·B A by site, if in host memory and requested.
        owned: the sites that have a weight of its own, which norms leave out.
        idle: the sites where it changes nothing.
        why_idle: why it changes nothing anywhere, or "".
    """

    merged: bool = False
    norms: Mapping[str, float] | None = None
    owned: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    why_idle: str = ""

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of all of ΔW, if known."""
        return sum(v * v for v in self.norms.values()) ** 0.5 if self.norms else None

    def __str__(self) -> str:
        parts = [f"{self.name}: rank {self.rank}", f"{len(self.sites)} sites"]
        parts.append("in host memory" if self.slot is None else f"slot {self.slot}")
        parts += ["pinned"] * self.pinned + ["merged"] * self.merged
        if self.why_idle:
            parts.append(self.why_idle)
        elif self.norm is not None:
            parts.append(f"norm of ΔW {self.norm:.3g}")
        if self.owned:
            parts.append(f"weights of its own at {len(self.owned)} of them")
        if self.idle and not self.why_idle:
            parts.append(f"no effect at {len(self.idle)} of them ({some(self.idle, _MOST)})")
        return ", ".join(parts)


@dataclass(frozen=True)
class NodeReport:
    """A node of a graph that adds deltas.

    Attributes:
        sites: several for packed siblings.
        form: "packed", "fused" (with the base's product), "mark" (the hook's op) or "rewritten" (a
            use of the weight without its module).
        strategy: how it is computed, and why.
        rows: which rows of x belong to which request.
    """

    sites: tuple[str, ...]
    form: str
    strategy: str
    rows: str


@dataclass(frozen=True)
class GraphReport:
    """A compiled graph.

    Attributes:
        title: "graph 0 lora".
        lora: whether it serves calls with adapters.
        serves: the kind of call, in words.
        reason: why no earlier graph serves that call.
        seconds: compile times of "Dynamo", "AOTAutograd", "passes" (lorafx's), the lowering, and
            "loading" of a saved graph.
        nodes: the nodes that add deltas.
        outlined: repeated layers that share a body.
        saved: its fate in the folder of saved graphs.
    """

    title: str
    lora: bool
    serves: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    passes: tuple[PassReport, ...] = ()
    nodes: tuple[NodeReport, ...] = ()
    refusals: tuple[LastingRefusal, ...] = ()
    outlined: tuple[str, ...] = ()
    saved: str = ""

    def lines(self) -> list[str]:
        lines = [f"serves calls {self.serves} ({self.reason})"] if self.serves else []
        if self.seconds:
            lines.append(f"compiled in {seconds_line(self.seconds)}")
        lines += [
            f"{item.name}: {item.edits} edits, {item.nodes} nodes, {item.seconds * 1e3:.0f} ms"
            for item in self.passes
        ]
        lines += [self.saved] if self.saved else []
        forms: Counter[str] = Counter()
        plans: Counter[tuple[str, str]] = Counter()
        packs: dict[str, list[str]] = {}  # the parents of packs of equal names
        for node in self.nodes:
            forms[node.form] += len(node.sites)
            plans[node.strategy, node.rows] += len(node.sites)
            if len(node.sites) > 1:
                names = ", ".join(path.rpartition(".")[2] for path in node.sites)
                packs.setdefault(names, []).append(node.sites[0].rpartition(".")[0] or "(root)")
        if forms:
            lines.append("forms: " + ", ".join(f"{count} {form}" for form, count in forms.items()))
        for names, parents in packs.items():
            like_it = f" and {len(parents) - 1} more like it" if len(parents) > 1 else ""
            lines.append(f"pack {parents[0]}: [{names}]{like_it}")
        for (strategy, rows), count in plans.items():
            lines.append(f"plan: {strategy} at {numbered(count, 'site')}, {rows}")
        lines += [f"outline: {item}" for item in self.outlined]
        for refusal in self.refusals:
            paths = ", ".join(path or "(root)" for path in refusal.sites)
            lines.append(f"refused ({refusal.when}): {paths}: {refusal.reason}")
        return lines


@dataclass(frozen=True)
class Explanation(Report):
    """What lorafx made of a model, or would make of it. `str()` is the whole report, `json()` its
    values. Only captured graphs show whether uses of weights are understood and rows are proved.

    Attributes:
        weight_bytes: of the model's parameters.
        adapter_bytes: of an adapter of the largest rank on all sites.
        lowering: how its graphs become code.
        slots, max_rank: adapters on the device, and their largest rank.
        slot_rank: the rank of a single slot, where slots share room.
        room: "DoRA's scales", "biases", "weights of adapters' own", if banks have room for them.
        shortcuts_off: names of disabled shortcuts -> reasons.
        prepared: results of the passes over the model; `notes` are their lines.
        unreached: sites that no graph has reached yet.
        replaced: modules that have changed since lorafx was given the model.
    """

    model: str
    lowering: str
    sites: tuple[SiteReport, ...]
    banks: tuple[BankReport, ...]
    slots: int
    max_rank: int
    weight_bytes: int
    adapter_bytes: int
    slot_rank: int | None = None
    room: tuple[str, ...] = ()
    adapters: tuple[AdapterReport, ...] = ()
    passes: tuple[str, ...] = ()
    shortcuts_off: Mapping[str, str] = field(default_factory=dict)
    prepared: tuple[PassReport, ...] = ()
    graphs: tuple[GraphReport, ...] = ()
    unreached: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[LastingRefusal, ...]:
        return tuple(refusal for graph in self.graphs for refusal in graph.refusals)

    @property
    def seconds(self) -> dict[str, float]:
        """Compile times of all graphs by phase."""
        total: Counter[str] = Counter()
        for graph in self.graphs:
            total.update(graph.seconds)
        return dict(total)

    @property
    def summary(self) -> tuple[str, ...]:
        """Five lines: the model, adapters, graphs, computation of deltas, refusals."""
        return (
            f"{self.model}: {numbered(len(self.sites), 'site')} (modules that carry LoRA), "
            f"{self.slots} slots for adapters of rank up to {self.max_rank}, "
            f"{numbered(len(self.banks), 'bank')} of {self._bank_bytes:,} bytes in all",
            self._adapters_line(),
            self._graphs_line(),
            self._deltas_line(),
            self._refusals_line(),
        )

    @property
    def _bank_bytes(self) -> int:
        return sum(bank.nbytes for bank in self.banks)

    def derived(self) -> dict[str, Any]:
        adapters = [{**asdict(item), "norm": item.norm} for item in self.adapters]
        return {"adapters": adapters, "seconds": self.seconds, "summary": self.summary}

    def __str__(self) -> str:
        parts = list(self.summary)
        for title, lines in self.sections():
            parts += [title, *(f"  {line}" for line in lines)]
        return "\n".join(parts)

    def sections(self) -> list[tuple[str, Iterable[str]]]:
        banks = f"banks: {len(self.banks)}, {self.slots} slots of rank up to {self.max_rank}"
        banks += f", room for rank {self.slot_rank} in each" if self.slot_rank else ""
        noted = (note for item in self.prepared if item.name in _SELECTING for note in item.notes)
        by_parent = (
            (bank.parent, f"[{', '.join(bank.names)}], {size(bank.nbytes)}") for bank in self.banks
        )
        sections: list[tuple[str, Iterable[str]]] = [
            *((line, ()) for line in self.facts()),
            (f"sites: {len(self.sites)}", noted),
            (" and ".join([banks, *self.room]), joined_lines(by_parent)),
        ]
        if self.replaced:
            title = (
                "replaced after lorafx was given the model; adapters that touch them are refused"
            )
            sections.append((title, self.replaced))
        sections.append((f"adapters: {len(self.adapters)}", map(str, self.adapters)))
        sections.append(("passes", self.passes))
        if self.calls:
            sections.append(("calls, which are eager until there are graphs", self.calls))
        sections.append((f"graphs: {len(self.graphs)}", ()))
        sections += [(graph.title, graph.lines()) for graph in self.graphs]
        if self.unreached:
            sections.append(("sites that no graph has reached yet", self.unreached))
        return sections

    def facts(self) -> list[str]:
        off = [f"{name} ({reason})" for name, reason in self.shortcuts_off.items()]
        memory = (
            f"memory: weights {size(self.weight_bytes)}, banks {size(self._bank_bytes)}; one "
            f"adapter of rank {self.max_rank} on all sites {size(self.adapter_bytes)}"
        )
        return [memory, *([f"shortcuts that are off: {', '.join(off)}"] if off else [])]

    # --- the lines of the summary ---

    def _adapters_line(self) -> str:
        if not self.adapters:
            return "adapters: none is loaded"
        on_device = sum(adapter.slot is not None for adapter in self.adapters)
        line = f"adapters: {len(self.adapters)} loaded, {on_device} in slots on the device"
        idle = [f"{item.name} ({item.why_idle})" for item in self.adapters if item.why_idle]
        return line + (f"; without effect: {some(idle, _MOST)}" if idle else "")

    def _graphs_line(self) -> str:
        if not self.graphs and self.calls:
            return "no graph is in use yet: calls are answered eagerly, as listed below"
        if not self.graphs:
            return "no graph is compiled yet: the first calls do that, or warmup()"
        lora = sum(graph.lora for graph in self.graphs)
        return (
            f"compiled: {numbered(len(self.graphs), 'graph')}, {lora} of them with adapters, in "
            f"{seconds_line(self.seconds)}"
        )

    def _deltas_line(self) -> str:
        nodes = [node for graph in self.graphs for node in graph.nodes]
        if not nodes:
            return f"lowering: {self.lowering}"
        counts = Counter(node.strategy.partition(" ")[0].rstrip(",") for node in nodes)
        packed = sum(node.form == "packed" for node in nodes)
        strategies = ", ".join(f"{count} {strategy}" for strategy, count in counts.items())
        return (
            f"lowering: {self.lowering}; {numbered(len(nodes), 'node')} with deltas "
            f"({strategies}), {packed} of them packs of siblings"
        )

    def _refusals_line(self) -> str:
        refused = dict.fromkeys(
            f"{path or '(root)'} ({refusal.when})"
            for refusal in self.refusals
            for path in refusal.sites
        )
        served = "every site that a graph has reached is served"
        parts = [f"refused: {some(refused, _MOST)}" if refused else served if self.graphs else ""]
        if self.unreached:
            parts.append(f"not reached by a graph yet: {some(self.unreached, _MOST)}")
        if self.replaced:
            parts.append(f"{numbered(len(self.replaced), 'site')} replaced since")
        return (
            "; ".join(filter(None, parts))
            or "which sites are refused is known when there is a graph"
        )


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Compile times in words."""
    parts = ", ".join(f"{_PHASES.get(name, name)} {value:.1f}" for name, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s" + (f": {parts}" if parts else "")

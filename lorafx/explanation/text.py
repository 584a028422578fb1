"""The report as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from lorafx.errors import some
from lorafx.explanation.report import AdapterReport, Explanation, GraphReport, SiteReport

Section = tuple[str, tuple[str, ...]]

#: Who spends time on a graph, as it is called in `GraphReport.seconds`, and in words.
_BY = {"passes": "lorafx's passes", "inductor": "Inductor", "triton": "Inductor with Triton"}
#: Names that a line of the summary spells out.
_MOST = 5


def summary(report: Explanation) -> tuple[str, ...]:
    """Five lines: the model, adapters, graphs, how deltas are computed, what is not served."""
    nbytes = sum(bank.nbytes for bank in report.banks)
    return (
        f"{report.model}: {_count(len(report.sites), 'site')} (modules that carry LoRA), "
        f"{report.slots} slots for adapters of rank up to {report.max_rank}, "
        f"{_count(len(report.banks), 'bank')} of {nbytes:,} bytes in all",
        _adapters(report.adapters),
        _graphs(report.graphs, report.seconds),
        _nodes(report.graphs, report.lowering),
        _unserved(report),
    )


def sections(report: Explanation) -> tuple[Section, ...]:
    """All of it, by section."""
    banks = f"banks: {len(report.banks)}, {report.slots} slots of rank up to {report.max_rank}"
    banks += f", room for rank {report.slot_rank} in each" if report.slot_rank else ""
    found: list[Section] = [
        (f"sites: {len(report.sites)}", tuple(map(_site, report.sites))),
        (
            " and ".join([banks, *report.room]),
            tuple(
                f"[{', '.join(bank.names)}] of {bank.parent or '(root)'}: {bank.nbytes} bytes"
                for bank in report.banks
            ),
        ),
    ]
    if report.replaced:
        title = "replaced after lorafx was given the model; adapters that touch them are refused"
        found.append((title, report.replaced))
    found += [
        (f"adapters: {len(report.adapters)}", tuple(map(adapter_line, report.adapters))),
        ("passes", report.passes),
    ]
    if report.shortcuts_off:
        found.append((shortcuts_line(report), ()))
    found.append((f"graphs: {len(report.graphs)}", ()))
    found += [(graph.title, tuple(graph_lines(graph))) for graph in report.graphs]
    if report.unreached:
        found.append(("sites that no graph has reached yet", report.unreached))
    return tuple(found)


def shortcuts_line(report: Explanation) -> str:
    """Which shortcuts are off, and why; "" where all are on."""
    off = [f"{name} ({reason})" for name, reason in report.shortcuts_off.items()]
    return f"shortcuts that are off: {', '.join(off)}" if off else ""


def seconds_line(seconds: Mapping[str, float]) -> str:
    """What compiling took, and whose time that was."""
    parts = ", ".join(f"{_BY.get(what, what)} {value:.1f}" for what, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s" + (f": {parts}" if parts else "")


def adapter_line(adapter: AdapterReport) -> str:
    """One adapter."""
    found = [f"{adapter.name}: rank {adapter.rank}", f"{len(adapter.sites)} sites"]
    found.append("in host memory" if adapter.slot is None else f"slot {adapter.slot}")
    found += ["pinned"] * adapter.pinned + ["merged"] * adapter.merged
    if adapter.why_idle:
        found.append(adapter.why_idle)
    elif adapter.norm is not None:
        found.append(f"norm of ΔW {adapter.norm:.3g}")
    if adapter.idle and not adapter.why_idle:
        found.append(f"no effect at {len(adapter.idle)} of them ({some(adapter.idle, _MOST)})")
    return "; ".join([", ".join(found), *adapter.notes])


def graph_lines(graph: GraphReport) -> list[str]:
    """One graph."""
    lines = [f"serves calls {graph.serves} ({graph.reason})"] if graph.serves else []
    if graph.seconds:
        lines.append(f"compiled in {seconds_line(graph.seconds)}")
    lines += [
        f"{report.name}: {report.edits} edits, {report.nodes} nodes, {report.seconds * 1e3:.0f} ms"
        for report in graph.passes
    ]
    lines += [graph.saved] if graph.saved else []
    lines += [f"verified by {graph.verified}"] if graph.verified else []
    forms: Counter[str] = Counter()
    plans: Counter[tuple[str, str]] = Counter()
    parents: dict[str, list[str]] = {}  # packs of repeated layers are told once
    for node in graph.nodes:
        forms[node.form] += len(node.sites)
        plans[node.strategy, node.rows] += len(node.sites)
        if len(node.sites) > 1:
            names = ", ".join(path.rpartition(".")[2] for path in node.sites)
            parents.setdefault(names, []).append(node.sites[0].rpartition(".")[0] or "(root)")
    if forms:
        lines.append("forms: " + ", ".join(f"{count} {form}" for form, count in forms.items()))
    for names, found in parents.items():
        others = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
        lines.append(f"pack {found[0]}: [{names}]{others}")
    for (strategy, rows), count in plans.items():
        lines.append(f"plan: {strategy} at {_count(count, 'site')}, {rows}")
    lines.extend(f"outline: {item}" for item in graph.outlined)
    for refusal in graph.refusals:
        paths = ", ".join(path or "(root)" for path in refusal.sites)
        lines.append(f"refused ({refusal.when}): {paths}: {refusal.reason}")
    return lines


def _site(site: SiteReport) -> str:
    parts = ", ".join(f"{name} {columns}" for name, columns in site.parts)
    loose = f"; {', '.join(site.loose)}, told apart by their rows" if site.loose else ""
    return (
        f"{site.path or '(root)'}: {site.cls} as {site.registered}, "
        f"{site.in_features} -> {site.out_features}, {site.dtype}"
        + (f" [{parts}{loose}]" if parts else "")
        + (f", room for {site.own_rows} rows of an adapter's own" if site.own_rows else "")
        + (f", also {', '.join(site.aliases)}" if site.aliases else "")
    )


def _adapters(adapters: Iterable[AdapterReport]) -> str:
    found = list(adapters)
    if not found:
        return "adapters: none is loaded"
    on_device = sum(adapter.slot is not None for adapter in found)
    line = f"adapters: {len(found)} loaded, {on_device} in slots on the device"
    idle = [f"{adapter.name} ({adapter.why_idle})" for adapter in found if adapter.why_idle]
    return line + (f"; without effect: {some(idle, _MOST)}" if idle else "")


def _graphs(graphs: Iterable[GraphReport], seconds: Mapping[str, float]) -> str:
    found = list(graphs)
    if not found:
        return "no graph is compiled yet: the first calls do that, or warmup()"
    lora = sum(graph.lora for graph in found)
    return (
        f"compiled: {_count(len(found), 'graph')}, {lora} of them with adapters, in "
        f"{seconds_line(seconds)}"
    )


def _nodes(graphs: Iterable[GraphReport], lowering: str) -> str:
    nodes = [node for graph in graphs for node in graph.nodes]
    if not nodes:
        return f"lowering: {lowering}"
    ways = Counter(node.strategy.partition(" ")[0].rstrip(",") for node in nodes)
    packed = sum(node.form == "packed" for node in nodes)
    listed = ", ".join(f"{count} {way}" for way, count in ways.items())
    return (
        f"lowering: {lowering}; {_count(len(nodes), 'node')} with deltas ({listed}), "
        f"{packed} of them packs of siblings"
    )


def _unserved(report: Explanation) -> str:
    refused = dict.fromkeys(
        f"{path or '(root)'} ({refusal.when})"
        for refusal in report.refusals
        for path in refusal.sites
    )
    served = "every site that a graph has reached is served"
    found = [f"refused: {some(refused, _MOST)}" if refused else served if report.graphs else ""]
    if report.unreached:
        found.append(f"not reached by a graph yet: {some(report.unreached, _MOST)}")
    if report.replaced:
        found.append(f"{_count(len(report.replaced), 'site')} replaced since")
    numbers = dict.fromkeys(graph.verified for graph in report.graphs if graph.verified)
    return "; ".join(filter(None, [*found, *numbers])) or "no call has been made"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

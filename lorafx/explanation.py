"""`explain`: what lorafx made of a model, as text."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafx.capture.dump import dump_folder
from lorafx.capture.record import GraphRecord, seen_sites
from lorafx.config import LoraConfig
from lorafx.model.sites import Group, Site
from lorafx.pass_order import pipeline

if TYPE_CHECKING:
    from lorafx.session.session import Session


@dataclass(frozen=True)
class Explanation:
    """Text by section; `str()` is the whole report."""

    sections: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        parts = []
        for title, lines in self.sections:
            parts.append(title)
            parts.extend(f"  {line}" for line in lines)
        return "\n".join(parts)

    @classmethod
    def of(cls, session: Session) -> Explanation:
        """The report on a compiled model."""
        program, store = session.program, session.store
        records = session.backend.records
        resident, pinned, merged = store.resident, store.pinned, session.base.merged
        adapters = [
            f"{name}: rank {store[name].rank}, {len(store[name].sites)} sites, "
            + (f"slot {resident[name]}" if name in resident else "in host memory")
            + (", pinned" if name in pinned else "")
            + (", merged" if merged is not None and merged.name == name else "")
            + "".join(f"; {note}" for note in store[name].notes)
            for name in store.names
        ]
        program.look_at_modules()
        missing = program.site_watch.lines()
        sections = [
            *model_sections(program.sites, program.groups, program.config),
            *(
                [
                    (
                        "replaced after lorafx was given the model; adapters that touch them are "
                        "refused",
                        missing,
                    )
                ]
                if missing
                else []
            ),
            (f"adapters: {len(adapters)}", tuple(adapters)),
            ("passes", tuple(str(pipeline(program.options)).splitlines())),
            (f"graphs: {len(records)}", ()),
        ]
        for record in records:
            sections.append((record.title, tuple(_graph_lines(record))))
        lora = [record for record in records if record.lora]
        unseen = [site.path for site in program.sites if site not in seen_sites(lora)]
        if lora and unseen:
            sections.append(("sites that no graph has reached yet", tuple(unseen)))
        return cls(tuple(sections))


def write_beside_dumps(session: weakref.ref[Session]) -> None:
    """Write the report into the folder that the graphs of this model are dumped into, if there is
    one."""
    found = session()
    folder = None if found is None else dump_folder(found.program.options)
    if found is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report = f"{Explanation.of(found)}\n"
        (folder / "explain.txt").write_text(report)
        if found.backend.page is not None:
            found.backend.page.texts["explain.txt"] = report
            found.backend.page.write()


def model_sections(
    sites: Sequence[Site], groups: Sequence[Group], config: LoraConfig
) -> list[tuple[str, tuple[str, ...]]]:
    """Sites and banks, which need no graph."""
    site_lines = [
        f"{site.path or '(root)'}: {type(site.module).__name__} as {site.eligible.cls.__name__}, "
        f"{site.in_features} -> {site.out_features}, {site.dtype}".replace("torch.", "")
        + _parts(site)
        + (f", room for {site.own_rows} rows of an adapter's own" if site.own_rows else "")
        + (f", also {', '.join(site.aliases)}" if site.aliases else "")
        for site in sites
    ]
    bank_lines = [
        f"[{', '.join(site.path.rpartition('.')[2] for site in group.sites)}] "
        f"of {group.sites[0].path.rpartition('.')[0] or '(root)'}: {group.bank.nbytes} bytes"
        for group in groups
    ]
    return [
        (f"sites: {len(sites)}", tuple(site_lines)),
        (
            f"banks: {len(groups)}, {config.max_adapters} slots of rank up to {config.max_rank}"
            + (f", room for rank {config.slot_rank} in each" if config.slot_rank else "")
            + (" and DoRA's scales" if config.use_dora else "")
            + (" and biases" if config.lora_bias else ""),
            tuple(bank_lines),
        ),
    ]


def _parts(site: Site) -> str:
    """The parts of a packed site, "-" for one that has no name or was not selected."""
    if len(site.parts) == 1:
        return ""
    names = (
        f"{(part.name if part.selected else '') or '-'} {part.out_features}" for part in site.parts
    )
    loose = f"; {', '.join(site.loose_names)}, told apart by their rows" if site.loose_names else ""
    return f" [{', '.join(names)}{loose}]"


def _graph_lines(record: GraphRecord) -> list[str]:
    lines = [
        f"{report.name}: {report.edits} edits, {report.nodes} nodes, {report.seconds * 1e3:.0f} ms"
        for report in record.passes
    ]
    if record.saved:
        lines.append(record.saved)
    packs: dict[int, list[str]] = {}
    for state in record.states:
        packs.setdefault(state.node_key, []).append(state.site.path)
    forms = Counter(state.form for state in record.states)
    if forms:
        lines.append("forms: " + ", ".join(f"{count} {form}" for form, count in forms.items()))
    parents: dict[str, list[str]] = {}  # packs of repeated layers are told once
    for paths in packs.values():
        if len(paths) > 1:
            names = ", ".join(path.rpartition(".")[2] for path in paths)
            parents.setdefault(names, []).append(paths[0].rpartition(".")[0] or "(root)")
    for names, found in parents.items():
        others = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
        lines.append(f"pack {found[0]}: [{names}]{others}")
    strategies = Counter((state.strategy, state.rows) for state in record.states)
    for (strategy, rows), count in strategies.items():
        lines.append(f"plan: {strategy or 'aten'} at {count} sites, {rows}")
    lines.extend(f"outline: {item}" for item in record.outlined)
    lines.extend(f"refused ({item.when}): {item.describe()}" for item in record.refusals)
    return lines

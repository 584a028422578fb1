"""The outcomes of all families as Markdown: the tables of docs/families.md, without its prose."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import oracle
import peft
import tiny
import torch
import transformers
from examine import OUTCOMES

Report = Mapping[str, Any]

_SEEN = 1e-3  # smallest effect of an adapter that makes a comparison worth something


def table(reports: Iterable[Report]) -> str:
    """The reports of all parts, each family's last one for each lowering."""
    last = {(r.get("lowering"), r["kind"], r["type"]): r for r in reports}
    rows = sorted(last.values(), key=lambda r: (list(tiny.KINDS).index(r["kind"]), r["type"]))
    reference = [r for r in rows if r.get("lowering") != "inductor"]
    inductor = [r for r in rows if r.get("lowering") == "inductor"]
    sections = [
        _heading(),
        _counted(reference),
        _missing(reference),
        _not_ok(reference),
        _ok(reference),
        _routed(reference),
        _inductor(inductor, reference) if inductor else [],
    ]
    return "\n".join(line for section in sections for line in section).rstrip()


def _heading() -> list[str]:
    return [
        f"Run on {time.strftime('%Y-%m-%d')} with torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}; tolerance {oracle.TOLERANCE:g}.",
        "",
    ]


def _counted(rows: Sequence[Report]) -> list[str]:
    """How many of each kind came out how; "base" stands apart, as not tried."""
    counts = Counter((r["kind"], r["outcome"]) for r in rows)
    kinds = [kind for kind in tiny.KINDS if any(counts[kind, name] for name in OUTCOMES)]
    tried = sum(r["outcome"] != "base" for r in rows)
    return [
        f"{tried} families tried:",
        "",
        f"| outcome | meaning | {' | '.join(kinds)} |",
        "|---|---|" + "---|" * len(kinds),
        *(
            f"| {name} | {meaning} | {' | '.join(str(counts[kind, name]) for kind in kinds)} |"
            for name, meaning in OUTCOMES.items()
        ),
        "",
    ]


def _missing(rows: Sequence[Report]) -> list[str]:
    known = {(r["kind"], r["type"]) for r in rows}
    every = [family for kind in tiny.KINDS for family in tiny.families(kind)]
    missing = [f"{f.model_type} ({f.kind})" for f in every if (f.kind, f.model_type) not in known]
    return [
        f"{len(missing)} not run yet: {', '.join(missing)}." if missing else "All have been run.",
        "",
    ]


def _not_ok(rows: Sequence[Report]) -> list[str]:
    tried = [r for r in rows if r["outcome"] not in ("ok", "base")]
    base = [_shown(r) for r in rows if r["outcome"] == "base"]
    return [
        "## Those that are not ok",
        "",
        *_reasons(tried),
        f"Base: {', '.join(base)}.",
        "",
    ]


def _reasons(rows: Iterable[Report]) -> list[str]:
    return [*(f"- {_shown(r)}, {r['outcome']}: {short(r.get('detail', ''))}" for r in rows), ""]


def _ok(rows: Sequence[Report]) -> list[str]:
    lines = ["## Those that are ok", ""]
    for kind in tiny.KINDS:
        good = [r for r in rows if r["kind"] == kind and r["outcome"] == "ok"]
        if good:
            names = ", ".join(map(_name, good))
            lines += [f"**{kind}** ({len(good)}): {names}", ""]
    lines += ["† with text alone, since its images come in a form of their own.", ""]
    blind = [r["type"] for r in rows if r["outcome"] == "ok" and r["effect"] < _SEEN]
    if blind:
        lines += [
            "In these the adapters change the result by less than "
            f"{_SEEN:g}, so that equality says little: {', '.join(blind)}.",
            "",
        ]
    return lines


def _shown(r: Report) -> str:
    return f"{r['type']} ({r['kind']})"


def _name(r: Report) -> str:
    text_alone = r["kind"] == "image-text" and "pixel_values" not in r["inputs"]
    return f"{r['type']}†" if text_alone else r["type"]


def _routed(rows: Sequence[Report]) -> list[str]:
    """What became of routers and experts."""
    routed = [r for r in rows if "experts" in r and r["outcome"] == "ok"]
    served = [r for r in routed if "routing" not in r]
    with_experts = sum(bool(r["experts"]) for r in served)
    with_routers = sum(bool(r["routers"]) for r in served)
    return [
        "## Routers and experts",
        "",
        f"Of the families that are ok, {len(routed)} hold routers of a class that is no linear, or "
        f"routed experts as 3-D parameters. Both are served in {len(served)} of them: experts in "
        f"{with_experts}, routers in {with_routers}. In these one of them is refused, and adapters "
        "that leave it alone are served:",
        "",
        *(f"- {_shown(r)}: {short(r['routing'])}" for r in routed if "routing" in r),
        "",
        "The classes of experts one by one are in [routed_experts.md](routed_experts.md).",
        "",
    ]


def _inductor(rows: Sequence[Report], reference: Sequence[Report]) -> list[str]:
    run = {(r["kind"], r["type"]) for r in rows}
    every = {name for r in reference for name in r.get("operators", ())}
    covered = {
        name for r in reference if (r["kind"], r["type"]) in run for name in r.get("operators", ())
    }
    good = [r for r in rows if r["outcome"] == "ok"]
    return [
        "## With Inductor",
        "",
        f'The same with `lowering="inductor"` in the {len(rows)} families of '
        "`benchmarks/inductor_families.txt`, chosen so that "
        f"their graphs hold {len(covered)} of the {len(every)} distinct operators of all "
        f"graphs. {len(good)} are ok"
        + (":" if len(good) == len(rows) else "; those that are not:"),
        "",
        *(_reasons(r for r in rows if r["outcome"] != "ok") if len(good) < len(rows) else []),
    ]


def short(text: str) -> str:
    """A reason in a line."""
    text = re.sub(r"( at \S+:\d+)?: (this batch mixes adapters, and )?", ": ", text, count=1)
    text = re.sub(r"File \S+, line \d+, |Run one adapter (?:a|per) batch.*", "", text)
    return text[:200].strip()

"""Every transformers family against the oracle: one line each, and a table for the documentation.

    python tests/conformance/sweep.py --out outcome.jsonl [--kinds causal,masked] [--only llama]
    python tests/conformance/sweep.py --out outcome.jsonl --table > docs/families.md

Each family is compiled in a process of its own (forked from one that has imported everything and
compiled a model once), with a time limit, so that a crash or a hang costs only that family. The
lowering is "reference": what is asked here is whether the right thing is computed.

The outcomes are listed at `OUTCOMES`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import oracle
import peft
import tiny
import torch
import transformers
from tiny import Family

import lorafx
from lorafx.errors import LorafxError, MatchError, ProvenanceError

#: (batch, length): length no multiple of the batch, equal to it, a multiple of it.
SHAPES = ((3, 5), (4, 4), (3, 6))
_NOISE_FACTOR = 20
_SEEN = 1e-3  # smallest effect of an adapter that makes a comparison worth something

OUTCOMES = {
    "ok": "every batch equals the oracle, mixed batches too",
    "refused": "one adapter a batch equals the oracle; a mixed batch is refused with the reason",
    "unmatched": "LoRA is refused at some modules for any batch, with the reason",
    "wrong": "some batch differs from the oracle",
    "error": "an exception that is not one of lorafx's refusals, or no answer in time",
    "base": "the base model cannot be built small, or run, here; not counted as tried",
}


def examine(
    family: Family, folder: str, shapes: Sequence[tuple[int, int]] = SHAPES
) -> dict[str, Any]:
    """The outcome of one family; `folder` takes its adapters, the first of `shapes` has 3 rows."""
    report: dict[str, Any] = {"kind": family.kind, "type": family.model_type}
    report["class"] = family.class_name
    try:
        model = tiny.build(family)
        batches = [tiny.inputs(model, family.kind, b, t, seed=b) for b, t in shapes]
        with torch.no_grad():
            model(**batches[0])
            batches = [batch for batch in batches if _runs(model, batch)]
    except Exception as error:
        return {**report, "outcome": "base", "detail": brief(error)}
    adapters = oracle.standard_adapters(model, folder)
    reference = oracle.Oracle.of(model, adapters)
    report["modules"] = len(oracle.linears(model))
    batches = [_independent(reference, batch) for batch in batches]
    plain = [None] * 3
    base_rows = reference.rows(plain, batches[0])
    with torch.no_grad():
        whole = oracle.tensors(reference.base(**batches[0]))
    report["coupling"] = oracle.difference(whole, base_rows)
    report["effect"] = min(
        oracle.difference(reference.rows([name] * 3, batches[0]), base_rows) for name in adapters
    )
    compiled = lorafx.compile(model, adapters, options={"lowering": "reference"})
    names = list(adapters)
    try:
        worst = 0.0
        for mix, batch in _calls(names, batches):
            try:
                found = oracle.tensors(compiled(**batch, adapter_names=mix))
            except ProvenanceError as error:
                report["outcome"] = "refused"
                report["detail"] = brief(error)
                report["refusals"] = _refusals(compiled)
                continue
            expected = reference.rows(mix, batch)
            difference = oracle.difference(found, expected)
            if difference > oracle.TOLERANCE and difference > _NOISE_FACTOR * _noise(
                reference, mix, batch, expected
            ):
                detail = f"{mix}: differs by {difference:.1e}"
                return {**report, "outcome": "wrong", "detail": detail}
            worst = max(worst, difference)
        report.setdefault("outcome", "ok")
        report["worst"] = worst
        report["graphs"] = compiled.recompiles
    except MatchError as error:
        report.update(outcome="unmatched", detail=brief(error), refusals=_refusals(compiled))
    return report


def _runs(model: torch.nn.Module, batch: dict[str, Any]) -> bool:
    """False for lengths that the base itself fails on (funnel, four tokens)."""
    try:
        model(**batch)
    except Exception:
        return False
    return True


def _calls(
    names: list[str], batches: list[dict[str, Any]]
) -> Iterable[tuple[list[str | None], dict[str, Any]]]:
    """One adapter a batch first, then mixes with base rows."""
    first, *others = batches
    last = names[-1]
    yield ["all"] * 3, first
    yield [last] * 3, first
    yield [None, "all", "odd"], first
    for batch in others:
        size = len(next(iter(batch.values())))
        yield (["even", last, None, "all", "odd"])[:size], batch


def _independent(reference: oracle.Oracle, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, without its padding where the base itself does not support padding."""
    if "attention_mask" not in batch:
        return batch
    rows = len(batch["attention_mask"])
    try:
        with torch.no_grad():
            whole = oracle.tensors(reference.base(**batch))
        if oracle.difference(whole, reference.rows([None] * rows, batch)) < 1e-4:
            return batch
    except Exception:  # the family does not take this mask
        pass
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


@torch.no_grad()
def _noise(
    reference: oracle.Oracle,
    names: oracle.Names,
    batch: dict[str, Any],
    expected: list[torch.Tensor],
) -> float:
    """How far the merged models themselves are from their rows alone when run in a batch."""
    worst = 0.0
    for index, name in enumerate(names):
        whole = oracle.tensors(reference.model(name)(**batch))
        worst = max(
            worst,
            oracle.difference(
                [part[index : index + 1] for part in whole],
                [part[index : index + 1] for part in expected],
            ),
        )
    return worst


def _refusals(compiled: lorafx.CompiledModel) -> dict[str, int]:
    """Sites by the reason for which they were refused."""
    found: Counter[str] = Counter()
    for record in compiled._session.backend.records:
        for refusal in record.refusals:
            found[f"{refusal.when}: {refusal.reason[:300]}"] += len(refusal.sites)
    return dict(found)


def brief(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{at}: {text[:600]}"


def in_child(
    examined: Callable[[Family, str], dict[str, Any]], family: Family, limit: float
) -> dict[str, Any]:
    """`examined` of the family and a folder, in a forked process, killed after `limit` seconds."""
    began = time.monotonic()
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    report = examined(family, folder)
                except BaseException as error:
                    report = {**named(family), "outcome": "error", "detail": brief(error)}
                    if isinstance(error, LorafxError):
                        report["trace"] = traceback.format_exc()[-1500:]
            os.write(writer, json.dumps(report).encode()[:60_000])
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    data = b""
    ready, _, _ = select.select([reader], [], [], limit)
    if ready:
        while chunk := os.read(reader, 1 << 16):
            data += chunk
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if data:
        report = json.loads(data)
    elif not ready:
        report = {**named(family), "outcome": "error", "detail": f"no answer in {limit:.0f} s"}
    else:
        report = {**named(family), "outcome": "error", "detail": f"crashed, status {status}"}
    report["seconds"] = round(time.monotonic() - began, 1)
    return report


def named(family: Family) -> dict[str, Any]:
    return {"kind": family.kind, "type": family.model_type, "class": family.class_name}


def sweep(kinds: list[str], only: set[str], out: Path, limit: float) -> None:
    """Append one line a family to `out`; families that it has already are left out."""
    done = {(r["kind"], r["type"]) for r in read(out)} if out.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        examine(Family("causal", "llama", "LlamaForCausalLM"), folder)  # warm
    todo = [family for kind in kinds for family in tiny.families(kind)]
    # In an order that mixes kinds: what is stopped early has still seen some of everything.
    todo.sort(key=lambda family: zlib.crc32(f"{family.kind} {family.model_type}".encode()))
    for family in todo:
        kind, model_type = family.kind, family.model_type
        if (only and model_type not in only) or (kind, model_type) in done:
            continue
        report = in_child(examine, family, limit)
        with out.open("a") as file:
            file.write(json.dumps(report) + "\n")
        detail = str(report.get("detail", ""))[:200]
        print(
            f"{kind} {model_type}: {report['outcome']} {report['seconds']} s {detail}", flush=True
        )


def table(reports: Iterable[dict[str, Any]]) -> str:
    """The outcomes as Markdown, with what they were made with."""
    rows = sorted(reports, key=lambda r: (list(tiny.KINDS).index(r["kind"]), r["type"]))
    tested = [r for r in rows if r["outcome"] != "base"]
    counts = Counter((r["kind"], r["outcome"]) for r in rows)
    known = {(r["kind"], r["type"]) for r in rows}
    every = [family for kind in tiny.KINDS for family in tiny.families(kind)]
    missing = [f.model_type for f in every if (f.kind, f.model_type) not in known]
    outcomes = [name for name in OUTCOMES if any(counts[kind, name] for kind in tiny.KINDS)]
    lines = [
        "# Families of transformers",
        "",
        f"Made by `tests/conformance/sweep.py` on {time.strftime('%Y-%m-%d')} with torch "
        f"{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        'on a CPU in fp32 with `lowering="reference"`. Each family is a tiny model of random '
        "weights with three or four PEFT adapters of unequal ranks and targets (every linear, "
        "every second one, the others, the token embedding), saved and read from disk. Calls: two "
        "with one adapter a batch, then mixed batches with base rows of 3, 4 and 3 requests and "
        "5, 4 and 6 tokens. Each row is compared with W + ΔW merged densely, run alone; tolerance "
        f"{oracle.TOLERANCE:g}.",
        "",
        "The sweep runs for about two hours; rows come from runs during one day of development, "
        "each family's last one.",
        "",
        "| outcome | meaning |",
        "|---|---|",
        *(f"| {name} | {meaning} |" for name, meaning in OUTCOMES.items()),
        "",
        f"{len(tested)} families tried:",
        "",
        "| kind | " + " | ".join(outcomes) + " |",
        "|---|" + "---|" * len(outcomes),
        *(
            f"| {kind} | " + " | ".join(str(counts[kind, name]) for name in outcomes) + " |"
            for kind in tiny.KINDS
        ),
        "",
        f"{len(missing)} not run yet: {', '.join(missing)}." if missing else "All have been run.",
        "",
        "## Those that are not ok",
        "",
        "| kind | family | outcome | why |",
        "|---|---|---|---|",
        *(
            f"| {r['kind']} | {r['type']} | {r['outcome']} | {cell(r.get('detail', ''))} |"
            for r in rows
            if r["outcome"] != "ok"
        ),
        "",
        "## Those that are ok",
        "",
    ]
    for kind in tiny.KINDS:
        good = [r["type"] for r in rows if r["kind"] == kind and r["outcome"] == "ok"]
        lines += [f"**{kind}** ({len(good)}): {', '.join(good)}", ""]
    blind = [r["type"] for r in rows if r["outcome"] == "ok" and r["effect"] < _SEEN]
    if blind:
        lines += [
            "In these the adapters change the result by less than "
            f"{_SEEN:g}, so that equality says little: {', '.join(blind)}.",
            "",
        ]
    return "\n".join(lines)


def cell(text: str) -> str:
    text = re.sub(r"( at \S+:\d+)?: (this batch mixes adapters, and )?", ": ", text, count=1)
    text = re.sub(r"File \S+, line \d+, |Run one adapter a batch.*", "", text)
    return text.replace("|", "\\|")[:330].strip()


def read(path: Path) -> list[dict[str, Any]]:
    """The reports in `path`, the last one of each family."""
    found = {}
    for line in path.read_text().splitlines():
        report = json.loads(line)
        found[report["kind"], report["type"]] = report
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", default=",".join(tiny.KINDS))
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of --out instead")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a family")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.out)))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    only = {name for name in options.only.split(",") if name}
    sweep(options.kinds.split(","), only, options.out, options.limit)


if __name__ == "__main__":
    main()

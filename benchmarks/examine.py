"""One family against the oracle: the outcome, with what it rests on.

The outcomes are listed at `OUTCOMES`. Adapters target everything that they can: linears, the token
embedding, routers, experts. Where routers or experts are refused, the family is tried once more
without them, and the report says so. A router is found by what it does: a module of no class that
PEFT wraps, whose matrix `weight` is multiplied with in the forward.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import tiny
import torch
from tiny import Family
from tiny_inputs import inputs
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import lorafx
from lorafx.errors import LorafxError, MatchError, ProvenanceError, TargetError

#: (batch, length): length no multiple of the batch, equal to it, a multiple of it.
SHAPES = ((3, 5), (4, 4), (3, 6))
_NOISE_FACTOR = 20

_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.mm,
    }
)

OUTCOMES = {
    "ok": "every batch equals the oracle, mixed batches too",
    "refused": "one adapter a batch equals the oracle; a mixed batch is refused with the reason",
    "unmatched": "LoRA is refused at some modules for any batch, with the reason",
    "wrong": "some batch differs from the oracle",
    "error": "an exception that is not one of lorafx's refusals, or no answer in time",
    "base": "the base model cannot be built small, or run, here, or is another one once Dynamo has "
    "traced it; not counted as tried",
}


def examine(
    family: Family,
    folder: str,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    lowering: str = "reference",
) -> dict[str, Any]:
    """The outcome of one family; `folder` takes its adapters, the first of `shapes` has 3 rows."""
    report: dict[str, Any] = {**named(family), "lowering": lowering}
    try:
        model = tiny.build(family)
        batches = [inputs(model, family.kind, b, t, seed=b) for b, t in shapes]
        with torch.no_grad():
            model(**batches[0])
            batches = [batch for batch in batches if _runs(model, batch)]
        sites = sites_of(model, batches[0])
    except Exception as error:
        return {**report, "outcome": "base", "detail": brief(error)}
    report["modules"] = len(sites.linears)
    report["inputs"] = sorted(batches[0])
    if sites.routed:
        report["routers"], report["experts"] = len(sites.routers), len(sites.experts)
    found = compared(model, batches, f"{folder}/everything", sites, lowering)
    if sites.routed and found["outcome"] in ("refused", "unmatched"):
        report["routing"] = found["detail"]
        sites, model = sites.without_routing(), tiny.build(family)
        found = compared(model, batches, f"{folder}/linears", sites, lowering)
    return {**report, **found}


def named(family: Family) -> dict[str, Any]:
    return {"kind": family.kind, "type": family.model_type, "class": family.class_name}


def compared(
    model: torch.nn.Module,
    batches: Sequence[dict[str, Any]],
    folder: str,
    sites: Sites,
    lowering: str,
) -> dict[str, Any]:
    """Calls of `model` compiled with adapters on `sites`, each compared with the oracle."""
    report: dict[str, Any] = {}
    operators: set[str] = set()
    adapters = oracle.standard_adapters(model, folder, sites.routers, sites.experts)
    reference = oracle.Oracle.of(model, adapters)
    batches = [_independent(reference, batch) for batch in batches]
    base_rows = reference.rows([None] * 3, batches[0])
    with torch.no_grad():
        whole = oracle.tensors(reference.base(**batches[0]))
    report["coupling"] = oracle.difference(whole, base_rows)
    report["effect"] = min(
        oracle.difference(reference.rows([name] * 3, batches[0]), base_rows) for name in adapters
    )
    try:
        note = lorafx.After("outline", partial(_note, operators))
        options = {"lowering": lowering, "passes": {"note": note}}
        compiled = lorafx.compile(model, adapters, options=options)
    except TargetError as error:
        return {**report, "outcome": "unmatched", "detail": brief(error)}
    try:
        worst = 0.0
        for mix, batch in _calls(list(adapters), batches):
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
                if (own := _traced_difference(reference, batch)) > oracle.TOLERANCE:
                    detail = f"torch.compile of the base itself differs from it by {own:.1e}"
                    return {**report, "outcome": "base", "detail": detail}
                return {**report, "outcome": "wrong", "detail": detail}
            worst = max(worst, difference)
        report.setdefault("outcome", "ok")
        report["worst"] = worst
        report["graphs"] = compiled.recompiles
    except MatchError as error:
        report.update(outcome="unmatched", detail=brief(error), refusals=_refusals(compiled))
    report["operators"] = sorted(operators)
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
    batch: Mapping[str, Any],
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


@torch.no_grad()
def _traced_difference(reference: oracle.Oracle, batch: Mapping[str, Any]) -> float:
    """How far the base is from itself once Dynamo has traced it, without a compiler behind."""
    torch._dynamo.reset()
    traced = torch.compile(reference.base, backend="eager")
    return oracle.difference(
        oracle.tensors(traced(**batch)), oracle.tensors(reference.base(**batch))
    )


def _note(operators: set[str], gm: fx.GraphModule, ctx: Any) -> int:
    """Add the names of the operators in a graph with LoRA."""
    operators.update(
        str(node.target)
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    return 0


def _refusals(compiled: lorafx.CompiledModel) -> dict[str, int]:
    """Sites by the reason for which they were refused."""
    found: Counter[str] = Counter()
    for record in compiled._session.backend.records:
        for refusal in record.checks.refusals:
            found[f"{refusal.when}: {refusal.reason[:300]}"] += len(refusal.sites)
    return dict(found)


def failed(family: Family, error: BaseException) -> dict[str, Any]:
    """The report of a family whose examination raised."""
    report = {**named(family), "outcome": "error", "detail": brief(error)}
    if isinstance(error, LorafxError):
        report["trace"] = traceback.format_exc()[-1500:]
    return report


def brief(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{at}: {text[:600]}"


@dataclass(frozen=True)
class Sites:
    """Paths: of modules, or (routers, experts) of parameters."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    routers: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def routed(self) -> bool:
        return bool(self.routers or self.experts)

    def without_routing(self) -> Sites:
        return replace(self, routers=(), experts=())


def sites_of(model: nn.Module, batch: Mapping[str, Any]) -> Sites:
    """What adapters can target in `model`; `batch` are arguments of a forward that uses it."""
    return Sites(
        linears=tuple(oracle.linears(model)),
        embeddings=tuple(oracle.embeddings(model)),
        routers=_routers(model, batch),
        experts=tuple(
            f"{path}.{name}" for path, names in experts_of(model).items() for name in names
        ),
    )


def experts_of(model: nn.Module) -> dict[str, list[str]]:
    """{path: names of its 3-D parameters} of the modules that hold a matrix for each expert."""
    found = {}
    for path, module in model.named_modules():
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3
        ]
        if names and "xpert" in type(module).__name__:
            found[path] = names
    return found


class _Multiplied(TorchFunctionMode):
    """Notes the tensors that are operands of a matrix product, through transposes and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self._kept: list[Tensor] = []  # an address is only itself while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            operands = [item for item in args if isinstance(item, Tensor)]
            self._kept += operands
            self.storages.update(item.untyped_storage().data_ptr() for item in operands)
        return result


def _routers(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, ...]:
    known = {*oracle.linears(model)}
    matrices = {
        f"{path}.weight": module._parameters["weight"]
        for path, module in model.named_modules()
        if path not in known
        and not isinstance(module, nn.Embedding)
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.dim() == 2
    }
    if not matrices:
        return ()
    with _Multiplied() as seen, torch.no_grad():
        model(**batch)
    return tuple(
        name
        for name, weight in matrices.items()
        if weight.untyped_storage().data_ptr() in seen.storages
    )

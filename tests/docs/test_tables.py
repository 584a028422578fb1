"""Tables of the docs that are made from the code, for errors from their docstrings:
EXPECTTEST_ACCEPT=1 writes them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

import lorafx
from lorafx import errors
from lorafx.adapter_store.methods.table import METHODS
from lorafx.integrations.server.settings import Settings
from lorafx.integrations.vllm import plugin
from lorafx.integrations.vllm.patches import PATCHES
from lorafx.kernels.cost.chips import CHIPS
from lorafx.kernels.cost.roofline import GPU_STRATEGIES, Work, estimate
from lorafx.torch_internals import versions
from lorafx.torch_internals.shortcuts import SHORTCUTS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
#: A field's name and text in a docstring; a page that it names.
FIELD = re.compile(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", re.DOTALL | re.MULTILINE)
PAGE = re.compile(r"docs/(\w+\.md)")
END, WAY_OUT = "<!-- end -->", "Way out: "


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in (columns, *rows)]
    return "".join((lines[0], f"|{'---|' * len(columns)}\n", *lines[1:]))


def raised() -> list[type[BaseException]]:
    """The classes of lorafx.errors, in order."""
    known = vars(errors).values()
    return [e for e in known if isinstance(e, type) and issubclass(e, Exception | Warning)]


def told(error: type[BaseException]) -> tuple[str, str]:
    """The cause and the way out."""
    cause, _, way_out = inspect.cleandoc(error.__doc__ or "").partition("\n\n")
    assert way_out.startswith(WAY_OUT), error
    return " ".join(cause.split()), " ".join(way_out.removeprefix(WAY_OUT).split())


def of_errors() -> str:
    bases = {e: ", ".join(f"`{base.__name__}`" for base in e.__bases__) for e in raised()}
    rows = [(f"`{error.__name__}` ({own})", *told(error)) for error, own in bases.items()]
    return table(("error", "cause", "way out"), rows)


def methods() -> str:
    alike: dict[tuple[str, ...], list[str]] = {}
    for m in METHODS:
        against = ["PEFT"] * bool(m.peft_type) + ["LyCORIS's formula"] * m.lycoris
        rank = m.rank if "low rank" in m.form else "—"
        kind = m.form, rank, m.modules, ", ".join(against)
        alike.setdefault(kind, []).append(f"`{m.name}`")
    rows = [(", ".join(names), *about) for about, names in alike.items()]
    return table(("methods", "form", "rank", "at", "tested against"), rows)


def patches() -> str:
    rows = [(f"`{patch.owner}.{patch.name}`", patch.purpose) for patch in PATCHES]
    return table((f"in vLLM {', '.join(plugin.TESTED)}", "what stands there"), rows)


def shortcuts() -> str:
    return table(
        ("shortcut", "without it", "what it saves"),
        [(f"`{name}`", own.replaces, own.gains) for name, own in SHORTCUTS.items()],
    )


def fields_of(cls: type) -> str:
    """The fields of a dataclass, with their defaults and what its docstring says of them."""
    said = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    texts = {m[1]: " ".join(m[2].split()) for m in FIELD.finditer(said)}
    rows = []
    for field in dataclasses.fields(cls):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        text = PAGE.sub(r"[docs/\1](../\1)", texts.pop(field.name)).replace("|", "\\|")
        rows.append((f"`{field.name}`", f"`{default!r}`", text))
    assert not texts
    return table(("field", "default", "what it says"), rows)


def listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}"


def versions_tested() -> str:
    pairs = [f"{torch} (triton {triton})" for torch, triton in versions.TORCH.items()]
    found = {"torch": pairs, "transformers": versions.TRANSFORMERS, "PEFT": versions.PEFT}
    return f"Tested: {'; '.join(f'{name} {listed(known)}' for name, known in found.items())}.\n"


def clients() -> str:
    """What works of what `make test-clients` asked of each client."""
    tried = json.loads((ROOT / "benchmarks" / "results" / "clients.json").read_text())
    checks = {
        **{"text": "text", "stream": "stream", "tools": "tools", "forced": "forced tools"},
        **{"structured": "structured output", "second": "second turn"},
    }
    told = []
    for row in tried["rows"]:
        marks = {name: row.get(check, "–") for check, name in checks.items()}
        fail = [name for name, mark in marks.items() if mark not in ("yes", "–")]
        lack = [name for name, mark in marks.items() if mark == "–"]
        but = f" (fails: {', '.join(fail)})" if fail else ""
        but += f" (has no {', '.join(lack)})" if lack else ""
        told.append(f"{row['client']} {row['version']}{but}")
    node, day = tried["machine"]["node"], tried["machine"]["date"]
    return (
        f"Tried on {day}, those in JavaScript with Node {node}, all of "
        f"{listed([*checks.values()])}: {'; '.join(told)}.\n"
    )


CASE = re.compile(r"(q/k/v|o|gate/up|down) \((\d+), \d+\) M=(\d+) D=(\d+) r=(\d+)")


def predictions() -> str:
    """The cost model beside all that was measured of single linears on a GPU, in microseconds."""
    taken: dict[tuple[str, ...], list[float]] = {}
    results = ROOT / "benchmarks" / "results" / "gpu"
    for path in results.glob("*h200*/linears.json"):
        for entry in json.loads(path.read_text()).values():
            for row in (row for row in entry["rows"] if "median" in row):
                case, arm = CASE.search(row["case"]), row["arm"]
                assert case is not None
                arm = {"A/A": "vendor", "plan": row.get("plan")}.get(arm, arm)
                if arm in ("vendor", *GPU_STRATEGIES):
                    taken.setdefault((*case.groups(), arm), []).append(row["milliseconds"] * 1e3)
    rows = dict[tuple[str, ...], dict[str, str]]()
    times = dict[tuple[str, ...], list[tuple[float, float]]]()
    for (name, k, m, d, r, arm), measured in sorted(taken.items(), key=lambda item: item[0][2:]):
        # "concat" has a block of columns for each of eight requests, whatever these share.
        blocks = max(int(d), 8) if arm == "concat" else int(d)
        columns = {"q/k/v": (4096, 1024, 1024), "gate/up": (14336, 14336)}.get(name, (4096,))
        work = Work(int(k), columns, int(m), blocks, int(r), torch.bfloat16, CHIPS["cuda", 90])
        model = 1e6 * (work.vendor() if arm == "vendor" else estimate(work)[arm].seconds)
        found = statistics.median(measured)
        assert model == pytest.approx(found, rel=0.15), (name, m, arm)
        times.setdefault((name, m, d), []).append((found, model))
        rows.setdefault((m, d, arm), {})[name] = f"{found:.0f}, {model / found:.2f}"
    for pairs in times.values():  # the model has them in the right order
        assert [model for _, model in sorted(pairs)] == sorted(model for _, model in pairs)
    names = ("q/k/v", "o", "gate/up", "down")
    cells = [(*key, *(found.get(name, "") for name in names)) for key, found in rows.items()]
    return table(("rows", "adapters", "strategy", *names), cells)


@pytest.mark.parametrize(
    ("page", "name", "part"),
    [
        ("adapters.md", "methods", methods),
        ("errors.md", "table", of_errors),
        ("guides/vllm.md", "patches", patches),
        ("reference/configuration.md", "lora_config", partial(fields_of, lorafx.LoraConfig)),
        ("reference/configuration.md", "options", partial(fields_of, lorafx.Options)),
        ("kernels.md", "predictions", predictions),
        ("serving.md", "clients", clients),
        ("torch_internals.md", "versions", versions_tested),
        ("torch_internals.md", "shortcuts", shortcuts),
    ],
)
def test_the_page_is_made_from_the_code(page: str, name: str, part: Callable[[], str]) -> None:
    path, begin = ROOT / "docs" / page, f"<!-- {name} -->\n"
    written = path.read_text()
    before, rest = written.split(begin)
    _, end, after = rest.partition(END)
    wanted = f"{before}{begin}{part()}{end}{after}"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(wanted)
    assert written == wanted, "run this test with EXPECTTEST_ACCEPT=1"


def test_the_options_of_the_server_are_all_there_with_their_numbers() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    options = page.partition("### Options\n")[2].partition("\n\nSIGTERM")[0]
    fields = {name.replace("_", "-"): field for name, field in Settings.model_fields.items()}
    told = set(re.findall(r"`--([a-z-]+)`", options))
    assert fields.keys() - {"model", "aliases"} == told | {"adapters"}
    for item in options.split("\n- ")[1:]:
        names, _, rest = item.partition(" (")
        defaults = rest.partition(")")[0].split(", ")
        for name, default in zip(re.findall(r"`--([a-z-]+)`", names), defaults, strict=False):
            if type(number := fields[name].default) in (int, float) and default != "none":
                assert default == f"{number}", name


def test_all_errors_are_public_and_derive_from_the_root() -> None:
    for error in raised():
        assert error.__name__ in lorafx.__all__
        assert issubclass(error, errors.LorafxError | errors.LorafxWarning)


def test_classes_of_other_modules_are_kinds_of_these() -> None:
    """Somebody who handles the page's classes handles all."""
    for module in ("adapter_store", "model", "capture", "runtime", "compiled_model"):
        package = importlib.import_module(f"lorafx.{module}")
        for found in pkgutil.iter_modules(package.__path__, f"lorafx.{module}."):
            for value in vars(importlib.import_module(found.name)).values():
                own = isinstance(value, type) and value.__module__ == found.name
                if own and issubclass(value, errors.LorafxError):
                    assert any(issubclass(value, known) for known in raised()[2:]), value

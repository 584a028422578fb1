"""Another torch than the one that is installed, for lorafx alone: one private name is missing, or a
function takes other arguments.

    python drift.py FOLDER < cases        a process forked for each, its verdict as a line of JSON

The drift is written into the sources of lorafx/torch_internals as they are imported. Classes are
missing or stay what they are, since torch compares them.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import json
import os
import pkgutil
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from private_names import dotted, imported, names_by_module

WAYS = ("missing", "signature")
#: What a case runs, by the module of lorafx/torch_internals that uses the name.
ROADS = {
    **dict.fromkeys(("cpp", "inductor"), "inductor"),
    "saved_graphs": "saved",
    "transformers_parts": "parts",
    "triton_compat": "triton",
}
_LIMIT = 120  # seconds a case
_FOLDER = "lorafx.torch_internals."


def _of_torch(function: Any) -> Any:
    """`function` as code of torch's, for whoever looks at frames."""
    own = {**function.__globals__, "__name__": "torch._drifted"}
    return types.FunctionType(function.__code__, own, function.__name__, None, function.__closure__)


@_of_torch
def _missing(name: str, error: type[Exception]) -> Any:
    raise error(f"there is no {name}")


@_of_torch
def _takes_another(*, that_nobody_passes: Any) -> Any:
    """A function of another signature."""


class _Rewriting(ast.NodeTransformer):
    """The source of one module, with the drift in the places of the name."""

    def __init__(self, name: str, way: str, tree: ast.Module) -> None:
        self.name, self.way, self.meant = name, way, imported(tree)[0]

    def _in_place_of(self, imports: ast.stmt, own: str) -> list[ast.stmt]:
        text = f"_missing({self.name!r}, ImportError)"
        if self.way == "signature":
            return [imports, *ast.parse(f"{own} = _takes_another").body]
        return list(ast.parse(text).body)

    def visit_Import(self, node: ast.Import) -> Any:
        drifts = self.way == "missing" and any(item.name == self.name for item in node.names)
        return self._in_place_of(node, "") if drifts else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        for item in node.names:
            if f"{node.module}.{item.name}" == self.name:
                return self._in_place_of(node, item.asname or item.name)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if dotted(node, self.meant) != self.name or not isinstance(node.ctx, ast.Load):
            return self.generic_visit(node)
        text = f"_missing({self.name!r}, AttributeError)"
        return ast.parse(text if self.way == "missing" else "_takes_another", mode="eval").body


def let_drift(name: str, way: str) -> None:
    """From now on modules of lorafx/torch_internals are imported with the drift."""
    loader: Any = importlib.machinery.SourceFileLoader
    get_code = loader.get_code

    def drifted(self: Any, module: str) -> Any:
        if not module.startswith(_FOLDER):
            return get_code(self, module)
        path = self.get_filename(module)
        tree = ast.parse(self.get_data(path))
        tree = ast.fix_missing_locations(_Rewriting(name, way, tree).visit(tree))
        return compile(tree, path, "exec", dont_inherit=True)

    loader.get_code = drifted
    vars(builtins).update(_missing=_missing, _takes_another=_takes_another)


def names() -> dict[str, list[str]]:
    """Each private name, and the modules of lorafx/torch_internals that use it."""
    found: dict[str, list[str]] = {}
    for module, used in names_by_module().items():
        for name in sorted(used):
            found.setdefault(name, []).append(module)
    return found


def applies(name: str, way: str) -> bool:
    """Whether the name can drift in this way."""
    try:
        value = pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return way == "missing"
    return way == "missing" or (callable(value) and not isinstance(value, type))


# --- what a case runs ---------------------------------------------------------------------------


def _model() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(K, 12), nn.Linear(12, K)

        def forward(self, x: Any) -> Any:
            h = torch.relu(self.up(x))
            h = torch.tanh(h) + h * torch.sigmoid(h)
            return x + self.down(h) * 0.5

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


K = 8
MIXED = ["a", None, "b"]


class Task:
    """The model, two adapters and the answers, made before lorafx is imported."""

    def __init__(self, folder: Path) -> None:
        import oracle
        import torch

        self.folder = folder
        self.base = _model()
        self.x = {
            length: torch.randn(3, length, K, generator=torch.Generator().manual_seed(length))
            for length in (4, 5)
        }
        self.adapters = {
            name: oracle.save_adapter(
                self.base,
                folder / name,
                rank=2 + seed % 2,
                targets=oracle.linears(self.base),
                seed=seed,
            )
            for seed, name in enumerate(("a", "b", "c"))
        }
        self.oracle = oracle.Oracle.of(self.base, self.adapters)

    def model(self) -> Any:
        import copy

        return copy.deepcopy(self.base)

    def check(self, got: Any, names: Sequence[str | None], length: int) -> None:
        import oracle

        difference = oracle.difference([got], self.oracle.rows(names, {"x": self.x[length]}))
        if not difference <= oracle.TOLERANCE:
            raise Wrong(f"{names}, length {length}: off by {difference:.2e}")


class Wrong(BaseException):
    """A call has returned something else than the dense merge."""


def _compiled(task: Task, **options: Any) -> Any:
    import lorafx

    known = {name: task.adapters[name] for name in ("a", "b")}
    cm = lorafx.compile(task.model(), adapters=known, options=options)
    for length in (4, 5):
        task.check(cm(task.x[length], adapter_names=MIXED), MIXED, length)
    return cm


def _call(task: Task) -> None:
    cm = _compiled(task, lowering="reference")
    cm.load_adapter(task.adapters["c"], "c")
    last = ["c", "b", None]
    task.check(cm(task.x[5], adapter_names=last), last, 5)


def _backend(task: Task) -> None:
    import torch

    import lorafx

    known = {name: task.adapters[name] for name in ("a", "b")}
    model = lorafx.attach(task.model(), adapters=known, options={"lowering": "reference"})
    run = torch.compile(model, backend="lorafx")
    for length in (4, 5):
        with torch.no_grad(), lorafx.adapters(model, MIXED):
            task.check(run(task.x[length]), MIXED, length)


def _saved(task: Task) -> None:
    import torch

    folder = task.folder / f"graphs_{os.getpid()}"
    _compiled(task, lowering="inductor", cache=str(folder))
    torch._dynamo.reset()
    _compiled(task, lowering="inductor", cache=str(folder))


def _triton(task: Task) -> None:
    from lorafx.torch_internals import inductor, triton_compat
    from lorafx.torch_internals.shortcuts import chosen
    from lorafx.torch_internals.versions import entrance

    with entrance():  # as the calls of models are that ask for these
        if "early_launches" in chosen():
            inductor.launch_dependents_early()
        triton_compat.launches_directly()
    _compiled(task, lowering="triton")


def _parts(task: Task) -> None:
    import transformers

    from lorafx.torch_internals import transformers_parts

    transformers_parts.causal_model_class(transformers.LlamaConfig())


def run(task: Task, road: str) -> None:
    """Raises Wrong where an answer is, and whatever else lorafx raises."""
    if road == "parts":
        _parts(task)
    elif road == "triton":
        _triton(task)
    elif road == "saved":
        _saved(task)
    elif road == "inductor":
        _compiled(task, lowering="inductor")
    else:
        _call(task)
        _backend(task)


def verdict(task: Task, name: str, way: str, road: str) -> dict[str, Any]:
    """What became of one case, in this process, which has not imported lorafx."""
    warnings.simplefilter("ignore")
    let_drift(name, way)
    said: dict[str, Any] = {"name": name, "way": way, "road": road}
    try:
        run(task, road)
    except Wrong as error:
        said |= {"verdict": "wrong", "text": str(error)}
    except Exception as error:
        from lorafx.errors import LorafxError

        text = str(error)
        explained = isinstance(error, LorafxError) and _names_version(text)
        said |= {
            "verdict": "refused" if explained else "raw",
            "text": f"{type(error).__name__}: {text}",
            "trace": "".join(traceback.format_exception(error)),
        }
    else:
        said["verdict"] = "right"
    return said


def _names_version(text: str) -> bool:
    """Whether an error names torch's version and a way out."""
    import torch

    ways_out = ("pip install", "To serve it nevertheless")
    return torch.__version__.split("+")[0] in text and any(way in text for way in ways_out)


def warm_up() -> None:
    """Import what every case needs, so that a case is a fork and not an import."""
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch._inductor.cpp_builder
    import torch._inductor.lowering
    import transformers  # noqa: F401

    model = _model()
    with torch.no_grad():
        torch.compile(model, backend="aot_eager", dynamic=True)(torch.randn(3, 4, K))
    torch._dynamo.reset()


def forked(task: Task, case: Mapping[str, str]) -> dict[str, Any]:
    """The verdict of a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.alarm(_LIMIT)
        try:
            said = verdict(task, case["name"], case["way"], case["road"])
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            said = {**case, "verdict": "raw", "text": repr(error), "trace": trace}
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(said))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {**case, "verdict": "raw", "text": f"it died: {status}"}


def main() -> None:
    assert not any(name.partition(".")[0] == "lorafx" for name in sys.modules)
    sys.path.append(str(Path(__file__).parents[1] / "conformance"))
    task = Task(Path(sys.argv[1]))
    cases = json.load(sys.stdin)
    warm_up()
    for case in cases:
        print(json.dumps(forked(task, case)), flush=True)


if __name__ == "__main__":
    main()

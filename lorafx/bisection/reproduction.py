"""A program that shows a difference, with all that it needs beside it.

repro.py     compiles, merges, compares, and bisects again
model/, model.pt     as transformers saves it, else a pickle
adapters/    a folder or a file each
case.pt      configuration, options, inputs, names of adapters
passes.pt, modules/  passes of the user's own, and the sources that they and the model come from
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafx.adapter_store.config_values import CONFIG_FILE
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_writer import write_peft
from lorafx.adapter_store.saved import AdapterState
from lorafx.bisection.result import Bisection
from lorafx.config import After
from lorafx.errors import ConfigError
from lorafx.model.marks import MARKS
from lorafx.serving.compiled import CompiledModel

_SCRIPT = '''"""{about}

Run it with lorafx installed: python {name}. It exits with 1 where the difference is there.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "modules"))

import torch
from torch.utils import _pytree as pytree

import lorafx

case = torch.load(HERE / "case.pt", weights_only=False)
{model}
passes = {passes}
adapters = {{
    name: lorafx.AdapterSource(HERE / place, **own)
    for name, (place, own) in case["adapters"].items()
}}
cm = lorafx.compile(
    model, case["config"], adapters=adapters, options={{**case["options"], "passes": passes}}
)
inputs, names = case["inputs"], case["names"]


def outputs(result):
    leaves = pytree.tree_leaves(result)
    return [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and len(leaf) == len(names)
    ]


with torch.no_grad():
    got = outputs(cm(**inputs, adapter_names=names))
    for row, name in enumerate(names):
        if name is not None:
            cm.merge(name)
        want = outputs(cm.model(**inputs))
        if name is not None:
            cm.unmerge()
        difference = max(float((a[row] - b[row]).abs().max()) for a, b in zip(got, want))
        print(f"row {{row}}, {{name or 'the base'}}: {{difference:.3g}} from W + ΔW")

found = lorafx.bisect(cm, inputs, names, tolerance={tolerance!r})
print(found)
sys.exit(0 if found.first is None else 1)
'''

#: What an adapter's files may leave to be said.
_SAID = ("config", "dialect", "component", "key_mapping")
#: What a pickle of the model, an adapter or a pass may fail by.
_UNPICKLABLE = (pickle.PicklingError, TypeError, AttributeError, ImportError)


def write(
    folder: Path,
    compiled: CompiledModel,
    inputs: Mapping[str, Any],
    names: Sequence[str | None],
    found: Bisection,
) -> Path:
    """Write the program into `folder`, and return its path.

    Raises:
        ConfigError: the model, an adapter or a pass cannot be written: each has to come from files
            or be importable.
    """
    program = compiled._session.program
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: p for name, p in program.options.passes.items() if isinstance(p, After)}
    switched = {name: p for name, p in program.options.passes.items() if name not in own}
    left_out = ("passes", "cache", "dump", "verify")
    options = {
        item.name: getattr(program.options, item.name)
        for item in fields(program.options)
        if item.name not in left_out
    }
    case = {
        "config": program.config,
        "options": options,
        "inputs": dict(inputs),
        "names": list(names),
        "adapters": _adapters(folder, compiled, names),
    }
    _save(folder / "case.pt", case, "the configuration or the inputs")
    passes = repr(switched)
    if own:
        for given in own.values():
            _carry(folder, given.run)
        _save(folder / "passes.pt", own, "a pass of your own")
        passes = f'{{**{switched!r}, **torch.load(HERE / "passes.pt", weights_only=False)}}'
    script = folder / "repro.py"
    script.write_text(
        _SCRIPT.format(
            about=str(found).splitlines()[0].replace("\\", "/").replace('"""', "'''"),
            name=script.name,
            model=_model(folder, program.model),
            passes=passes,
            tolerance=found.tolerance,
        )
    )
    return script


def _model(folder: Path, model: nn.Module) -> str:
    """Write the model, and return the lines that load it."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        cls = type(model)
        if getattr(transformers, cls.__name__, None) is cls:
            model.save_pretrained(folder / "model")
            dtype = str(next(model.parameters()).dtype)
            return (
                f"from transformers import {cls.__name__}\n\n"
                f'model = {cls.__name__}.from_pretrained(HERE / "model", dtype={dtype}).eval()'
            )
    _carry(folder, *(type(module) for module in model.modules()))
    _save(folder / "model.pt", _unmarked(model), "the model")
    return 'model = torch.load(HERE / "model.pt", weights_only=False)'


def _unmarked(model: nn.Module) -> nn.Module:
    """A copy without marks."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    made = copy.deepcopy(model, {id(hook): hook for hook in hooks if isinstance(hook, MARKS)})
    for module in made.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, MARKS):
                for held in (module._forward_hooks, module._forward_hooks_with_kwargs):
                    held.pop(key, None)
    return made


def _adapters(
    folder: Path, compiled: CompiledModel, names: Sequence[str | None]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Write the adapters that the batch names. Returns where each lies in `folder`, and what its
    files do not say."""
    store = compiled._session.store
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, name in enumerate(dict.fromkeys(name for name in names if name is not None)):
        stored, place = store[name], Path("adapters") / str(number)
        said: dict[str, Any] = {}
        if stored.origin is not None:
            own = stored.origin.source
            said = {key: getattr(own, key) for key in _SAID if getattr(own, key) is not None}
        path = stored.origin.path if stored.origin is not None else Path(stored.source)
        if path.is_dir():
            shutil.copytree(path, folder / place)
        elif path.is_file():
            (folder / place).mkdir(parents=True)
            beside = path.parent / CONFIG_FILE
            for file in [path, *([beside] if beside.is_file() else [])]:
                shutil.copy(file, folder / place / file.name)
            place /= path.name
        else:
            write_peft(_state(compiled, name), folder / place)
        found[name] = str(place), said
    return found


def _state(compiled: CompiledModel, name: str) -> AdapterState:
    """An adapter that came from no file, from its numbers.

    Raises:
        ConfigError: it has more than factors of linears.
    """
    session = compiled._session
    stored = session.store[name]
    numbers, groups = session.store.numbers(name), session.program.groups
    tensors, scales = dict[str, Any](), dict[str, float]()
    plain = not (stored.rescaled or stored.owned or stored.shifted or stored.invocation)
    for index, factors in numbers.factors.items():
        group = groups[index]
        for own in factors:
            site = group.site_of(own.sibling)
            plain = plain and site.eligible.is_linear
            path = site.part_path(own.sibling - group.firsts[group.sites.index(site)])
            if plain:
                tensors[f"{path}.lora_A.weight"] = own.A.contiguous()
                tensors[f"{path}.lora_B.weight"] = own.B.T.contiguous()
                scales[path] = float(own.scale)
    if not plain:
        raise ConfigError(
            f"adapter {name!r} came from memory ({stored.source}), and has more than factors of "
            "linears; load it from a folder, so that a reproduction can have its files"
        )
    fields = {"peft_type": "LORA", "r": stored.rank, "target_modules": sorted(scales)}
    return AdapterState(PeftConfig.read(fields), tensors, name, scales, dialect="memory")


def _save(path: Path, value: Any, what: str) -> None:
    try:
        torch.save(value, path)
    except _UNPICKLABLE as error:
        raise ConfigError(
            f"{what} cannot be written for a reproduction ({error}): what it is made of has to be "
            "at the top level of a module that can be imported"
        ) from error


def _carry(folder: Path, *made: Any) -> None:
    """Copy the sources of modules that are no part of an installed package.

    Raises:
        ConfigError: one is the program that is running, which a pickle cannot name.
    """
    for name in dict.fromkeys(_modules(made)):
        module = sys.modules[name]
        if name == "__main__":
            raise ConfigError(
                "what is defined in the program that runs, or in a notebook, cannot be found by "
                "another program; put models and passes into a module of their own"
            )
        file = getattr(module, "__file__", None)
        if file is None or _installed(Path(file)):
            continue
        target = (folder / "modules").joinpath(*name.split("."))
        if importlib.util.find_spec(name) is not None and Path(file).name == "__init__.py":
            target /= "__init__"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target.with_suffix(".py"))


def _modules(made: Sequence[Any]) -> Iterator[str]:
    for item in made:
        own = item if hasattr(item, "__module__") else type(item)
        if own.__module__ in sys.modules:
            yield own.__module__
        receiver = getattr(item, "__self__", None)
        if receiver is not None:
            yield type(receiver).__module__


def _installed(file: Path) -> bool:
    homes = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots = [Path(home).resolve() for home in homes if home]
    roots.append(Path(__file__).resolve().parents[1])  # lorafx itself
    return any(root in file.resolve().parents for root in roots)

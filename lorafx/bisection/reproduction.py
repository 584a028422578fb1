"""A self-contained program that shows a difference.

repro.py     compiles and bisects again
case.pt      the model, its configuration and options, inputs, names of adapters
adapters/    a folder or a file each
modules/     the sources of the model's classes, and of users' passes
"""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafx.adapter_store.config_values import CONFIG_FILE
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

import torch

import lorafx

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "modules"))
case = torch.load(here / "case.pt", weights_only=False)
adapters = {{
    name: lorafx.AdapterSource(here / place, **own)
    for name, (place, own) in case["adapters"].items()
}}
cm = lorafx.compile(case["model"], case["config"], adapters=adapters, options=case["options"])
found = lorafx.bisect(cm, case["inputs"], case["names"], tolerance=case["tolerance"])
print(found)
sys.exit(0 if found.first is None else 1)
'''

#: Settings that an adapter's files may lack.
_SAID = ("config", "dialect", "component", "key_mapping")


def write(
    folder: Path,
    compiled: CompiledModel,
    inputs: Mapping[str, Any],
    names: Sequence[str | None],
    found: Bisection,
) -> Path:
    """Write the program into `folder`, and return its path. Raises ConfigError for an unpicklable
    model or pass, or an adapter without file."""
    program = compiled._session.program
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        item.name: getattr(program.options, item.name)
        for item in fields(program.options)
        if item.name not in ("cache", "dump", "verify")
    }
    case = {
        "model": _unmarked(program.model),
        "config": program.config,
        "options": {**options, "passes": dict(program.options.passes)},
        "inputs": dict(inputs),
        "names": list(names),
        "tolerance": found.tolerance,
        "adapters": {
            name: _adapter(folder, f"adapters/{number}", compiled, name)
            for number, name in enumerate(dict.fromkeys(filter(None, names)))
        },
    }
    passes = [item.run for item in program.options.passes.values() if isinstance(item, After)]
    _carry(folder / "modules", [*map(type, program.model.modules()), *passes])
    try:
        torch.save(case, folder / "case.pt")
    except (pickle.PicklingError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"the case cannot be written for a reproduction ({error}): models and passes have to "
            "be at the top level of a module that can be imported"
        ) from error
    script = folder / "repro.py"
    about = found.heading.replace("\\", "/").replace('"""', "'''")
    script.write_text(_SCRIPT.format(about=about, name=script.name))
    return script


def _unmarked(model: nn.Module) -> nn.Module:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    made = copy.deepcopy(model, {id(hook): hook for hook in hooks if isinstance(hook, MARKS)})
    for module in made.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, MARKS):
                for held in (module._forward_hooks, module._forward_hooks_with_kwargs):
                    held.pop(key, None)
    return made


def _adapter(
    folder: Path, place: str, compiled: CompiledModel, name: str
) -> tuple[str, dict[str, Any]]:
    """Copy an adapter's files; returns their place in `folder`, and settings that they lack."""
    stored, said = compiled._session.store[name], dict[str, Any]()
    path = Path(stored.source)
    if stored.origin is not None:
        source, path = stored.origin.source, stored.origin.path
        said = {key: getattr(source, key) for key in _SAID if getattr(source, key) is not None}
    if path.is_dir():
        shutil.copytree(path, folder / place)
        return place, said
    if not path.is_file():
        raise ConfigError(
            f"adapter {name!r} came from memory ({stored.source}); load it from a folder, so that "
            "a reproduction can have its files"
        )
    (folder / place).mkdir(parents=True)
    for file in (path, path.parent / CONFIG_FILE):
        if file.is_file():
            shutil.copy(file, folder / place / file.name)
    return f"{place}/{path.name}", said


def _carry(target: Path, made: Sequence[Any]) -> None:
    """Copy sources outside installed packages; ConfigError for the running program's."""
    homes = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = [Path(home).resolve() for home in homes] + [Path(__file__).resolve().parents[1]]
    for name in dict.fromkeys(item.__module__ for item in made):
        file = getattr(sys.modules.get(name), "__file__", None)
        if name == "__main__":
            raise ConfigError(
                "what is defined in the program that runs, or in a notebook, cannot be found by "
                "another program; put models and passes into a module of their own"
            )
        if file is None or any(home in Path(file).resolve().parents for home in installed):
            continue
        parts = [*name.split("."), *(["__init__"] if Path(file).stem == "__init__" else [])]
        copied = target.joinpath(*parts).with_suffix(".py")
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)

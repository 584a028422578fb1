"""A program that shows a difference: `repro.py`, and `case.pt` with the model, its options, inputs
and adapters. Classes of the model and users' passes are imported."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from lorafx.adapter_store.saved import AdapterSource, opened
from lorafx.adapter_store.stored import StoredAdapter
from lorafx.bisection.result import Bisection
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.config import After
from lorafx.errors import ConfigError
from lorafx.model.marks import detach

_SCRIPT = '''"""{about}

Run it with lorafx installed: python {name}. It exits with 1 where the difference is there.
"""

import sys
from pathlib import Path

import torch

import lorafx

sys.path += {paths}  # where the model's classes and passes were imported from
case = torch.load(Path(__file__).with_name("case.pt"), weights_only=False)
found = lorafx.bisect(lorafx.compile(**case["compile"]), **case["bisect"])
print(found)
sys.exit(0 if found.first is None else 1)
'''


def write(
    folder: Path,
    compiled: CompiledModel,
    inputs: Mapping[str, Any],
    names: Sequence[str | None],
    found: Bisection,
) -> Path:
    """Write the program into `folder`, and return its path. Raises ConfigError for an unpicklable
    model or pass, or an adapter without file."""
    program, store = compiled._session.program, compiled._session.store
    options = {
        item.name: getattr(program.options, item.name)
        for item in fields(program.options)
        if item.name not in ("cache", "dump", "verify")
    }
    passes = [item.run for item in program.options.passes.values() if isinstance(item, After)]
    if any(
        item.__module__ == "__main__" for item in (*map(type, program.model.modules()), *passes)
    ):
        raise ConfigError(
            "what is defined in the program that runs, or in a notebook, cannot be found by "
            "another program; put models and passes into a module of their own"
        )
    model = copy.deepcopy(program.model)
    detach(model)
    case = {
        "compile": {
            "model": model,
            "lora_config": program.config,
            "adapters": {name: _adapter(store[name]) for name in names if name is not None},
            "options": {**options, "passes": dict(program.options.passes)},
        },
        "bisect": {
            "inputs": dict(inputs),
            "adapter_names": list(names),
            "tolerance": found.tolerance,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(case, folder / "case.pt")
    except (pickle.PicklingError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"the case cannot be written for a reproduction ({error}): models and passes have to "
            "be at the top level of a module that can be imported"
        ) from error
    script = folder / "repro.py"
    about = found.heading.replace("\\", "/").replace('"""', "'''")
    paths = [str(Path(path).absolute()) for path in sys.path]
    script.write_text(_SCRIPT.format(about=about, name=script.name, paths=paths))
    return script


def _adapter(stored: StoredAdapter) -> AdapterSource:
    """The adapter with what its files hold."""
    source = stored.origin or AdapterSource(stored.source)
    if stored.origin is None and not Path(stored.source).exists():
        raise ConfigError(
            f"adapter {stored.name!r} came from memory ({stored.source}); load it from a folder, "
            "so that a reproduction can have its files"
        )
    saved = opened(source)
    return replace(source, source=replace(saved, tensors=dict(saved.tensors), origin=None))

"""`lorafx doctor`: versions, private ground, shortcuts, and a small mixed batch.

It runs where lorafx does not: only the batch and the compiler need a version that is supported.

    y[b] = f(x[b]; W + s·B A of names[b])    for two adapters and the base, each row alone
"""

from __future__ import annotations

import copy
import importlib
import logging
import pkgutil
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

import lorafx
from lorafx import __version__, torch_internals
from lorafx.errors import LorafxError, UnsupportedVersionError
from lorafx.inspection.report import json_values, text_table
from lorafx.integrations.cli.options import AsJson, show
from lorafx.progress import LOG, progress
from lorafx.torch_internals import shortcuts, versions

#: Largest difference in float32, relative to the largest of 1 and the expected magnitude.
TOLERANCE = 1e-5
_NAMES = ("first", None, "second")
_RANKS = {"first": 4, "second": 2}
_SCALE = 2.0


def doctor(as_json: AsJson = False) -> None:
    """Show versions, the private parts of torch that lorafx needs and those that make it faster,
    and compare a small mixed batch with each adapter merged by itself.

    Nothing is downloaded. Exits with 1 where something is wrong, and says what.

    Example: lorafx doctor
    """
    level = LOG.level
    LOG.setLevel(logging.ERROR)  # what the log would say is in the report
    try:
        found = diagnosed()
    finally:
        LOG.setLevel(level)
    show(found, as_json)
    if found.faults:
        raise typer.Exit(1)


@dataclass(frozen=True)
class SmallBatch:
    """The class of the model, the device, the largest relative difference from dense merge, and the
    seconds with compiling."""

    model: str
    device: str
    difference: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.device}, two adapters and the base: largest difference from "
            f"dense merge {self.difference:.1e}, {self.seconds:.1f} s with compiling"
        )


@dataclass
class Diagnosis:
    """All that was found: `required` parts of torch "holds", or what they lack. `faults` are
    sentences; without any, everything holds."""

    installed: dict[str, str] = field(default_factory=dict)
    required: dict[str, str] = field(default_factory=dict)
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    batch: SmallBatch | None = None
    faults: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json_values({"holds": not self.faults, **asdict(self)})
        return found

    def __str__(self) -> str:
        states = [
            (name, state if state == "on" else f"off: {state}")
            for name, state in self.shortcuts.items()
        ]
        parts = [
            text_table(("installed", ""), self.installed.items()),
            text_table(("required", ""), self.required.items()),
            text_table(("shortcuts", ""), states),
            [f"mixed batch: {self.batch or 'not run'}"],
            [f"wrong: {text}" for text in self.faults] or ["everything holds"],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)


def diagnosed() -> Diagnosis:
    """Look at this machine. Nothing is raised for what is wrong with it."""
    found = Diagnosis()
    with _noting(found):
        versions.check()
    supported = not found.faults
    with progress("looking at torch"):
        for module in pkgutil.iter_modules(torch_internals.__path__) if supported else ():
            _require(module.name, found)
        found.installed = _installed(supported)
    if found.installed["C++ compiler"] == found.installed["GPU"] == "none":
        found.faults.append("no C++ compiler was found: install g++ or clang, or name it in CXX")
    with _noting(found):
        found.shortcuts = shortcuts.states()
        if supported:
            with progress("compiling a small mixed batch"):
                found.batch = run_small_batch()
    if found.batch is not None and not found.batch.difference <= TOLERANCE:  # or NaN
        found.faults.append("the mixed batch is not what dense merge gives: please report it")
    return found


@contextmanager
def _noting(found: Diagnosis) -> Iterator[None]:
    """An error inside is a fault."""
    try:
        yield
    except LorafxError as error:
        found.faults.append(str(error))
    except Exception as error:  # of any library: the report has to be made
        found.faults.append(f"{type(error).__name__}: {error}")


def _require(module: str, found: Diagnosis) -> None:
    state = "holds"
    try:
        importlib.import_module(f"{torch_internals.__name__}.{module}")
    except UnsupportedVersionError as error:
        state = str(error)
        found.faults.append(f"{module}: {error}")
    except ModuleNotFoundError as error:
        state = f"{error.name} is not installed"
    found.required[module] = state


def _installed(supported: bool) -> dict[str, str]:
    """Versions, the compiler, which is looked for where lorafx runs, and the GPU."""
    packages = ("torch", "triton", "transformers", "peft")
    found = {
        "lorafx": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: versions.standing(package) for package in packages},
        "C++ compiler": "not looked for",
        "GPU": "none",
    }
    if versions.installed("torch") is None:
        return found
    import torch

    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    if supported:
        from lorafx.kernels.cpu.compiler import find_compiler, version_of

        try:
            compiler = find_compiler()
            found["C++ compiler"] = (version_of(compiler).splitlines() or [compiler])[0]
        except LorafxError:
            found["C++ compiler"] = "none"
    return found


def run_small_batch() -> SmallBatch:
    """Compile the model and its adapters, and compare one batch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _model().to(device).eval()
        ids = torch.randint(3, 61, (len(_NAMES), 5), device=device)
        made = {name: _adapter(model, rank) for name, rank in _RANKS.items()}
        alone = [made[name][1] if name else model for name in _NAMES]
        rows = [_logits(merged(ids[row : row + 1])) for row, merged in enumerate(alone)]
        start = time.perf_counter()
        adapters = {name: source for name, (source, _) in made.items()}
        got = _logits(lorafx.compile(model, adapters)(ids, adapter_names=list(_NAMES)))
        seconds, want = time.perf_counter() - start, torch.cat(rows)
        difference = float((got - want).abs().max() / want.abs().max().clamp(min=1))
    return SmallBatch(type(model).__name__, device, difference, seconds)


def _model() -> Any:
    """A Llama of one layer; without transformers a few layers of torch's."""
    from torch import nn

    if versions.installed("transformers") is None:
        layers = (nn.Embedding(61, 24), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 61))
        return nn.Sequential(*layers)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        vocab_size=61,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _adapter(model: Any, rank: int) -> tuple[Any, Any]:
    """A random adapter for all linears, and a copy of the model with it in its weights."""
    import torch

    merged, tensors = copy.deepcopy(model), {}
    linears = {path: m for path, m in merged.named_modules() if isinstance(m, torch.nn.Linear)}
    for path, linear in linears.items():
        a = torch.randn(rank, linear.in_features).to(linear.weight) / linear.in_features**0.5
        b = torch.randn(linear.out_features, rank).to(linear.weight) / rank**0.5
        linear.weight += _SCALE * b @ a
        for letter, factor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = factor.cpu()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": _SCALE * rank}
    return lorafx.AdapterSource(tensors, {**config, "target_modules": list(linears)}), merged


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)

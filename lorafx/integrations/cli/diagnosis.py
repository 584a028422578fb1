"""`lorafx doctor`: versions, the private parts of torch, shortcuts, and a small mixed batch.

It also runs with versions that lorafx does not support, but without the batch, which is

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
    LOG.setLevel(logging.ERROR)  # the report has what the log would say
    try:
        diagnosis = diagnosed()
    finally:
        LOG.setLevel(level)
    show(diagnosis, as_json)
    if diagnosis.faults:
        raise typer.Exit(1)


@dataclass(frozen=True)
class SmallBatch:
    """The class of the model, the device, the largest relative difference from dense merge, and the
    time with compiling in seconds."""

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
    """The report. `required` has "holds" or the problem for each module of private parts. `faults`
    has a sentence for each thing that is wrong."""

    installed: dict[str, str] = field(default_factory=dict)
    required: dict[str, str] = field(default_factory=dict)
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    batch: SmallBatch | None = None
    faults: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json_values({"holds": not self.faults, **asdict(self)})
        return values

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
    """Diagnose this machine. No error is raised for what is wrong with it."""
    diagnosis = Diagnosis()
    with _errors_as_faults(diagnosis):
        versions.check()
    supported = not diagnosis.faults
    with progress("looking at torch"):
        for module in pkgutil.iter_modules(torch_internals.__path__) if supported else ():
            _import_private_parts(module.name, diagnosis)
        diagnosis.installed = _installed(supported)
    if diagnosis.installed["C++ compiler"] == diagnosis.installed["GPU"] == "none":
        fault = "no C++ compiler was found: install g++ or clang, or name it in CXX"
        diagnosis.faults.append(fault)
    with _errors_as_faults(diagnosis):
        diagnosis.shortcuts = shortcuts.states()
        if supported:
            with progress("compiling a small mixed batch"):
                diagnosis.batch = run_small_batch()
    if diagnosis.batch is not None and not diagnosis.batch.difference <= TOLERANCE:  # or NaN
        diagnosis.faults.append("the mixed batch is not what dense merge gives: please report it")
    return diagnosis


@contextmanager
def _errors_as_faults(diagnosis: Diagnosis) -> Iterator[None]:
    try:
        yield
    except LorafxError as error:
        diagnosis.faults.append(str(error))
    except Exception as error:  # of any library: the report has to be made
        diagnosis.faults.append(f"{type(error).__name__}: {error}")


def _import_private_parts(module: str, diagnosis: Diagnosis) -> None:
    state = "holds"
    try:
        importlib.import_module(f"{torch_internals.__name__}.{module}")
    except UnsupportedVersionError as error:
        state = str(error)
        diagnosis.faults.append(f"{module}: {error}")
    except ModuleNotFoundError as error:
        state = f"{error.name} is not installed"
    diagnosis.required[module] = state


def _installed(supported: bool) -> dict[str, str]:
    """Versions, the GPU, and the compiler, which is only looked for if torch is `supported`."""
    packages = ("torch", "triton", "transformers", "peft")
    rows = {
        "lorafx": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{package: versions.standing(package) for package in packages},
        "C++ compiler": "not looked for",
        "GPU": "none",
    }
    if versions.installed("torch") is None:
        return rows
    import torch

    if torch.cuda.is_available():
        rows["GPU"] = torch.cuda.get_device_name()
    if supported:
        from lorafx.kernels.cpu.compiler import find_compiler, version_of

        try:
            compiler = find_compiler()
            rows["C++ compiler"] = (version_of(compiler).splitlines() or [compiler])[0]
        except LorafxError:
            rows["C++ compiler"] = "none"
    return rows


def run_small_batch() -> SmallBatch:
    """Compile a small model with two adapters, and compare one batch with dense merge."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _model().to(device).eval()
        ids = torch.randint(3, 61, (len(_NAMES), 5), device=device)
        pairs = {name: _adapter_and_merged(model, rank) for name, rank in _RANKS.items()}
        models = [pairs[name][1] if name else model for name in _NAMES]
        rows = [_logits(merged(ids[row : row + 1])) for row, merged in enumerate(models)]
        start = time.perf_counter()
        adapters = {name: source for name, (source, _) in pairs.items()}
        got = _logits(lorafx.compile(model, adapters)(ids, adapter_names=list(_NAMES)))
        seconds, want = time.perf_counter() - start, torch.cat(rows)
        difference = float((got - want).abs().max() / want.abs().max().clamp(min=1))
    return SmallBatch(type(model).__name__, device, difference, seconds)


def _model() -> Any:
    """A Llama of one layer; a few layers of torch's if transformers is not installed."""
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


def _adapter_and_merged(model: Any, rank: int) -> tuple[Any, Any]:
    """A random adapter for all linears, and a copy of the model with the adapter merged."""
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

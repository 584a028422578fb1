"""The key of saved graphs, and what their inputs are.

`entry_key` hashes all that a graph depends on: versions and lorafx's sources; the machine; settings
of torch, environment variables, Options and LoraConfig; the model's modules with code, hooks,
attributes and tensors (sizes and sharing, not numbers); sites, banks, packs; the compiled function.
`SavedInputs` records what each input is to the model, which no guard of torch says.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lorafx.capture.compilation import Compilation
from lorafx.capture.saved_graphs.fingerprints import Fingerprints, Undescribed, digest
from lorafx.capture.saved_graphs.guards import value_at
from lorafx.config import IMPORTED
from lorafx.model.module_graph import storage_key
from lorafx.program.argument_roles import Role
from lorafx.program.inputs import FrameInput
from lorafx.program.program import Program
from lorafx.registry import registrations
from lorafx.torch_internals.compat import dynamo_config, functorch_config, inductor_config
from lorafx.torch_internals.dynamo import Source
from lorafx.torch_internals.saved_graphs import TensorProperty, TensorPropertySource

_SOURCES = ("lorafx", "lorafx.passes", "lorafx.kernels")
#: Prefixes of environment variables that torch and its libraries read.
_READ_BY_TORCH = ("TORCH", "PYTORCH", "TRITON", "OMP_", "KMP_", "MKL_", "ATEN_", "CUDA_")
#: Options that change no graph: where graphs and dumps are, and when graphs are made.
_NOT_OF_GRAPHS = ("cache", "dump", "start", "fallback")

#: Kinds of inputs that their place identifies, unlike results of other graphs and views of weights.
_KNOWN_BY_PLACE = ("symbol", "weight", "state", "bank", "slots", "packed", "argument")


@cache
def own_sources() -> str:
    """A hash of lorafx's files. Raises Undescribed if one has changed since lorafx was imported."""
    hashed = hashlib.sha256()
    for package in _SOURCES:
        root = Path(str(resources.files(package)))
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                if path.stat().st_mtime > IMPORTED:
                    raise Undescribed(f"{path} was written after this process had read it")
                hashed.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return hashed.hexdigest()


@cache
def machine() -> str:
    """The processor, its features, and the versions of installed packages."""
    features = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(errors="replace").splitlines()
        relevant = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        features = "\n".join(sorted(relevant))
    # Folders inside of packages hold their copies of others: setuptools adds its own when imported.
    folders = [Path(folder) for folder in sys.path if folder]
    packages = sorted(
        path.name
        for folder in folders
        if folder.is_dir() and not (folder.parent / "__init__.py").exists()
        for path in folder.glob("*-info")
    )
    return digest(
        (
            *(sys.version, platform.platform(), features, torch.__version__),
            *(str(torch.version.git_version), torch.backends.cpu.get_cpu_capability()),
            *packages,
        )
    )


def entry_key(program: Program, entry: Mapping[str, Any]) -> str:
    """The key of an entry of a program as everything is now. Raises Undescribed if it has none."""
    prints = Fingerprints({program.runtime._key: "<slots>"})
    options = {k: v for k, v in vars(program.options).items() if k not in _NOT_OF_GRAPHS}
    texts = [
        *(own_sources(), machine(), str(torch.get_num_threads()), str(torch.get_default_dtype())),
        *_setting_texts(prints),
        prints.loosely(options),
        prints.loosely(replace(program.config, scaled_pair=None)),
        prints.loosely(dict(entry)),
        prints.loosely(registrations()),
        *_module_texts(program, prints),
        *_program_texts(program, prints),
    ]
    return digest(texts)


def _setting_texts(prints: Fingerprints) -> Iterator[str]:
    # torch's own hash of its settings depends on the order of sets, which differs by process.
    for config in (dynamo_config, functorch_config, inductor_config):
        values = config.save_config_portable(ignore_private_configs=False)
        for name in sorted(values.keys() - config._compile_ignored_keys):
            yield f"{name}={prints.of(values[name])}"  # Undescribed for custom passes
    yield f"{torch.backends.mkldnn.enabled} {torch.get_float32_matmul_precision()}"
    for name in sorted(os.environ):
        if name.startswith(_READ_BY_TORCH) and not name.endswith("CACHE_DIR"):
            yield f"{name}={os.environ[name]}"


def _module_texts(program: Program, prints: Fingerprints) -> Iterator[str]:
    module_numbers: dict[int, int] = {}
    tensor_numbers: dict[int, int] = {}
    memory_numbers: dict[Any, int] = {}

    def tensor(value: Tensor) -> str:
        number = tensor_numbers.setdefault(id(value), len(tensor_numbers))
        storage = memory_numbers.setdefault(storage_key(value), len(memory_numbers))
        offset = value.storage_offset() if value.layout is torch.strided else ""
        strides = value.stride() if value.layout is torch.strided else ""
        shape = f"{tuple(value.shape)} {strides} at {offset} of {storage}"
        return f"{prints.tensor(value)} {shape} object {number}"

    for path, module in program.model.named_modules(remove_duplicate=False):
        number = module_numbers.setdefault(id(module), len(module_numbers))
        yield f"{path} {number} {prints.of_class(type(module))}"
        for name, value in vars(module).items():
            if name == "_modules":
                children = {key: child is None for key, child in value.items()}
                yield f"{name} {children}"
            elif name in ("_parameters", "_buffers"):
                for key, item in value.items():
                    yield f"{key} {tensor(item) if isinstance(item, Tensor) else item}"
            elif isinstance(value, Tensor):
                known = program.constants.get(id(value))
                constant = known is not None and known() is value
                yield f"{name} {tensor(value)} constant {constant}"
            elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                yield f"{name} {[prints.loosely(hook) for hook in value.values()]}"
            else:
                yield f"{name} {prints.loosely(value)}"


def _program_texts(program: Program, prints: Fingerprints) -> Iterator[str]:
    runtime = program.runtime
    yield repr((runtime.capacity, runtime.device, runtime.graph_passes))
    for site in program.sites:
        yield prints.loosely(site)
    places = {id(site): index for index, site in enumerate(program.sites)}
    for group in program.groups:
        yield repr(([places[id(site)] for site in group.sites], group.offsets, group.firsts))
        bank = group.bank
        tensors = {k: f"{prints.tensor(t)} {_layout_text(t)}" for k, t in bank.tensors.items()}
        yield f"{bank.kind} {bank.experts} {tensors}"
    for packed in program.packed:
        biases = None if packed.bias is None else _layout_text(packed.bias)
        index = program.groups.index(packed.group)
        yield repr((index, _layout_text(packed.weight), biases))


def _layout_text(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"


def can_save(program: Program) -> bool:
    """Whether the key covers all that this program's graphs depend on. It does not for generated
    Triton, numeric checks, custom passes, hooks on all modules, and quantised bases other than
    tensors that wrap others, which say what they are made of."""
    options = program.options
    # PyTorch's hooks on all modules, which Dynamo does not guard.
    global_hooks = (
        value
        for name, value in vars(torch.nn.modules.module).items()
        if name.startswith("_global_forward_") and isinstance(value, dict)
    )
    return (
        program.runtime.device.type == "cpu"
        and options.lowering in ("inductor", "reference")
        and options.verify != "numeric"
        and all(isinstance(value, bool) for value in options.passes.values())
        and program.quantised.are_wrapped
        and all(name in module._parameters for _, module, name in program.stored_experts)
        and not any(global_hooks)
    )


def source_files(codes: Iterable[CodeType]) -> dict[str, str]:
    """Hashes of the files that these code objects come from."""
    names = sorted({code.co_filename for code in codes})
    return {name: hashed for name in names if (hashed := hash_of_file(name)) is not None}


def hash_of_file(name: str) -> str | None:
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@dataclass
class SavedInputs:
    """Where Dynamo finds each input, and a text of what it is. A size is found by its tensor."""

    places: list[Source | None]
    texts: list[str]

    @classmethod
    def of(cls, graph: Compilation, program: Program) -> SavedInputs:
        """Raises Undescribed if an input depends on more than the model and the call."""
        places: list[Source | None] = []
        for item, source in zip(graph.frame.inputs, graph.sources, strict=True):
            if item.kind not in _KNOWN_BY_PLACE or item.derived is not None:
                raise Undescribed(f"{item.label} was made outside of the graph")
            sized = isinstance(source, TensorPropertySource)
            if source is None or (item.counts and not sized):
                raise Undescribed(f"where {item.label} comes from is not known")
            places.append(source if item.kind != "symbol" or sized else None)
        return cls(places, [_input_text(item, program) for item in graph.frame.inputs])

    def hold(self, program: Program, f_locals: dict[str, Any], f_globals: dict[str, Any]) -> bool:
        known, arguments = program.known_tensors(), program.call_arguments()
        seen: dict[Source, Any] = {}
        values: list[Tensor] = []
        for place, text in zip(self.places, self.texts, strict=True):
            if place is None:
                continue
            if isinstance(place, TensorPropertySource):
                whole = value_at(place.base, f_locals, f_globals, seen)
                item = FrameInput("symbol", "", counts=_counts_rows(place, whole, arguments))
            else:
                value = value_at(place, f_locals, f_globals, seen)
                if not isinstance(value, Tensor):
                    return False
                values.append(value)
                item = _input(value, known, arguments)
            if _input_text(item, program) != text:
                return False
        return not program.derived.inputs(values, known, arguments)


def _input(value: Tensor, known: dict[int, FrameInput], arguments: dict[int, Role]) -> FrameInput:
    """The input, as in `Frame.of` except for results of earlier graphs."""
    if id(value) in known:
        return known[id(value)]
    if id(value) in arguments:
        return FrameInput("argument", "", role=arguments[id(value)])
    return FrameInput("state" if value.dim() == 0 else "unknown", "")


def _counts_rows(place: TensorPropertySource, whole: Any, arguments: dict[int, Role]) -> bool:
    role = arguments.get(id(whole))
    if place.prop is not TensorProperty.SIZE or role is None or not role.known:
        return False
    return role.dim == place.idx and whole.shape[place.idx] > 1


def _input_text(item: FrameInput, program: Program) -> str:
    group = None if item.group is None else program.groups.index(item.group)
    holder = None if item.holder is None else str(item.holder)
    label = item.label if item.kind in ("bank", "packed") else ""
    sites = [site.path for site in item.sites]
    kind = f"{item.kind} {label} counts {item.counts}"
    return f"{kind} {sites} group {group} held by {holder} {item.role}"

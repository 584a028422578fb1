"""vLLM's and SGLang's Triton LoRA ops at run time, for gpu_linear.py. None of their
code is here.

An installed package is imported as it is. Else the ops are loaded out of a wheel (or a folder, or
what `cut` leaves of a wheel), and what they import of the rest of their package is replaced by the
few names below, none of which is a kernel:

    python benchmarks/peers.py cut vllm-0.33.0-….whl vllm.zip     # 336 MB become 0.1 MB

Layouts that both take: A (S, r, K) and B (S, N, r), a stack a sibling (vLLM) or siblings stacked
along r and N (SGLang); S adapters, no row without one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VLLM_FILES = ("lora_shrink_op.py", "lora_expand_op.py", "lora_kernel_metadata.py")
VLLM_EXPERTS = "fused_moe_lora_op.py"
SGLANG_FILES = ("chunked_sgmv_shrink.py", "chunked_sgmv_expand.py")
FOLDER = "LORAFX_PEERS"  # names the folder with what `cut` leaves of wheels


@dataclass(frozen=True)
class Layer:
    """One packed linear with LoRA, in the peers' layout.

    Attributes:
        x: (M, K); weight: (ΣN, K).
        A: (S, r, K) a sibling; B: (S, N_i, r) a sibling.
        slots: (M,) int32, the adapter of each row, none −1; scale: of every adapter.
    """

    x: Tensor
    weight: Tensor
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    slots: Tensor
    scale: float


Arm = Callable[[], Tensor]


def find(package: str) -> Callable[[Layer], Arm] | str:
    """What makes an arm of `package` for a layer, or why there is none: of what `cut` has left of
    its wheel in the folder of --peers, if it is there."""
    make, files = {"vllm": (_vllm, VLLM_FILES), "sglang": (_sglang, SGLANG_FILES)}[package]
    path = Path(os.environ.get(FOLDER, "")) / f"{package}.zip"
    modules = load(package, path if path.exists() else None, files)
    return modules if isinstance(modules, str) else make(modules)


def load(package: str, wheel: Path | None, files: Sequence[str]) -> dict[str, ModuleType] | str:
    """The modules of `files`, or why there are none."""
    try:
        if wheel is not None:
            return _from_files(package, _extracted(wheel), files)
        if importlib.util.find_spec(package) is not None:
            return _installed(package, files)
        return f"{package} is not installed"
    except Exception as error:
        return f"{package} could not be loaded: {type(error).__name__}: {error}"


def _extracted(wheel: Path) -> Path:
    if wheel.is_dir():
        return wheel
    folder = Path(tempfile.mkdtemp(prefix="lorafx-peers-"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if _is_needed(n)])
    return folder


def _is_needed(name: str) -> bool:
    """The folders of the LoRA ops in any version so far, and tuned tables beside them."""
    inside = "/lora/ops/triton_ops/" in name or "/lora/triton_ops/" in name
    inside |= "/kernels/ops/lora/dense/" in name
    inside &= "moe" not in name or name.endswith("/fused_moe_lora_op.py")
    return inside and name.endswith((".py", ".json"))


def _installed(package: str, files: Sequence[str]) -> dict[str, ModuleType]:
    root = Path(importlib.import_module(package).__path__[0])
    found = {}
    for file in files:
        path = _only(root, file)
        name = ".".join((package, *path.relative_to(root).with_suffix("").parts))
        found[file] = importlib.import_module(name)
    return found


def _from_files(package: str, folder: Path, files: Sequence[str]) -> dict[str, ModuleType]:
    """Import `files` with empty parents, whose __init__ would import a whole server."""
    for name, names in {"vllm": _VLLM_REST, "sglang": _SGLANG_REST}[package].items():
        module = _bare(name)
        vars(module).update(names)
    found = {}
    for file in files:
        path = _only(folder / package, file)
        parts = path.relative_to(folder).with_suffix("").parts
        for depth in range(1, len(parts)):
            parent = _bare(".".join(parts[:depth]))
            parent.__path__ = [str(folder.joinpath(*parts[:depth]))]
        found[file] = importlib.import_module(".".join(parts))
    return found


def _bare(name: str) -> ModuleType:
    """The module `name` with its parents, empty where they are not there yet."""
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(_bare(parent), leaf, sys.modules[name])
    return sys.modules[name]


def _only(folder: Path, file: str) -> Path:
    """The op's file; the deepest where an old path only forwards to a new one."""
    paths = sorted(folder.rglob(file), key=lambda path: len(path.parts))
    if not paths:
        raise FileNotFoundError(f"no {file} below {folder}")
    return paths[-1]


# --- vLLM ---


def _refuse_registration(*_: Any, **__: Any) -> None:
    raise AttributeError("the ops are called as plain functions")  # which they then fall back to


class _Quiet:
    """A logger that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _multiprocessors(index: int | None) -> int:
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(index).multi_processor_count


def _shared_memory(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def _refuse_ranks(*_: Any, **__: Any) -> None:
    raise NotImplementedError("the op is loaded for one GPU and ranks of at most 128")


def _to_device(values: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _triton_names() -> dict[str, Any]:
    import triton
    import triton.language as tl

    return {"triton": triton, "tl": tl, "HAS_TRITON": True}


_VLLM_REST: Mapping[str, Mapping[str, Any]] = {
    "vllm.distributed": {
        "tensor_model_parallel_all_gather": _refuse_ranks,
        "tensor_model_parallel_all_reduce": _refuse_ranks,
    },
    "vllm.envs": {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_TUNED_CONFIG_FOLDER": None,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_LORA_DISABLE_PDL": True,
    },
    "vllm.logger": {"init_logger": lambda name: _Quiet()},
    "vllm.platforms": {
        "current_platform": SimpleNamespace(
            is_cuda=torch.cuda.is_available,
            is_cuda_alike=torch.cuda.is_available,
            is_xpu=lambda: False,
            num_compute_units=_multiprocessors,
            has_device_capability=lambda least: _capability() >= divmod(least, 10),
            is_device_capability=lambda exact: _capability() == divmod(exact, 10),
        )
    },
    "vllm.triton_utils": _triton_names(),
    "vllm.triton_utils.allocation": {"set_triton_allocator": _refuse_ranks},
    "vllm.utils": {"direct_register_custom_op": _refuse_registration},
    "vllm.utils.math_utils": {"next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length()},
    "vllm.utils.mem_utils": {"get_max_shared_memory_bytes": _shared_memory},
    "vllm.utils.torch_utils": {
        "direct_register_custom_op": _refuse_registration,
        "async_tensor_h2d": _to_device,
    },
}


def _vllm(modules: Mapping[str, ModuleType]) -> Callable[[Layer], Arm]:
    shrink_op, expand_op, metadata = (modules[file] for file in VLLM_FILES)

    def make(layer: Layer) -> Arm:
        M, S, rank = layer.x.shape[0], *layer.A[0].shape[:2]
        meta = metadata.LoRAKernelMeta.make(S, M, device=layer.x.device)
        meta.prepare_tensors(layer.slots)
        arguments = meta.meta_args(M, True)
        A, B = list(layer.A), list(layer.B)

        def arm() -> Tensor:
            y = torch.nn.functional.linear(layer.x, layer.weight)
            v = torch.empty((len(A), M, rank), dtype=torch.float32, device=y.device)
            shrink_op.lora_shrink(layer.x, A, v, *arguments, layer.scale)
            expand_op.lora_expand(v, B, y, *arguments, offset_start=0, add_inputs=True)
            return y

        return arm

    return make


# --- SGLang ---

_OFF = SimpleNamespace(get=lambda: False)
_SGLANG_REST: Mapping[str, Mapping[str, Any]] = {
    "sglang.srt.environ": {
        "envs": SimpleNamespace(
            SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=_OFF, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=_OFF
        )
    },
    "sglang.srt.lora.utils": {"LoRABatchInfo": SimpleNamespace},
    "sglang.srt.utils": {
        "cached_triton_kernel": lambda key: lambda kernel: kernel,
        "get_device_name": lambda: (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        ),
    },
    "sglang.utils": {"cached_triton_kernel": lambda key: lambda kernel: kernel},
}


def sglang_segments(slots: Tensor) -> SimpleNamespace:
    """Rows sorted by adapter and cut into chunks of at most 16, 32 or 128 rows, by their number."""
    rows = slots.shape[0]
    chunk = 128 if rows >= 256 else 32 if rows >= 64 else 16
    sorted_slots, permutation = torch.sort(slots.cpu(), stable=True)
    owners, lengths = torch.unique_consecutive(sorted_slots, return_counts=True)
    starts, adapters, first = [0], [], 0
    for owner, length in zip(owners.tolist(), lengths.tolist(), strict=True):
        for start in range(first, first + length, chunk):
            starts.append(min(start + chunk, first + length))
            adapters.append(owner)
        first += length
    options = {"dtype": torch.int32, "device": slots.device}
    return SimpleNamespace(
        use_cuda_graph=slots.device.type == "cuda",
        bs=len(adapters),
        num_segments=len(adapters),
        seg_indptr=torch.tensor(starts, **options),
        weight_indices=torch.tensor(adapters, **options),
        permutation=permutation.to(**options),
        max_len=chunk,
        seg_lens=None,
    )


def _sglang(modules: Mapping[str, ModuleType]) -> Callable[[Layer], Arm]:
    shrink_op, expand_op = (modules[file] for file in SGLANG_FILES)

    def make(layer: Layer) -> Arm:
        S, rank = layer.A[0].shape[:2]
        sizes = [B.shape[1] for B in layer.B]
        device = layer.x.device
        batch = sglang_segments(layer.slots)
        batch.lora_ranks = torch.full((S,), rank, dtype=torch.int32, device=device)
        batch.scalings = torch.full((S,), layer.scale, dtype=torch.float32, device=device)
        bounds = [sum(sizes[:j]) for j in range(len(sizes) + 1)]
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        A, B = torch.cat(list(layer.A), 1), torch.cat(list(layer.B), 1)

        def arm() -> Tensor:
            y = torch.nn.functional.linear(layer.x, layer.weight)
            v = shrink_op.chunked_sgmv_lora_shrink_forward(layer.x, A, batch, len(sizes))
            return expand_op.chunked_sgmv_lora_expand_forward(
                v, B, batch, offsets, max(sizes), base_output=y
            )

        return arm

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    cut = commands.add_parser("cut", help="write what the benchmark needs of a wheel")
    cut.add_argument("wheel", type=Path)
    cut.add_argument("out", type=Path)
    options = parser.parse_args()
    with (
        zipfile.ZipFile(options.wheel) as source,
        zipfile.ZipFile(options.out, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            if _is_needed(name):
                target.writestr(name, source.read(name))
    print(f"wrote {options.out}, {options.out.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()

"""vLLM's Triton LoRA ops without the rest of vLLM, for tests/helpers/vllm_kernels.py. None of their
code is here: what they import of their package is replaced by the few names below, none of which is
a kernel. A is (S, r, K) and B (S, N, r), a stack a sibling; S adapters, no row without one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILES = ("lora_shrink_op.py", "lora_expand_op.py", "lora_kernel_metadata.py")
EXPERTS = "fused_moe_lora_op.py"


def load(folder: Path, files: Sequence[str]) -> dict[str, ModuleType]:
    """The modules of `files` of the vllm in `folder`, with empty parents, whose __init__ would
    import a whole server."""
    for name, names in _REST.items():
        vars(_bare(name)).update(names)
    found = {}
    for file in files:
        path = _only(folder / "vllm", file)
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


_REST: Mapping[str, Mapping[str, Any]] = {
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

"""A GPU that can be compiled for and not run: what Triton and Inductor ask a driver about a device.

on_cuda(mode, gm)         the graph's values as they would be on a GPU
with compile_only_gpu():  fake "cuda" tensors trace, lower and generate code; nothing launches
generated_code(gm, mode)  the Python that Inductor writes for a graph of such tensors
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

CUDA = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=60 << 20,
    total_memory=141 << 30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152,
    shared_memory_per_multiprocessor=233472,
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
)


class _Driver(DriverBase):
    """Names the target; every launch fails."""

    def __init__(self, capability: int) -> None:  # the base class looks for a device
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Interface(device_interface.CudaInterface):
    """What Inductor asks of the device that is not there."""

    class Worker(device_interface.CudaInterface.Worker):
        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return H200

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    exchange_device = staticmethod(lambda index: 0)
    maybe_exchange_device = staticmethod(lambda index: 0)
    get_raw_stream = staticmethod(lambda index: 0)
    get_device_properties = staticmethod(lambda device=None: H200)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


@contextlib.contextmanager
def compile_only_gpu(capability: int = 90) -> Iterator[None]:
    """Inside, "cuda" is an H200 that only compiles; plain launches do for another capability."""
    device_interface.init_device_reg()
    registered = device_interface.device_interfaces
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(capability))
    has_triton.cache_clear()  # an earlier compilation for the CPU has asked
    try:
        with (
            mock.patch.dict(registered, {"cuda": _Interface, "cuda:0": _Interface}),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=H200),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        ):
            yield
    finally:
        config._active = before
        has_triton.cache_clear()


def on_cuda(mode: FakeTensorMode, gm: fx.GraphModule) -> None:
    """Give every value of the graph the device of a GPU."""

    def moved(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

    for node in gm.graph.nodes:
        if "val" in node.meta:
            value = node.meta["val"]
            many = isinstance(value, (list, tuple))
            node.meta["val"] = type(value)(map(moved, value)) if many else moved(value)


def generated_code(gm: fx.GraphModule, mode: FakeTensorMode) -> str:
    """What Inductor would run on an H200; its compilation is cut off where it would be loaded."""
    import torch._inductor.config as inductor_config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    output = next(node for node in gm.graph.nodes if node.op == "output")
    output.meta["user_visible_output_idxs"] = [0]
    examples = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]

    class Stop(Exception):
        pass

    texts: list[str] = []
    original = GraphLowering.codegen

    def codegen(self: GraphLowering) -> None:
        texts.append(original(self)[0].value)
        raise Stop

    with (
        compile_only_gpu(),
        mock.patch.object(GraphLowering, "codegen", codegen),
        inductor_config.patch(fx_graph_cache=False),
        tracing(TracingContext(mode)),
        contextlib.suppress(Stop, InductorError),  # what Inductor makes of Stop
    ):
        compile_fx_inner(gm, examples, is_inference=True)
    (text,) = texts
    return text

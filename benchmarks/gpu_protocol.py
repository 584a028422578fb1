"""What the measuring protocol adds on a GPU: graphs, clocks, launches, a budget of minutes.

An arm is a CUDA graph that calls a function once for each of at least 20 copies of its weights, so
that weights come from device memory and not from the cache of the call before; its time is that of
one replay, by CUDA events, over the number of copies. Every arm of a comparison, the base too, is
such a graph over the same copies in the same order.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import protocol
import torch
from protocol import machine

COPIES = 20
CACHE_BYTES = 60 << 20  # of an H200's L2; the copies together are to be several times that
CLOCKS = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw"


def require_gpu(program: str) -> torch.device:
    """The GPU to measure on; ends the program, saying so, where there is none."""
    if not torch.cuda.is_available():
        sys.exit(
            f"{program} measures on a GPU and this machine has none that torch {torch.__version__} "
            "can use. Nothing was measured or written; --self-check runs what needs no GPU."
        )
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class GraphArm:
    """A captured graph of `calls`; calling it replays the graph once.

    The calls are kept: a graph reads what they hold, and keeps none of it alive.
    """

    graph: Any
    calls: Sequence[Callable[[], object]]

    @property
    def copies(self) -> int:
        return len(self.calls)

    def __call__(self) -> None:
        self.graph.replay()


def graph_arm(calls: Sequence[Callable[[], object]]) -> GraphArm:
    """`calls`, one a copy of the weights, as one CUDA graph. Each is warmed up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return GraphArm(graph, list(calls))


def event_time(arm: Any, seconds: float) -> float:
    """Seconds of one call (a replay over its copies), over as many replays as fill `seconds`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copies = arm.copies
    replays, total = 1, 0.0
    while True:
        start.record()
        for _ in range(replays):
            arm()
        end.record()
        end.synchronize()
        total = start.elapsed_time(end) * 1e-3
        if total >= seconds or replays >= 1 << 16:
            return total / replays / copies
        replays = max(replays * 2, int(replays * seconds / max(total, 1e-6)))


def launches(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that one call launches, in order; memory sets and copies too."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == cuda]


@dataclass(frozen=True)
class PlainArm:
    """`calls`, one after the other: a graph's stand-in where there is no GPU."""

    calls: Sequence[Callable[[], object]]

    @property
    def copies(self) -> int:
        return len(self.calls)

    def __call__(self) -> None:
        for call in self.calls:
            call()


@dataclass(frozen=True)
class Meter:
    """How arms are made and timed on a device. On a CPU, where kernels run in an interpreter, the
    same code runs once and its times mean nothing: a trial of the code.

    Attributes:
        blocks, seconds: of the protocol.
    """

    device: torch.device
    blocks: int = 50
    seconds: float = 0.004

    @property
    def measures(self) -> bool:
        return self.device.type == "cuda"

    def arm(self, calls: Sequence[Callable[[], object]]) -> GraphArm | PlainArm:
        """Each of `calls` once, as one graph where there are graphs."""
        return graph_arm(calls) if self.measures else PlainArm(list(calls))

    def copies(self, nbytes: int) -> int:
        """Of weights of so many bytes, which an arm rotates over."""
        return copies_for(nbytes, torch.cuda.mem_get_info(self.device)[0]) if self.measures else 2

    def launches(self, call: Callable[[], object]) -> list[str]:
        """As `launches`; none on a CPU."""
        return launches(call) if self.measures else []

    def time(self, arm: Any, seconds: float) -> float:
        """Seconds of one call of an arm."""
        if self.measures:
            return event_time(arm, seconds)
        return protocol.timed(arm, 0.0) / arm.copies

    def compare(
        self,
        base: Any,
        arms: Mapping[str, Any],
        timer: Callable[[Any, float], float] | None = None,
    ) -> list[protocol.Ratio]:
        """`protocol.compare` with this meter's clock, or with `timer`."""
        blocks, seconds = (self.blocks, self.seconds) if self.measures else (1, 0.0)
        return protocol.compare(
            base, dict(arms), blocks=blocks, seconds=seconds, timer=timer or self.time
        )


def copies_for(bytes_of_one: int, free: int | None = None) -> int:
    """How many copies of the weights to rotate over: at least 20, and ten caches full.

    Raises:
        MemoryError: they do not fit into device memory.
    """
    count = max(COPIES, -(-10 * CACHE_BYTES // max(bytes_of_one, 1)))
    if free is not None and count * bytes_of_one > 0.8 * free:
        if COPIES * bytes_of_one > 0.8 * free:
            raise MemoryError(f"{COPIES} copies of {bytes_of_one >> 20} MiB do not fit")
        count = COPIES
    return min(count, 400)


def clocks() -> dict[str, str]:
    """Clocks, throttling, temperature and power now, as nvidia-smi tells; empty without it."""
    try:
        line = subprocess.run(
            ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(CLOCKS.split(","), (item.strip() for item in line.split(",")), strict=False))


def driver() -> str:
    """The version of NVIDIA's driver; empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def gpu_machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on, the GPU first."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "driver": driver(),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        **machine(),
    }


class Budget:
    """Minutes that a benchmark may take; what does not fit is left out and said to be."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []
        self._longest = 0.0

    def fits(self, case: str) -> bool:
        """Whether a case as long as the longest so far still ends in time; notes it if not."""
        if time.monotonic() + 1.2 * self._longest < self.end:
            return True
        self.left_out.append(case)
        return False

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

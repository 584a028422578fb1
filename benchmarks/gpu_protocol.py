"""What the measuring protocol adds on a GPU: graphs, clocks, launches.

An arm is a CUDA graph that calls a function once for each of at least 20 copies of its weights, so
that weights come from device memory and not from the cache of the call before; its time is that of
one replay, by CUDA events, over the number of copies. Every arm of a comparison, the base too, is
such a graph over the same copies in the same order.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import protocol
import torch
from calibrate import graph_of

COPIES = 20
CACHE_BYTES = 60 << 20  # of an H200's L2; the copies together are to be several times that
KERNELS = 20  # of a step that are told
CLOCKS = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,temperature.gpu,power.draw"


@dataclass(frozen=True)
class Arm:
    """Runs `calls` one after the other, in a CUDA graph if `graph` is given.

    The calls are kept: a graph reads what they hold, and keeps none of it alive. `prepare` sets the
    mix that the next runs serve.
    """

    calls: Sequence[Callable[[], object]]
    graph: Any = None
    prepare: Callable[[], object] | None = None

    def __call__(self) -> None:
        for call in self.calls if self.graph is None else (self.graph.replay,):
            call()


@dataclass(frozen=True)
class Meter:
    """How arms are made and timed on a device. On a CPU, where kernels run in an interpreter, the
    same code runs once and its times mean nothing: a trial of the code.

    Attributes:
        blocks, seconds, until: of the protocol.
    """

    device: torch.device
    blocks: int = 50
    seconds: float = 0.004
    until: float = 0.005

    @property
    def measures(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """For the GPU, where there is one."""
        if self.measures:
            torch.cuda.synchronize(self.device)

    def arm(
        self, calls: Sequence[Callable[[], object]], prepare: Callable[[], object] | None = None
    ) -> Arm:
        """Each of `calls` once, as one graph where there are graphs."""
        return Arm(calls, graph_of(calls) if self.measures else None, prepare)

    def copies(self, nbytes: int) -> int:
        """Of weights of so many bytes, which an arm rotates over: at least 20, ten caches full."""
        if not self.measures:
            return 2
        most = int(0.8 * torch.cuda.mem_get_info(self.device)[0] // nbytes)
        return max(COPIES, min(400, most, 10 * CACHE_BYTES // nbytes))

    def launches(self, call: Callable[[], object]) -> list[tuple[str, float]]:
        """The kernels that one call launches, memory sets and copies too, with microseconds; on a
        GPU."""
        if not self.measures:
            return []
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        events = [event for event in profile.events() if event.device_type == cuda]
        return [(event.name, event.time_range.elapsed_us()) for event in events]

    def time(self, arm: Arm, seconds: float) -> float:
        """Seconds of one call of an arm, over as many replays as fill `seconds`."""
        if arm.prepare is not None:
            arm.prepare()
        if not self.measures:
            return protocol.timed(arm, 0.0) / len(arm.calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replays = 1
        while True:
            start.record()
            for _ in range(replays):
                arm()
            end.record()
            end.synchronize()
            total = start.elapsed_time(end) * 1e-3
            if total >= seconds or replays >= 1 << 16:
                return total / replays / len(arm.calls)
            replays = max(replays * 2, int(replays * seconds / max(total, 1e-6)))

    def compare(
        self,
        case: str,
        base: Any,
        arms: Mapping[str, Any],
        timer: Callable[[Any, float], float] | None = None,
    ) -> list[dict[str, Any]]:
        """Rows of results of `protocol.compare`, with this meter's clock or with `timer`."""
        sizes: dict[str, Any] = {"blocks": 1, "seconds": 0.0}
        if self.measures:
            sizes = {"blocks": self.blocks, "seconds": self.seconds, "until": self.until}
        before = clocks()
        rows = protocol.rows_of(case, base, arms, **sizes, timer=timer or self.time)
        return [row | {"clocks before": before, "clocks after": clocks()} for row in rows]

    def compare_steps(
        self, case: str, base: Callable[[], object], calls: Mapping[str, Callable[[], object]]
    ) -> list[dict[str, Any]]:
        """Rows of results of whole steps, with the dearest kernels of each. A call outside of the
        graph sets the mix that it serves, and is made before the graph is replayed."""
        found = {name: self.launches(call) for name, call in {"A/A": base, **calls}.items()}
        arms = {name: self.arm([call], prepare=call) for name, call in calls.items()}
        rows = self.compare(case, self.arm([base]), arms)
        return [row | in_sum(found[row["arm"]]) for row in rows]


def in_sum(launches: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """How many launches these are, and of the dearest kernels how many, and their microseconds."""
    kernels: dict[str, list[float]] = {}
    for name, microseconds in launches:
        kernels.setdefault(name, []).append(microseconds)
    dearest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    shown = {name[:60]: [len(times), round(sum(times), 1)] for name, times in dearest}
    return {"launches": len(launches), "kernels": shown}


def ask_nvidia_smi(fields: str) -> list[str]:
    """What nvidia-smi says of the GPU; nothing without it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [item.strip() for item in done.stdout.partition("\n")[0].split(",")]


def clocks() -> dict[str, str]:
    """Clocks, throttling, temperature and power now; empty without nvidia-smi."""
    return dict(zip(CLOCKS.split(","), ask_nvidia_smi(CLOCKS), strict=False))


def machine_of(device: torch.device) -> dict[str, object]:
    """What the figures were measured on, the GPU first."""
    if device.type != "cuda":
        return protocol.machine()
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "driver": "".join(ask_nvidia_smi("driver_version")),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        **protocol.machine(),
    }

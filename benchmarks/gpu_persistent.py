"""Forms of a persistent product alone, beside the vendor's: what "persistent" could be built on.

forms(context)    seconds of each form over the vendor's, medians of 11 replays of a CUDA graph

flat      the loops over tiles and over K are one to the compiler: what "persistent" is
warps     loads and products by warps of their own (`warp_specialize`). Triton 3.7 compiles that
          for Hopper where all operands come by TMA, so the deltas would need v in 16 bits and
          slots without a loop; for Blackwell deltas leave no room in tensor memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from gpu_cases import LAYERS
from gpu_job import Context
from torch import Tensor

from lorafx.kernels.tools.tune import is_too_big, replay_seconds
from lorafx.torch_internals.triton_compat import allow_scratch, interpret


@triton.jit
def product(
    x_ptr, w_ptr, y_ptr, M, N, K: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FLAT: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) W (N, K)ᵀ; N is a multiple of BLOCK_N."""
    GROUP_M: tl.constexpr = 8
    HALF: tl.constexpr = BLOCK_N // 2
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_tiles = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, HALF])
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = N // BLOCK_N
    for t in tl.range(
        tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLAT, warp_specialize=WARPS
    ):
        band = t // (GROUP_M * tiles_n)
        tall = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        m = (band * GROUP_M + t % (GROUP_M * tiles_n) % tall) * BLOCK_M
        n = t % (GROUP_M * tiles_n) // tall * BLOCK_N
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_tiles.load([m, k]), w_tiles.load([n, k]).T, acc)
        pair = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
        left, right = tl.split(pair)
        y_tiles.store([m, n], left.to(y_ptr.dtype.element_ty))
        y_tiles.store([m, n + HALF], right.to(y_ptr.dtype.element_ty))


#: (rows, columns, flat, specialised warps, programs a processor, warps, stages) by name
FORMS = {
    "flat 128x256, 3 stages": (128, 256, True, False, 1, 8, 3),
    "flat 128x256, 4 stages": (128, 256, True, False, 1, 8, 4),
    "flat 256x128, 3 stages": (256, 128, True, False, 1, 8, 3),
    "flat 128x128, 2 programs": (128, 128, True, False, 2, 4, 3),
    "warps 128x256, 3 stages": (128, 256, False, True, 1, 4, 3),
    "warps 128x256, 4 stages": (128, 256, False, True, 1, 4, 4),
    "warps 128x128, 5 stages": (128, 128, False, True, 1, 4, 5),
}
ROWS = (8192, 2048, 512)


def call_of(name: str, x: Tensor, weight: Tensor, y: Tensor) -> Callable[[], object]:
    """What runs a form once."""
    block_m, block_n, flat, specialised, each, warps, stages = FORMS[name]
    (M, K), N = x.shape, weight.shape[0]
    if x.device.type == "cpu":
        block_m, block_n, block_k, programs = 16, 32, 16, 3
    else:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        block_k, programs = 64, each * processors
        allow_scratch()
    arguments = (x, weight, y, M, N, K, programs, block_m, block_n, block_k, flat, specialised)
    if x.device.type == "cpu":
        return functools.partial(interpret, product, (programs,), arguments)
    return lambda: product[(programs,)](*arguments, num_warps=warps, num_stages=stages)


def forms(context: Context) -> None:
    """Job: every form at the four packed linears of Llama-3-8B."""
    layers = LAYERS["llama-8b"] if not context.tiny else {"tiny": (48, (64,))}
    rows = ROWS if not context.tiny else (20,)
    sizes = {f"{M} rows, {n}": (M, *layers[n]) for M in rows for n in layers}
    clock = _seconds if not context.tiny else _once
    best: dict[int, list[float]] = {M: [] for M in rows}
    for key in context.order(list(sizes)):
        M, K, columns = sizes[key]
        with context.case(key):
            dtype = torch.float16 if context.tiny else torch.bfloat16
            x = torch.randn(M, K, device=context.device).to(dtype)
            weight = (torch.randn(sum(columns), K, device=context.device) * K**-0.5).to(dtype)
            y = torch.empty(M, sum(columns), dtype=dtype, device=context.device)
            expected = torch.nn.functional.linear(x, weight)
            vendor = clock(functools.partial(torch.nn.functional.linear, x, weight))
            found = []
            for name in FORMS:
                call = call_of(name, x, weight, y)
                try:
                    seconds = clock(call)
                except Exception as error:
                    if not is_too_big(error):
                        raise
                    continue
                torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
                y.zero_()
                found.append({"form": name, "over vendor": seconds / vendor, "vendor": vendor})
                print(f"  {key}: {name} {seconds / vendor:.3f}", flush=True)
            context.add(key, found)
            best[M].append(min(row["over vendor"] for row in found))
    text = [f"{M} rows {min(b):.3f} to {max(b):.3f}" for M, b in best.items() if b]
    context.summarise("best form over the vendor's: " + "; ".join(text))


def _seconds(call: Callable[[], object]) -> float:
    return replay_seconds([call] * 5, replays=11)


def _once(call: Callable[[], object]) -> float:
    """A self-check: the call has to work; its time says nothing."""
    call()
    return 1.0

"""Runs the PTX of a compiled kernel on a CPU, thread by thread, and looks at every address.

    memory = Memory(); address = memory.hold("x", tensor); run(ptx, arguments, grid, memory)

What a GPU stops a program for is an error here: an access that is not aligned to its width, one
outside of every array, a row of ldmatrix or stmatrix not at 16 bytes, threads that never meet at a
barrier. Triton's interpreter cannot see any of that, since vectors are the compiler's choice. The
numbers are computed too (mma.sync in float32), so that what a kernel leaves can be compared.

The instructions are those that Triton makes for the generated kernels of a decode step: no TMA, no
wgmma. Others raise `Unknown`. Threads of a block run in lockstep as numpy vectors; where they part,
those that are furthest behind go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ptx_code import Fault, Instruction, Memory, Unknown, parse
from ptx_instructions import FLOATS, KINDS

__all__ = ["Fault", "Memory", "Unknown", "run"]

SHARED = 256 << 10


def run(
    ptx: str,
    arguments: Sequence[int],
    grid: Sequence[int],
    memory: Memory,
    *,
    blocks: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Every block of the grid, or those named.

    Args:
        arguments: sizes and addresses, in the order of the kernel's parameters; Triton's own, which
            follow, are 0.

    Raises:
        Fault: what a GPU would stop for, with the instruction.
    """
    code, labels, threads, parameters = parse(ptx)
    values = {f"[{name}]": value for name, value in zip(parameters, arguments, strict=False)}
    values |= {f"[{name}]": 0 for name in parameters[len(arguments) :]}
    x, y, z = (*grid, 1, 1)[:3]
    every = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    for block in every if blocks is None else blocks:
        Block(code, labels, threads, values, memory, block, (x, y, z)).run()


class Block:
    """One block of threads: registers by name, a value for each thread, as bits."""

    def __init__(
        self,
        code: Sequence[Instruction],
        labels: dict[str, int],
        threads: int,
        values: dict[str, int],
        memory: Memory,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
    ) -> None:
        self.code, self.labels, self.threads, self.memory = code, labels, threads, memory
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.zeros(SHARED, np.uint8)
        lanes = np.arange(threads, dtype=np.uint64)
        self.at = np.zeros(threads, np.int64)
        self.block = block
        known = dict(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), block, strict=True))
        known |= dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
        known |= {"%ntid.x": threads, "global_smem": 0, **values}
        for name, value in known.items():
            self.registers[name] = np.full(threads, value & ((1 << 64) - 1), np.uint64)
        self.registers |= {"%tid.x": lanes, "%laneid": lanes % np.uint64(32)}

    def run(self) -> None:
        with np.errstate(all="ignore"):
            waiting = np.zeros(self.threads, bool)
            while (self.at < len(self.code)).any():
                ready = ~waiting & (self.at < len(self.code))
                if not ready.any():
                    if len(set(self.at[waiting].tolist())) > 1:
                        raise Fault(f"threads wait at several barriers in block {self.block}")
                    self.at[waiting] += 1
                    waiting[:] = False
                    continue
                place = int(self.at[ready].min())
                here = ready & (self.at == place)
                if self.code[place].name[0] in ("bar", "barrier"):
                    waiting |= here
                    continue
                self.step(self.code[place], here)

    def step(self, instruction: Instruction, here: np.ndarray) -> None:
        active = here
        if instruction.predicate is not None:
            active = here & (self.predicate(instruction.predicate) ^ instruction.negated)
        name = instruction.name[0]
        if name == "bra":
            self.at[here] += 1
            self.at[active] = self.labels[instruction.operands[0]]
            return
        if name in ("ret", "exit"):
            self.at[here] += 1
            self.at[active] = len(self.code)
            return
        try:
            KINDS[name](self, instruction.name, instruction.operands, active)
        except KeyError:
            raise Unknown(instruction.text) from None
        except Fault as fault:
            raise Fault(f"{fault} in block {self.block}: {instruction.text}") from None
        self.at[here] += 1

    # --- registers ---

    def raw(self, operand: Any) -> np.ndarray:
        if isinstance(operand, int):
            return np.full(self.threads, operand, np.uint64)
        if operand not in self.registers:
            self.registers[operand] = np.zeros(self.threads, np.uint64)
        return self.registers[operand]

    def predicate(self, name: Any) -> np.ndarray:
        return self.raw(name) != 0

    def value(self, operand: Any, kind: str) -> np.ndarray:
        raw = self.raw(operand)
        if kind == "pred":
            return raw != 0
        size = int(kind.lstrip("usbf"))
        if kind == "bf16":
            return ((raw & np.uint64(0xFFFF)).astype(np.uint32) << 16).view(np.float32)
        narrow = raw.astype(f"u{size // 8}")
        if kind in FLOATS:
            return narrow.view(FLOATS[kind])
        return narrow.view(f"i{size // 8}") if kind[0] == "s" else narrow

    def write(self, name: str, values: np.ndarray, active: np.ndarray) -> None:
        """`values` of any type as bits."""
        if values.dtype != bool:
            values = values.view(f"u{values.dtype.itemsize}")
        self.raw(name)[active] = values.astype(np.uint64)[active]

    # --- memory ---

    def addresses(self, operand: tuple[str, str, int], space: str) -> np.ndarray:
        _, register, offset = operand
        base = self.raw(register)
        if space == "shared":
            base = base & np.uint64(0xFFFFFFFF)
        return (base + np.uint64(offset & ((1 << 64) - 1))).astype(np.int64)

    def bytes_at(self, space: str, address: int, width: int) -> np.ndarray:
        if address % width:
            raise Fault(f"misaligned: {width} bytes at {address:#x}, {space}")
        if space == "global":
            held, place = self.memory.find(address, width)
            return held[place : place + width]
        if not 0 <= address <= SHARED - width:
            raise Fault(f"{width} bytes at {address:#x} of shared memory")
        return self.shared[address : address + width]

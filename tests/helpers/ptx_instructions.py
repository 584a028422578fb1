"""What each instruction of PTX does to a block of ptx_machine, by the first part of its name."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ptx_code import Fault, Unknown

if TYPE_CHECKING:
    from ptx_machine import Block

FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
_COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "neu": operator.ne, "equ": operator.eq,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    "ltu": operator.lt, "gtu": operator.gt,
}  # fmt: skip

Step = Callable[["Block", tuple[str, ...], tuple[Any, ...], np.ndarray], None]
KINDS: dict[str, Step] = {}


def _instruction(*names: str) -> Callable[[Step], Step]:
    def note(step: Step) -> Step:
        KINDS.update(dict.fromkeys(names, step))
        return step

    return note


@_instruction(
    "griddepcontrol", "createpolicy", "fence", "membar", "nanosleep", "prefetch", "discard"
)
def _nothing(m: Block, name: Any, operands: Any, active: np.ndarray) -> None:
    """What has no effect on one block by itself."""


@_instruction("mov", "cvta")
def _mov(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    target, source = operands
    if isinstance(source, tuple):  # two halves
        half = np.uint64(int(name[-1][1:]) // len(source))
        parts = [(m.raw(part) & ((np.uint64(1) << half) - np.uint64(1))) for part in source]
        packed = sum((p << (half * np.uint64(i)) for i, p in enumerate(parts)), np.uint64(0))
        m.write(target, packed, active)
    elif isinstance(target, tuple):
        half = np.uint64(int(name[-1][1:]) // len(target))
        raw = m.raw(source).copy()
        for i, part in enumerate(target):
            if part != "_":
                bits = (raw >> (half * np.uint64(i))) & ((np.uint64(1) << half) - np.uint64(1))
                m.write(part, bits, active)
    else:
        m.write(target, m.value(source, name[-1]), active)


def _binary(kind: str, a: np.ndarray, b: np.ndarray, op: str) -> np.ndarray:
    if op in ("div", "rem") and kind[0] in "su":
        b = np.where(b == 0, 1, b).astype(a.dtype)
        quotient = a // b
        if kind[0] == "s":  # towards zero
            quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0)))
            quotient = quotient.astype(a.dtype)
        return quotient if op == "div" else (a - quotient * b).astype(a.dtype)
    if op in ("min", "max") and kind[0] == "f":
        return (np.fmin if op == "min" else np.fmax)(a, b)
    functions = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return functions[op](a, b)


@_instruction("add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor")
def _arithmetic(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    kind = name[-1]
    a, b = (m.value(operand, kind) for operand in operands[1:3])
    if "wide" in name:
        wide = a.dtype.str.replace(str(a.dtype.itemsize), str(2 * a.dtype.itemsize))
        m.write(operands[0], a.astype(wide) * b.astype(wide), active)
    elif "hi" in name:
        size = 8 * a.dtype.itemsize
        products = [(int(x) * int(y)) >> size for x, y in zip(a, b, strict=True)]
        mask = (1 << size) - 1
        m.write(operands[0], np.array([p & mask for p in products], np.uint64), active)
    else:
        m.write(operands[0], _binary(kind, a, b, name[0]), active)


@_instruction("mad", "fma")
def _mad(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    kind = name[-1]
    a, b = (m.value(operand, kind) for operand in operands[1:3])
    if "wide" in name:
        size = 2 * a.dtype.itemsize
        wide = a.dtype.str.replace(str(a.dtype.itemsize), str(size))
        found = a.astype(wide) * b.astype(wide) + m.value(operands[3], f"{kind[0]}{8 * size}")
    elif kind[0] == "f":
        found = (a.astype(np.float64) * b + m.value(operands[3], kind)).astype(a.dtype)
    else:
        found = a * b + m.value(operands[3], kind)
    m.write(operands[0], found, active)


@_instruction("neg", "abs", "not", "ex2", "rcp", "lg2", "sqrt", "popc", "tanh")
def _unary(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    a = m.value(operands[1], name[-1])
    functions: dict[str, Callable[[Any], Any]] = {
        "neg": np.negative, "abs": np.abs, "not": np.bitwise_not, "ex2": np.exp2,
        "rcp": np.reciprocal, "lg2": np.log2, "sqrt": np.sqrt, "tanh": np.tanh,
        "popc": lambda v: np.array([int(x).bit_count() for x in v], np.uint32),
    }  # fmt: skip
    m.write(operands[0], functions[name[0]](a), active)


@_instruction("shl", "shr")
def _shift(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    a, by = m.value(operands[1], name[-1]), m.value(operands[2], "u32")
    size = 8 * a.dtype.itemsize
    by = np.minimum(by, size - 1 if name[-1][0] == "s" else size)
    big = a.astype(np.int64 if name[-1][0] == "s" else np.uint64)
    shift = by.astype(big.dtype)
    found = (big << shift) if name[0] == "shl" else (big >> shift)
    if name[-1][0] != "s" and size == 64:
        found = np.where(by >= 64, np.uint64(0), found)
    m.write(operands[0], found.astype(a.dtype), active)


@_instruction("bfe")
def _bfe(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    a, (first, count) = m.value(operands[1], name[-1]), operands[2:4]
    bits = (a.astype(np.int64) >> first) & ((1 << count) - 1)
    if name[-1][0] == "s":
        bits = np.where(bits >> (count - 1) & 1, bits - (1 << count), bits)
    m.write(operands[0], bits.astype(a.dtype), active)


@_instruction("bfi")
def _bfi(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    a, b = (m.value(operand, name[-1]).astype(np.uint64) for operand in operands[1:3])
    first, count = np.uint64(operands[3]), np.uint64(operands[4])
    mask = ((np.uint64(1) << count) - np.uint64(1)) << first
    m.write(operands[0], (b & ~mask) | ((a << first) & mask), active)


@_instruction("lop3")
def _lop3(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    a, b, c = (m.value(operand, "u32") for operand in operands[1:4])
    found = np.zeros_like(a)
    for index in range(8):
        if operands[4] >> index & 1:
            found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    m.write(operands[0], found, active)


@_instruction("prmt")
def _prmt(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    low, high = m.value(operands[1], "u32"), m.value(operands[2], "u32")
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    selector = m.value(operands[3], "u32").astype(np.uint64)
    found = np.zeros(m.threads, np.uint64)
    for index in range(4):
        which = (selector >> np.uint64(4 * index)) & np.uint64(7)
        found |= ((both >> (which * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * index)
    m.write(operands[0], found, active)


@_instruction("setp")
def _setp(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    kind = name[-1]
    found = _COMPARE[name[1]](*(m.value(operand, kind) for operand in operands[1:3]))
    if name[1] in ("ltu", "gtu", "equ"):
        found |= np.isnan(m.value(operands[1], kind)) | np.isnan(m.value(operands[2], kind))
    if name[2] in ("and", "or", "xor"):
        found = _binary("b8", found, m.predicate(operands[3]), name[2])
    m.write(operands[0], found, active)


@_instruction("selp")
def _selp(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    yes, no = (m.value(operand, name[-1]) for operand in operands[1:3])
    m.write(operands[0], np.where(m.predicate(operands[3]), yes, no), active)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@_instruction("cvt")
def _cvt(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    to, source = name[-2], name[-1]
    if to in ("bf16x2", "f16x2"):  # the first goes to the upper half
        parts = [m.value(operand, source) for operand in operands[1:3]]
        halves = [
            _to_bf16(p) if to == "bf16x2" else p.astype(np.float16).view(np.uint16) for p in parts
        ]
        high, low = (half.astype(np.uint32) for half in halves)
        m.write(operands[0], high << np.uint32(16) | low, active)
        return
    value = m.value(operands[1], source)
    if to == "bf16":
        m.write(operands[0], _to_bf16(value), active)
        return
    size = int(to.lstrip("usbf")) // 8
    target = FLOATS[to] if to in FLOATS else np.dtype(f"{'i' if to[0] == 's' else 'u'}{size}")
    m.write(operands[0], value.astype(target), active)


@_instruction("shfl")
def _shfl(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    lanes = np.arange(m.threads)
    by = m.value(operands[2], "s32")
    source = {
        "bfly": lanes % 32 ^ by,
        "idx": by % 32,
        "up": lanes % 32 - by,
        "down": lanes % 32 + by,
    }
    lane = source[name[2]]
    inside = (lane >= 0) & (lane < 32)
    m.write(
        operands[0],
        m.value(operands[1], "b32")[np.where(inside, lanes // 32 * 32 + lane, lanes)],
        active,
    )


@_instruction("redux")
def _redux(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    value, found = m.value(operands[1], name[-1]), None
    found = value.copy()
    functions = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}
    for first in range(0, m.threads, 32):
        warp = slice(first, first + 32)
        if active[warp].any():
            found[warp] = functions[name[2]].reduce(value[warp][active[warp]], dtype=value.dtype)
    m.write(operands[0], found, active)


@_instruction("vote")
def _vote(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    held, found = m.predicate(operands[1]), np.zeros(m.threads, np.uint64)
    for first in range(0, m.threads, 32):
        warp = slice(first, first + 32)
        own = held[warp] & active[warp]
        bits = sum(1 << int(i) for i in np.flatnonzero(own))
        found[warp] = {"ballot": bits, "any": own.any(), "all": own.sum() == active[warp].sum()}[
            name[2]
        ]
    m.write(operands[0], found, active)


def _width(kind: str) -> int:
    return int(re.sub(r"\D", "", kind)) // 8


@_instruction("ld")
def _ld(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    if "param" in name:
        m.write(operands[0], m.raw(operands[1]), active)
        return
    space = "shared" if "shared" in name else "global"
    targets = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
    width = _width(name[-1])
    found = np.zeros((len(targets), m.threads), np.uint64)
    addresses = m.addresses(operands[1], space)
    for thread in np.flatnonzero(active):
        held = m.bytes_at(space, int(addresses[thread]), width * len(targets))
        found[:, thread] = held.copy().view(f"u{width}")
    for target, values in zip(targets, found, strict=True):
        m.write(target, values, active)


@_instruction("st")
def _st(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    space = "shared" if "shared" in name else "global"
    sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
    width = _width(name[-1])
    values = np.stack([m.raw(source).astype(f"u{width}") for source in sources])
    addresses = m.addresses(operands[0], space)
    for thread in np.flatnonzero(active):
        held = m.bytes_at(space, int(addresses[thread]), width * len(sources))
        held[:] = np.ascontiguousarray(values[:, thread]).view(np.uint8)


@_instruction("cp")
def _cp(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    """cp.async: at once, which is a moment that it may happen at."""
    if "async" not in name or "bulk" in name:
        raise Unknown(".".join(name))
    if not operands or "shared" not in name:
        return  # groups: everything has arrived
    to, source = m.addresses(operands[0], "shared"), m.addresses(operands[1], "global")
    width = operands[2]
    sizes = m.value(operands[3] if len(operands) > 3 else width, "u32")
    for thread in np.flatnonzero(active):
        target = m.bytes_at("shared", int(to[thread]), width)
        if int(source[thread]) % width:
            raise Fault(f"misaligned: {width} bytes at {int(source[thread]):#x}, global")
        target[:] = 0
        if size := int(sizes[thread]):
            target[:size] = m.bytes_at("global", int(source[thread]), width)[:size]


def _matrix_rows(m: Block, name: tuple[str, ...], operand: Any, warp: int) -> list[np.ndarray]:
    """The 8 × 8 matrices of b16 of a warp's ldmatrix or stmatrix, as rows in memory."""
    count = int(next(part for part in name if re.fullmatch(r"x\d", part))[1:])
    addresses = m.addresses(operand, "shared")
    return [m.bytes_at("shared", int(addresses[warp + row]), 16) for row in range(8 * count)]


@_instruction("ldmatrix")
def _ldmatrix(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    targets = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
    found = np.zeros((len(targets), m.threads), np.uint32)
    for warp in range(0, m.threads, 32):
        if active[warp]:
            rows = np.stack(_matrix_rows(m, name, operands[1], warp)).view(np.uint16)
            for index in range(len(targets)):
                matrix = rows[8 * index : 8 * index + 8]
                matrix = matrix.T if "trans" in name else matrix
                found[index, warp : warp + 32] = (
                    np.ascontiguousarray(matrix).view(np.uint32).reshape(32)
                )
    for target, values in zip(targets, found, strict=True):
        m.write(target, values, active)


@_instruction("stmatrix")
def _stmatrix(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
    for warp in range(0, m.threads, 32):
        if active[warp]:
            rows = _matrix_rows(m, name, operands[0], warp)
            for index, source in enumerate(sources):
                own = np.ascontiguousarray(m.value(source, "b32")[warp : warp + 32])
                matrix = own.view(np.uint16).reshape(8, 8)
                matrix = np.ascontiguousarray(matrix.T if "trans" in name else matrix)
                for row in range(8):
                    rows[8 * index + row][:] = matrix[row].view(np.uint8)


@_instruction("mma")
def _mma(m: Block, name: tuple[str, ...], operands: Any, active: np.ndarray) -> None:
    """m16n8k16 and m16n8k8 of 16-bit operands, summed in float32."""
    shape = re.fullmatch(r"m16n8k(8|16)", name[3])
    kind = name[-2]
    if shape is None or kind not in ("bf16", "f16") or name[-1] != "f32":
        raise Unknown(".".join(name))
    k = int(shape[1])

    def halves(registers: Sequence[str], warp: int) -> np.ndarray:
        """(registers, 32 lanes, 2) float32."""
        raw = np.stack([m.value(r, "b32")[warp : warp + 32] for r in registers])
        low, high = raw & 0xFFFF, raw >> 16
        parts = np.stack([low, high], -1).astype(np.uint16)
        if kind == "bf16":
            return (parts.astype(np.uint32) << 16).view(np.float32)
        return parts.view(np.float16).astype(np.float32)

    lanes = np.arange(32)
    group, own = lanes // 4, lanes % 4
    results = np.zeros((4, m.threads), np.float32)
    for warp in range(0, m.threads, 32):
        a, b = np.zeros((16, k), np.float32), np.zeros((k, 8), np.float32)
        for index, part in enumerate(halves(operands[1], warp)):
            for half in range(2):
                a[group + 8 * (index % 2), 2 * own + half + 8 * (index // 2)] = part[:, half]
        for index, part in enumerate(
            halves(operands[2] if isinstance(operands[2], tuple) else (operands[2],), warp)
        ):
            for half in range(2):
                b[2 * own + half + 8 * index, group] = part[:, half]
        c = a @ b
        for index in range(4):
            before = m.value(operands[3][index], "f32")[warp : warp + 32]
            results[index, warp : warp + 32] = (
                before + c[group + 8 * (index // 2), 2 * own + index % 2]
            )
    for target, values in zip(operands[0], results, strict=True):
        m.write(target, values, active)

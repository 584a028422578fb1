"""PTX as text taken apart, and the memory that it runs on, for ptx_machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class Fault(Exception):
    """What a GPU would stop for."""


class Unknown(Exception):
    """An instruction that this machine does not have."""


@dataclass
class Memory:
    """Global memory: arrays at the addresses that they have here."""

    arrays: dict[int, tuple[str, np.ndarray]] = field(default_factory=dict)

    def hold(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor on the CPU, whose whole storage may be read and written."""
        held = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        self.arrays[tensor.untyped_storage().data_ptr()] = (name, held)
        return tensor.data_ptr()

    def find(self, address: int, width: int) -> tuple[np.ndarray, int]:
        for start, (_, held) in self.arrays.items():
            if start <= address and address + width <= start + held.size:
                return held, address - start
        nearest = min(self.arrays, key=lambda start: abs(address - start))
        name, held = self.arrays[nearest]
        raise Fault(f"{width} bytes at {address - nearest} of {name}, which has {held.size}")


@dataclass(frozen=True)
class Instruction:
    name: tuple[str, ...]
    operands: tuple[Any, ...]
    predicate: str | None
    negated: bool
    text: str


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int], int, list[str]]:
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.sub(r"(?m)^\s*\.(loc|file|reg|section|pragma)\b.*$", "", ptx)
    ptx = re.sub(
        r"(?m)^\.global .*= \{.*\};$", "", ptx
    )  # a name for reflection, which nothing reads
    head, body = ptx.split("{", 1)
    parameters = re.findall(r"\.param \.\w+ (?:\.ptr \.global \.align \d+ )?(\w+)", head)
    threads = re.search(r"\.reqntid (\d+)", head)
    assert threads is not None
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.sub(r":\s*\n", ":;", body).split(";"):
        text = " ".join(statement.split())
        if match := re.fullmatch(r"(?:[{}] ?)*(\$?\w+):", text):
            labels[match[1]] = len(code)
            continue
        text = re.sub(r"^(?:[{}] ?)+", "", text).strip()
        match = re.fullmatch(r"(?:@(!?)(%p\d+) )?([a-z][\w.:]*) ?(.*)", text)
        if match is None or text.startswith("."):
            continue
        operands = tuple(_operand(part) for part in _split(match[4]))
        predicate, negated = match[2], match[1] == "!"
        name = tuple(match[3].replace("::", ".").split("."))
        code.append(Instruction(name, operands, predicate, negated, text))
    return code, labels, int(threads[1]), parameters


def _split(text: str) -> list[str]:
    """Operands: separated by commas outside of braces and brackets."""
    found = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return [part.strip() for part in found if part.strip()]


def _operand(text: str) -> Any:
    if text.startswith("{"):
        return tuple(_operand(part) for part in _split(text.strip("{} ")))
    if match := re.fullmatch(r"\[ ?(%\w+|global_smem) ?(?:\+ ?(-?\w+))? ?\]", text):
        return ("at", match[1], int(match[2] or "0", 0))
    if text.startswith("0f"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) & ((1 << 64) - 1)
    return text.split("|")[0]

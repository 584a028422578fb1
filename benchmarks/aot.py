"""Generated Triton kernels compiled ahead of time for chips that are not here.

    record(variant, target) = registers, local memory, shared memory, matrix instructions

    python benchmarks/aot.py > kernels.txt                compile all, a line per kernel
    python benchmarks/aot.py --target cuda90 --only qkv   compile some
    python benchmarks/aot.py --summary docs/kernels.md    compile what has changed since
                                                                    the summary there, and write it

Triton brings the assemblers (ptxas, LLVM for AMD), so neither a GPU nor a toolkit is needed. What
is read off the machine code: registers a thread; bytes of local ("stack", "scratch") memory a
thread, which is where spilled registers go; shared memory a program; which matrix instructions.

One thing more is looked for on Hopper: a `wgmma` whose left operand is in registers and that is not
waited for at once. ptxas before CUDA 13.3 may reuse those registers while the instruction still
reads them (triton-lang/triton issue 9433, pull request 11781), which gives wrong sums.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_variants import AotVariant, variants_for_aot

from lorafx.errors import LoweringError


@dataclass(frozen=True)
class AotTarget:
    """A chip to compile for.

    Attributes:
        shared_bytes: shared memory (LDS) that one program may have.
        registers: of one thread at most.
        matrix: what its newest matrix instructions are called, and what older ones it also runs.
    """

    gpu: GPUTarget
    shared_bytes: int
    registers: int
    matrix: tuple[str, ...]


#: by architecture of lorafx.kernels.triton.tiles
TARGETS: Mapping[str, AotTarget] = {
    "cuda80": AotTarget(GPUTarget("cuda", 80, 32), 163 << 10, 255, ("mma.sync",)),
    "cuda90": AotTarget(GPUTarget("cuda", 90, 32), 227 << 10, 255, ("wgmma.mma_async", "mma.sync")),
    "cuda100": AotTarget(GPUTarget("cuda", 100, 32), 227 << 10, 255, ("tcgen05.mma", "mma.sync")),
    "gfx942": AotTarget(GPUTarget("hip", "gfx942", 64), 64 << 10, 512, ("v_mfma",)),
}


#: Bytes of local memory a thread that are no spill to speak of: ptxas parks up to four scalars
#: there, across a loop, to fit one more program on a processor (using 72, 128 or 168 of 255).
PARKED = 16
#: Columns of tensor memory of a program on Blackwell; a kernel that wants more does not start.
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Record:
    """What compiling one variant for one target gave.

    Attributes:
        registers: a thread; on AMD vector and accumulation registers together.
        local_bytes: of local memory a thread, more than PARKED when registers were spilled.
        shared_bytes: of shared memory a program.
        matrix: names of `AotTarget.matrix` whose instructions are in the code, and how many.
        unsafe: `wgmma` still in flight when the registers of their left operand may be reused.
        widest: columns of its widest `wgmma`.
        tma: loads by TMA.
        narrow: loads and stores of global memory of one 16-bit element a thread.
        partitions: groups of warps that have loads or products to themselves.
        tensor_columns: of Blackwell's tensor memory, which has TENSOR_COLUMNS.
    """

    variant: str
    target: str
    registers: int
    local_bytes: int
    shared_bytes: int
    matrix: Mapping[str, int]
    unsafe: int
    widest: int = 0
    tma: int = 0
    partitions: int = 0
    tensor_columns: int = 0
    narrow: int = 0

    @property
    def spilled(self) -> bool:
        return self.local_bytes > PARKED

    @property
    def faults(self) -> tuple[str, ...]:
        """What makes it unfit for the chip; empty where nothing does."""
        limit = TARGETS[self.target].shared_bytes
        found = []
        if self.spilled:
            found.append(f"{self.local_bytes} bytes of local memory per thread")
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if self.unsafe:
            found.append(f"{self.unsafe} wgmma in flight with an operand in registers")
        if self.tensor_columns > TENSOR_COLUMNS:
            found.append(f"{self.tensor_columns} columns of tensor memory")
        return tuple(found)


def compile_variant(variant: AotVariant, target: str) -> Record:
    """Compile `variant` for TARGETS[target] and read the machine code.

    Raises:
        LoweringError: Triton or the assembler refuses it.
    """
    chip = TARGETS[target]
    source = ASTSource(variant.function, variant.signature, {}, variant.attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        compiled = triton.compile(source, target=chip.gpu, options=options)
    except Exception as error:
        raise LoweringError(f"{variant.name} does not compile for {target}: {error}") from error
    cuda = "cubin" in compiled.asm
    text = compiled.asm["ptx" if cuda else "amdgcn"]
    registers, local = _cuda_usage(compiled.asm["cubin"]) if cuda else _hip_usage(text)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", text)) for name in chip.matrix}
    return Record(
        variant.name,
        target,
        registers,
        local,
        compiled.metadata.shared,
        {name: count for name, count in counts.items() if count},
        _in_flight(text),
        max((int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", text)), default=0),
        len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", text)),
        len(re.findall(r"^ *partition\d+\(", compiled.asm["ttgir"], re.MULTILINE)),
        compiled.metadata.tmem_size if cuda else 0,
        len(re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*\.b16", text)),
    )


def _in_flight(ptx: str) -> int:
    """How many `wgmma` with the left operand in registers are not followed by a wait for all."""
    found = 0
    pending = False
    for match in re.finditer(r"wgmma\.(mma_async\S* *\{[^}]*\}, *(\{)?|wait_group\S* +(\d+))", ptx):
        if match[3] is None:
            pending |= match[2] is not None
        else:
            found += pending and match[3] != "0"
            pending = False
    return found + pending


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as cuobjdump tells."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise LoweringError(f"cuobjdump says nothing about resources: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch a thread, from the code object's metadata."""

    def number(key: str) -> int:
        found = re.search(rf"^ +\.{key}: +(\d+)", assembly, re.MULTILINE)
        return int(found[1]) if found else 0

    # vgpr_count has the accumulation registers in it. A spill into those costs moves, no memory.
    return number("vgpr_count"), number("private_segment_fixed_size")


def records(names: Sequence[tuple[str, str]], jobs: int) -> Iterator[Record | LoweringError]:
    """Compile variants (target, name) in `jobs` processes; in the order of `names`."""
    if jobs <= 1:
        yield from map(_compile_named, names)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_compile_named, names)


@functools.cache
def _variants(target: str) -> dict[str, AotVariant]:
    return {variant.name: variant for variant in variants_for_aot(target)}


def _compile_named(named: tuple[str, str]) -> Record | LoweringError:
    target, name = named
    try:
        return compile_variant(_variants(target)[name], target)
    except LoweringError as error:
        return error


def names_of(targets: Iterable[str] = tuple(TARGETS), only: str = "") -> list[tuple[str, str]]:
    """(target, variant) of every variant whose name has a match of the pattern `only`."""
    return [
        (target, name) for target in targets for name in _variants(target) if re.search(only, name)
    ]


def fingerprints() -> dict[str, str]:
    """By strategy, a hash of its variants' sources and launch options, on every target.

    Nothing of the machine or of installed versions goes in: it says whether a row of the summary
    was made from these sources.
    """
    parts: dict[str, list[str]] = {}
    for target in TARGETS:
        for name, variant in sorted(_variants(target).items()):
            options = (variant.num_warps, variant.num_stages, sorted(variant.signature.items()))
            code = variant.text.split('"""', 2)[2]  # behind the heading, which is a comment
            text = "\0".join((target, name, code, repr(options)))
            parts.setdefault(_strategy(name), []).append(text)
    return {
        strategy: hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
        for strategy, texts in parts.items()
    }


def _strategy(variant: str) -> str:
    return variant.partition("/")[0]


BEGIN, END = "<!-- compiled kernels: begin -->", "<!-- compiled kernels: end -->"
_ROW = re.compile(r"^\| (\w+) \| ([0-9a-f]{12}) \| (.*) \|$", re.MULTILINE)


def summary(found: Sequence[Record], kept: Mapping[str, str] | None = None) -> str:
    """The generated part of docs/kernels.md: per strategy and target.

    Args:
        found: what compiling gave.
        kept: rows of strategies that were not compiled again, by `kept_rows`.
    """
    lines = [
        BEGIN,
        f"Triton {triton.__version__}. Each cell: kernels / most registers of a thread / kernels "
        "that spill / most shared memory of a program in KiB; the chip's limits stand in the "
        "heading. Code that several strategies share is counted once. Sources: a hash of the "
        "kernels that the row was made from.",
        "",
        "| strategy | sources | "
        + " | ".join(f"{n}: {t.registers}, {t.shared_bytes >> 10} KiB" for n, t in TARGETS.items())
        + " |",
        "|---" * (len(TARGETS) + 2) + "|",
    ]
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in found:
        groups.setdefault(_strategy(record.variant), {}).setdefault(record.target, []).append(
            record
        )
    rows = dict(kept or {})
    for strategy, each in groups.items():
        rows[strategy] = " | ".join(_cell(each.get(target)) for target in TARGETS)
    hashes = fingerprints()
    lines += [f"| {name} | {hashes[name]} | {cells} |" for name, cells in sorted(rows.items())]
    return "\n".join([*lines, END])


def kept_rows(document: str) -> dict[str, str]:
    """The rows of the summary in `document` that were made from the sources that there are now."""
    hashes = fingerprints()
    return {name: cells for name, own, cells in _ROW.findall(document) if hashes.get(name) == own}


def _cell(group: Sequence[Record] | None) -> str:
    if group is None:
        return "–"
    registers = max(record.registers for record in group)
    spilled = sum(record.spilled for record in group)
    shared = max(record.shared_bytes for record in group) / 1024
    return f"{len(group)} / {registers} / {spilled} / {shared:.0f}"


def _line(record: Record) -> str:
    """`shrink/... cuda90: 64 registers, 2.0 KiB, 0 bytes local, mma.sync`, and what is wrong."""
    matrix = next(iter(record.matrix), "no matrix instruction")
    text = (
        f"{record.variant} {record.target}: {record.registers} registers, "
        f"{record.shared_bytes / 1024:.1f} KiB shared, {record.local_bytes} bytes local, {matrix}"
    )
    if record.tma:
        text += f", {record.tma} TMA loads"
    if record.widest:
        text += f", {record.widest} columns"
    if record.partitions:
        text += f", {record.partitions} partitions"
    return "; ".join([text, *record.faults])


def is_current(document: str) -> bool:
    """Whether the summary in `document` was made from the sources that there are now."""
    found = {name: own for name, own, _ in _ROW.findall(document)}
    return found == fingerprints()


def with_summary(document: str, text: str) -> str:
    """`document` with its generated part replaced, or added at the end."""
    before, begin, rest = document.partition(BEGIN)
    if not begin:
        return f"{document.rstrip()}\n\n{text}\n"
    return before + text + rest.partition(END)[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python benchmarks/aot.py`; 1 where a kernel is unfit."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument(
        "--summary", type=Path, help="the document that the summary is written into"
    )
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--only", default="", help="a pattern for the names of variants")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.summary and (options.target or options.only):
        parser.error("the summary covers all targets and variants; leave out --target and --only")
    names = names_of(options.target or TARGETS, options.only)
    kept: dict[str, str] = {}
    if options.summary:
        document = options.summary.read_text() if options.summary.exists() else ""
        kept = kept_rows(document)
        names = [(target, name) for target, name in names if _strategy(name) not in kept]
    done: list[Record] = []
    failed = 0
    for count, result in enumerate(records(names, options.jobs), 1):
        if sys.stderr.isatty():
            print(f"\rlorafx: {count} of {len(names)} kernels", end="", file=sys.stderr)
        if isinstance(result, LoweringError):
            print(f"{result}", file=sys.stderr)
            failed += 1
            continue
        done.append(result)
        failed += bool(result.faults)
        print(_line(result))
    if options.summary:
        options.summary.write_text(with_summary(document, summary(done, kept)))
    print(f"{len(done)} compiled, {failed} unfit or refused", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

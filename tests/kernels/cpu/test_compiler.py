"""Compiling generated C++: the cache on disk, ids that other processes know, life without g++."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from delta_oracle import assert_delta, random_problem
from full_disk import no_file_over
from toolchain import needs_compiler

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import compiler, delta_kernels, dense_attention, weight_mm, weight_source
from lorafx.kernels.cpu.compiler import compile_library, load_library
from lorafx.kernels.cpu.cpu_source import op_source
from lorafx.kernels.cpu.delta_kernels import build, delta_call
from lorafx.kernels.cpu.dense_attention import AttentionForm
from lorafx.kernels.cpu.kernels import Kernels
from lorafx.kernels.cpu.weight_source import WeightSpec
from lorafx.kernels.ops.delta_spec import DeltaSpec

SOURCE = 'extern "C" int answer() { return 42; }\n'
NO_COMPILER = {"cpp.cxx": ("/nowhere/g++",)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFX_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def _spec(size: int) -> DeltaSpec:
    p = random_problem(x_shape=(2, 7), slots=(0, 1), rows=1, sizes=(size,))
    return p.spec


@needs_compiler
def test_a_source_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_library(SOURCE)
    assert path.parent == folder
    assert load_library(path).answer() == 42
    assert list(folder.iterdir()) == [path]
    find = compiler.find_compiler()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the compiler was called again")

    monkeypatch.setattr(compiler, "find_compiler", lambda: find)
    monkeypatch.setattr(compiler, "_compile", refuse)
    assert compile_library(SOURCE) == path
    with pytest.raises(AssertionError, match="called again"):
        compile_library(SOURCE, ("-DOTHER",))


@needs_compiler
@pytest.mark.parametrize("isa", compiler.ISAS, ids=lambda isa: isa.name)
def test_nothing_is_narrowed_which_clang_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, isa: compiler.Isa
) -> None:
    strict = (*(flag for flag in compiler.BASE_FLAGS if flag not in ("-w", "-O3")), "-O0")
    strict = (*strict, "-Werror=narrowing")  # which no optimisation changes
    monkeypatch.setattr(compiler, "BASE_FLAGS", strict)
    keys = AttentionForm(torch.float32, 64, 2, 64, 64)
    packed = WeightSpec(torch.bfloat16, torch.uint8, torch.bfloat16, None, grouped=True)
    sources = [
        delta_kernels.source(_spec(16), isa),
        weight_source.source(WeightSpec(torch.bfloat16, torch.bfloat16), isa),
        dense_attention.source(keys, isa),
        weight_source.source(packed, isa),
    ]
    ops = delta_kernels.DISPATCHER, dense_attention.ATTENTION_OPS, weight_mm.WEIGHT_OPS
    for source in (*sources, *map(op_source, ops)):
        compile_library(source, isa.flags)


@needs_compiler
def test_a_refused_source_is_an_error_with_the_compilers_words(folder: Path) -> None:
    with pytest.raises(LoweringError, match=r"(?s)refused a generated kernel:\n.*nonsense"):
        compile_library("nonsense;")
    assert list(folder.iterdir()) == []


@needs_compiler
def test_a_kernel_is_tried_once_and_a_refusal_said_once(folder: Path) -> None:
    entered: list[str] = []

    def enter(spec: str, isa: compiler.Isa, library: ctypes.CDLL) -> int:
        entered.append(spec)
        return int(library.answer())

    kernels = Kernels("answers are slow", lambda spec, isa: spec, enter)
    assert [kernels.ready(SOURCE), kernels.ready(SOURCE)] == [42, 42]
    assert entered == [SOURCE]
    for _ in range(2):
        with pytest.warns(LorafxWarning, match="answers are slow: .* refused") as said:
            found = [kernels.ready("nonsense;", again=again) for again in (False, False, True)]
        assert found == [None] * 3
        assert len(said) == 1
        kernels.forget()
    wide = Kernels("", lambda spec, isa: spec, enter, lanes=1 << 10)
    assert wide.ready(SOURCE) is None  # not generated, of which nothing is said


@needs_compiler
@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("place", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA runs in plain aten, as it does without a compiler."""
    (tmp_path / "file").touch()
    folder = tmp_path / ("file" if place == "a file" else "kernels")
    monkeypatch.setenv("LORAFX_CACHE_DIR", str(folder))
    delta_kernels.GENERATED.forget()
    room = no_file_over(16) if place == "a full disk" else nullcontext()
    with room, pytest.warns(UserWarning, match="cannot be written.*set LORAFX_CACHE_DIR"):
        assert build(_spec(104)) is None
    if place == "a full disk":
        assert list(folder.iterdir()) == []
        assert build(_spec(104)) is not None


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The choice of instruction set is made anew, in the test and after it."""
    compiler.best_isa.cache_clear()
    yield
    compiler.best_isa.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_no_compiler_means_aten_and_one_warning(folder: Path) -> None:
    delta_kernels.GENERATED.forget()
    with torch._inductor.config.patch(NO_COMPILER):
        with pytest.warns(UserWarning, match="plain aten on this CPU.*no C\\+\\+ compiler"):
            assert build(_spec(101)) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert build(_spec(102)) is None
        p = random_problem(x_shape=(2, 7), slots=(0, 1), rows=1, sizes=(101,))
        y = p.y.clone()
        op, arguments = delta_call(_spec(101), y, p.x, *p.bank, rows=1)
    assert op is torch.ops.lorafx.add_delta_.default
    op(*arguments)
    assert_delta(p, y)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_matrix_tiles_have_their_shapes_again(dtype: torch.dtype) -> None:
    """Libraries that set a thread's shapes once and for all (ggml) find them behind a product."""
    if not compiler.best_isa().matrix_tiles:
        pytest.skip("a CPU without matrix tiles")
    code = (
        'extern "C" void set(const char (*s)[64]) { __asm__ volatile("ldtilecfg %0" :: "m"(*s)); }'
    )
    code += 'extern "C" void get(char (*s)[64]) { __asm__ volatile("sttilecfg %0" : "=m"(*s)); }'
    library = ctypes.CDLL(str(compile_library(code, compiler.best_isa().flags)))
    shapes = bytes([1, *[0] * 15, 8, *[0] * 31, 3, *[0] * 15])  # one tile, three rows of 8 bytes
    before, after = ctypes.create_string_buffer(shapes, 64), ctypes.create_string_buffer(64)
    x, scale = torch.ones(3, 64).bfloat16(), torch.ones(2, 64, 2) if dtype == torch.uint8 else None
    weight = torch.ones(64, 64 if scale is None else 32).to(dtype)
    torch.ops.lorafx.weight_mm(x, weight, scale=scale)  # which compiles it
    library.set(before)
    torch.ops.lorafx.weight_mm(x, weight, scale=scale)
    library.get(after)
    library.set(ctypes.create_string_buffer(64))
    assert after.raw == shapes

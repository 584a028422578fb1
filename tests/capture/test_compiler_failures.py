"""Compilers that fail: the caller gets an error of lorafx that says what failed on which model and
what to try, from every road."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from attached import fresh_dynamo  # noqa: F401  (the fixture)
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES
from toolchain import needs_compiler
from torch import Tensor, nn
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import CppCompileError
from torch._inductor.lowering import lowerings, register_lowering

from lorafx.capture.executable import refusing
from lorafx.errors import CapacityError, CaptureError, LoweringError, Setting, respelled
from lorafx.passes.outline import Outline
from lorafx.passes.provenance import Provenance

K = 6
MIXED = ["a", None, "a"]


@torch.library.custom_op("lorafx_tests::uncompiled", mutates_args=())
def uncompiled(x: Tensor) -> Tensor:
    """An operator whose lowering fails in Inductor."""
    return x * 2


uncompiled.register_fake(torch.empty_like)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}

    def head(self, x: Tensor) -> Tensor:
        return x


class Odd(Net):
    def head(self, x: Tensor) -> Tensor:
        return uncompiled(x)


def case(tmp_path: Path, net: nn.Module) -> Case:
    torch.manual_seed(0)
    return Case(
        net.eval(), {"a": oracle.save_adapter(net, tmp_path, rank=2, targets=oracle.linears(net))}
    )


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 4, K, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def no_lowering() -> Iterator[None]:
    op = torch.ops.lorafx_tests.uncompiled.default

    @register_lowering(op)
    def fails(x: Any) -> Any:
        raise NotImplementedError("nobody has written this one")

    yield
    del lowerings[op]


def test_a_pass_that_fails_is_named_with_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, gm: Any, ctx: Any) -> int:
        raise KeyError("the pass has a mistake")

    monkeypatch.setattr(Outline, "run", run)
    c = case(tmp_path, Net())
    cm = c.compile()
    with pytest.raises(CaptureError, match=r"the pass 'outline' failed on a graph of Net: ") as got:
        cm(**batch(), adapter_names=MIXED)
    assert "the pass has a mistake" in str(got.value)
    assert "Options(passes={'outline': False})" in str(got.value)
    assert got.value.__cause__ is not None
    check_mixed(cm, c, [None, None, None], batch())
    without = c.compile({"passes": {"outline": False}})
    check_mixed(without, c, MIXED, batch())


@pytest.mark.usefixtures("no_lowering")
def test_inductor_fails_on_graphs_of_either_kind(tmp_path: Path) -> None:
    c = case(tmp_path, Odd())
    cm = c.compile({"lowering": "inductor", "base_graphs": True})
    for names in (MIXED, [None] * 3):
        with pytest.raises(LoweringError, match="nobody has written this one") as got:
            cm(**batch(), adapter_names=names)
        assert "the lowering 'inductor' failed on a graph of Odd" in str(got.value)
        assert 'Options(lowering="reference")' in str(got.value)
    check_mixed(c.compile(), c, MIXED, batch())


@pytest.mark.slow
@needs_compiler
def test_a_cpp_compiler_fails_and_nothing_is_kept(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise CppCompileError(["g++"], "no space left on device")

    folder, names = tmp_path / "graphs", ["a1", None, "a3"]
    options = {"lowering": "inductor", "cache": str(folder)}
    cm, inputs = llama.compile(options, dynamic=True), FAMILIES["llama"].inputs(3, 4)
    CppPythonBindingsCodeCache.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(CppPythonBindingsCodeCache, "_load_library", fail)
        for _ in range(2):
            with pytest.raises(LoweringError, match="'inductor' failed on a graph of Ll") as got:
                cm(**inputs, adapter_names=names)
            assert "no space left on device" in str(got.value)
            assert not cm._session.backend.records
    assert not [file for file in folder.rglob("*") if file.is_file()]
    CppPythonBindingsCodeCache.cache_clear()  # it keeps compilers that have failed
    check_mixed(cm, llama, names, inputs)
    assert len(cm._session.backend.records) == 1
    assert any(file.is_file() for file in folder.rglob("*"))


def test_graphs_with_adapters_fail_and_the_error_says_how_the_base_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, gm: Any, ctx: Any) -> int:
        raise TypeError("no")

    c = case(tmp_path, Net())
    cm = c.compile({"base_graphs": False})
    apart = c.compile({"base_graphs": True})
    with monkeypatch.context() as broken:
        broken.setattr(Provenance, "run", run)
        for names in ([None] * 3, MIXED):
            with pytest.raises(CaptureError, match=r"\(base_graphs=True\) serves calls with"):
                cm(**batch(), adapter_names=names)
        with pytest.raises(CaptureError, match="without an adapter are served as before"):
            apart(**batch(), adapter_names=MIXED)
        check_mixed(apart, c, [None] * 3, batch())
        assert [record.lora for record in apart._session.backend.records] == [False]
    for model in (cm, apart):
        check_mixed(model, c, MIXED, batch())
        check_mixed(model, c, [None] * 3, batch())


def test_an_error_that_is_raised_later_keeps_its_settings() -> None:
    needed = Setting("max_rank", "LoraConfig(max_rank=8)")
    error = CapacityError(f"too small; compile with {needed}").naming(needed)
    with pytest.raises(CapacityError) as raised:
        refusing(error)()
    text = respelled(raised.value, lambda setting: f"--{setting.field}")
    assert text == "too small; compile with --max_rank"

"""Weights of strangers: what claims to be more than the file, or is no dense tensor."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_adapters import CONFIG, PICKLED, SAFETENSORS, SETTINGS, read, small, tensors, write

import lorafx
from lorafx.errors import CheckpointError, LorafxError

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL, SITES = small()


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
HEADERS = {
    "terabytes of header": (1 << 62).to_bytes(8, "little") + b"{}",
    "terabytes of data": header({KEY: entry([1 << 38, 6], 24 << 38)}, b"\0" * 24),
    "a product that overflows": header({KEY: entry([1 << 62, 1 << 62], 0)}),
    "no numbers, and huge": header({KEY: entry([0, 1 << 63], 0)}),
    "a size below zero": header({KEY: entry([-1, 6], 0)}),
    "integers": header({KEY: entry([2, 6], 12, "I8")}, b"\0" * 12),
    "an unknown dtype": header({KEY: entry([2, 6], 12, "X1")}, b"\0" * 12),
    "no dimensions": header({KEY: entry([], 4)}, b"\0" * 4),
    "a long name": header({"a" * 100_000: entry([1], 4)}, b"\0" * 4),
    "a nested header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a base weight of another dtype": header(
        {"base_model.model.embed.weight": entry([11, 6], 66, "F8_E4M3")}, b"\0" * 66
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_that_claim_anything(case: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SAFETENSORS).write_bytes(HEADERS[case])
    with pytest.raises(CheckpointError):
        read(tmp_path, MODEL, SITES)


def _sparse() -> torch.Tensor:
    return torch.eye(6).to_sparse()


class _Grown:
    """A tensor of 4 GiB over the storage of one number, which `set_` would let grow."""

    def __reduce__(self) -> Any:
        storage = torch.ones(1).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (1 << 30,), (1,), False, {})


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (_sparse, "is a sparse tensor"),
    "nested": (  # torch 2.15 does not read it
        lambda: torch.nested.nested_tensor([torch.ones(2)]),
        "is a nested tensor|cannot be read with weights_only=True",
    ),
    "meta": (lambda: torch.ones(2, 6, device="meta"), "on the device meta"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2, 6), 0.1, 0, torch.qint8),
        "quantised",
    ),
    "expanded": (lambda: torch.ones(1).expand(1 << 20, 1 << 20), "more than its saved storage"),
    "grown": (_Grown, "claim|not resizable"),
    "a number": (lambda: 3, "does not hold a mapping"),
    "code": (lambda: os.system, "cannot be read with weights_only"),
}


@pytest.mark.parametrize("case", ODD)
def test_pickles_of_other_things_than_dense_tensors(case: str, tmp_path: Path) -> None:
    make, message = ODD[case]
    write(tmp_path)
    (tmp_path / SAFETENSORS).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**tensors(), KEY: make()}, tmp_path / PICKLED)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, MODEL, SITES)


def _deflated(file: Path, size: int) -> None:
    """An archive whose one tensor is `size` zeros, compressed to a thousandth."""
    torch.save({KEY: torch.zeros(size // 4)}, file)
    with zipfile.ZipFile(file) as saved:
        entries = {info.filename: saved.read(info) for info in saved.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in entries.items():
            made.writestr(name, data)


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """Peak of the resident memory, which Linux lets a process reset."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    write(tmp_path)
    for case, data in HEADERS.items():
        (tmp_path / case).mkdir()
        write(tmp_path / case)
        (tmp_path / case / SAFETENSORS).write_bytes(data)
    for case in ("expanded", "grown"):
        write(tmp_path / case)
        (tmp_path / case / SAFETENSORS).unlink()
        torch.save({KEY: ODD[case][0]()}, tmp_path / case / PICKLED)
    write(tmp_path / "deflated")
    (tmp_path / "deflated" / SAFETENSORS).unlink()
    _deflated(tmp_path / "deflated" / PICKLED, 1 << 27)
    with pytest.raises(CheckpointError):
        read(tmp_path / "grown", MODEL, SITES)  # what is imported on the way
    clear.write_text("5")
    before = peak()
    for case in (*HEADERS, "expanded", "grown", "deflated"):
        with pytest.raises(CheckpointError):
            read(tmp_path / case, MODEL, SITES)
    assert peak() - before < 64 << 20


def test_nothing_changes(tmp_path: Path) -> None:
    model, _ = small()
    cm = lorafx.compile(
        model,
        lorafx.LoraConfig(target_modules=["q_proj", "v_proj", "experts"]),
        adapters={"a": write(tmp_path / "good")},
        options={"lowering": "reference"},
    )
    store = cm._session.store
    before, slots, size = store["a"], store.resident, cm.memory()
    bad = write(tmp_path / "bad", target_modules="(.|.)*X", lora_alpha=float("nan"))
    for _ in range(2):
        with pytest.raises(LorafxError):
            cm.load_adapter(bad, "a")
        (bad / CONFIG).write_text(json.dumps(SETTINGS))
        (bad / SAFETENSORS).write_bytes(HEADERS["integers"])
    assert (store["a"], store.resident, cm.memory()) == (before, slots, size)

"""Files of strangers: only LorafxErrors come out, at once, and memory stays that of the file."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_adapters import CONFIG, PICKLED, SAFETENSORS, SETTINGS, read, small, tensors, write
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lorafx
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError, LorafxError
from lorafx.model.targets import PatternError

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL, SITES = small()


# --- configurations ---

#: Minutes and more for a matcher that backtracks, on paths of a few dozen letters.
CATASTROPHIC = [r"(([a-z_.0-9])*)*X", r"(.|.)*X", r"(\w|_|\.)+\d{9}", r"(?=(.*.*)*X)a"]


@pytest.mark.parametrize("text", CATASTROPHIC)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_patterns_that_backtrack_for_ever(field: str, text: str, tmp_path: Path) -> None:
    own = SETTINGS[field]
    write(tmp_path, **{field: {text: 2, **own} if isinstance(own, dict) else text})
    started = time.process_time()
    with contextlib.suppress(PatternError):  # when its time is up
        assert len(read(tmp_path, MODEL, SITES).weights) == 7  # they match nothing
    assert time.process_time() - started < 10
    with pytest.raises(LorafxError):  # as what to compile with
        lorafx.explain(small()[0], {**SETTINGS, "target_modules": text})


def test_a_configuration_of_very_many_patterns(tmp_path: Path) -> None:
    patterns = {f".*{i}.*[^x]+X": 2 for i in range(30_000)}
    for field in ("rank_pattern", "alpha_pattern"):
        write(tmp_path, **{field: patterns})
        started = time.process_time()
        with pytest.raises(CheckpointError, match=r"has 30000 patterns; there may be"):
            read(tmp_path, MODEL, SITES)
        assert time.process_time() - started < 30  # most of it writes and reads the JSON


DEEP = "(" * 10_000 + ")" * 10_000
MALFORMED: list[tuple[str, Any, str]] = [
    ("target_modules", DEEP, "nested too deep"),
    ("target_modules", "*q", "is not a regular expression"),
    ("rank_pattern", {"(?i)q_proj": 2}, "is not a regular expression"),  # PEFT puts it in a group
    ("lora_alpha", 10**400, "lora_alpha must be a finite number"),
    ("lora_alpha", float("nan"), "lora_alpha must be a finite number"),
    ("r", 0, "r must be a positive integer"),
    ("rank_pattern", {"q_proj": "2"}, "must be a positive integer"),
    ("rank_pattern", [1], "must map module names"),
    ("layers_pattern", 7, "layers_pattern must be the name"),
    ("layers_to_transform", [0, "1"], "layers_to_transform must be integers"),
    ("use_dora", "false", "use_dora must be true or false"),
    ("base_model_name_or_path", {"a": 1}, "must be a string"),
    ("target_parameters", [["a"]], "must be a list of strings"),
    ("modules_to_save", "score", "must be a list of names"),
    ("trainable_token_indices", [3, -1], "must be a list of token ids"),
    ("trainable_token_indices", [3, 4, 3], "names a token twice"),
    ("alora_invocation_tokens", "go", "must be a list of token ids"),
    ("peft_type", ["LORA"], "only LORA adapters"),
    ("bias", [0], "bias must be none, lora_only or all"),
]


@pytest.mark.parametrize(("field", "value", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_values_that_cannot_be_meant(field: str, value: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, **{field: value})
    for source in (tmp_path, {**SETTINGS, field: value}):
        with pytest.raises(CheckpointError, match=message):
            PeftConfig.read(source)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, MODEL, SITES)


FILES: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "digits": b'{"r": ' + b"9" * 5_000 + b"}",
    "a list": b"[1, 2]",
    "nothing": b"",
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_configuration(case: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(FILES[case])
    with pytest.raises(CheckpointError, match=r"adapter_config.json (cannot be read|must hold)"):
        read(tmp_path, MODEL, SITES)


# --- what lies where a file should be ---
@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS, PICKLED])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_no_file_in_its_place(name: str, kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, pickled=name == PICKLED) / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"has no adapter_config|holds no adapter weights"):
        read(tmp_path, MODEL, SITES)


@pytest.mark.parametrize("folder", ["a\0b", "x" * 5_000, "", "/dev/null", "/proc/self/mem"])
def test_paths_that_are_no_folders(folder: str) -> None:
    with pytest.raises(CheckpointError):
        read(Path(folder), MODEL, SITES)


# --- anything at all ---
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write(folder, pickled=True)
    return write(folder)


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from("=+-"), st.binary(max_size=9)),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """`data` with bytes overwritten (=), put in (+) or taken out (-)."""
    for where, how, what in changes:
        at = int(where * len(data))
        data = data[:at] + (b"" if how == "-" else what) + data[at + (how != "+") * len(what) :]
    return data


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS, PICKLED])
@settings(max_examples=40)
@given(changes=edits)
@example(changes=[(0.5, "-", b"0" * 9)])
def test_damaged_files(name: str, changes: Any, good: Path, tmp_path: Path) -> None:
    for other in (CONFIG, PICKLED if name == PICKLED else SAFETENSORS):
        (tmp_path / other).write_bytes((good / other).read_bytes())
    (tmp_path / name).write_bytes(edited((good / name).read_bytes(), changes))
    with contextlib.suppress(LorafxError):
        read(tmp_path, MODEL, SITES)


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

"""Files of strangers: only LorafxErrors come out, at once, and memory stays that of the file."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_adapters import CONFIG, PICKLED, SAFETENSORS, SETTINGS, read, small, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import lorafx
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError, LorafxError
from lorafx.model.targets import PatternError

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL, SITES = small()


def test_the_adapter_is_sound(tmp_path: Path) -> None:
    for pickled in (False, True):
        adapter = read(write(tmp_path / str(pickled), pickled=pickled), MODEL, SITES)
        assert len(adapter.weights) == 7


# --- configurations ---

#: Minutes and more for a matcher that backtracks, on paths of a few dozen letters.
CATASTROPHIC = [
    r"(([a-z_.0-9])*)*X",
    r"(.|.)*X",
    r"(\w|_|\.)+\d{9}",
    r"(?=(.*.*)*X)a",
]


@pytest.mark.parametrize("text", CATASTROPHIC)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]
)
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
    ("rank_pattern", {DEEP: 2}, "nested too deep"),
    ("target_modules", "*q", "is not a regular expression"),
    ("target_modules", "a{999999999999}", "is not a regular expression"),
    ("rank_pattern", {"(?i)q_proj": 2}, "is not a regular expression"),  # PEFT puts it in a group
    ("alpha_pattern", {"a)(b|": 2, "[": 1}, "is not a regular expression"),
    ("lora_alpha", 10**400, "lora_alpha must be a finite number"),
    ("lora_alpha", float("nan"), "lora_alpha must be a finite number"),
    ("lora_alpha", float("-inf"), "lora_alpha must be a finite number"),
    ("lora_alpha", 1e300, "lora_alpha must be a finite number"),
    ("alpha_pattern", {"q_proj": 10**400}, "must be a finite number"),
    ("r", 0, "r must be a positive integer"),
    ("r", 10**400, "r must be a positive integer"),
    ("r", float("inf"), "r must be a positive integer"),
    ("rank_pattern", {"q_proj": "2"}, "must be a positive integer"),
    ("rank_pattern", [1], "must map module names"),
    ("layers_pattern", 7, "layers_pattern must be the name"),
    ("layers_pattern", ["layers", 7], "layers_pattern must be the name"),
    ("layers_pattern", "layers|h", "layers_pattern must be the name"),
    ("layers_pattern", "(.*)*", "layers_pattern must be the name"),
    ("layers_to_transform", [0, "1"], "layers_to_transform must be integers"),
    ("layers_to_transform", {"0": 1}, "layers_to_transform must be integers"),
    ("use_dora", "false", "use_dora must be true or false"),
    ("use_rslora", [0], "use_rslora must be true or false"),
    ("fan_in_fan_out", 0.5, "fan_in_fan_out must be true or false"),
    ("base_model_name_or_path", {"a": 1}, "must be a string"),
    ("target_parameters", [["a"]], "must be a list of strings"),
    ("target_modules", [1, "a"], "must be a string or a list of strings"),
    ("peft_type", ["LORA"], "only LORA adapters"),
    ("bias", [0], "bias must be none, lora_only or all"),
    ("init_lora_weights", 10**400, "init_lora_weights = "),
]


@pytest.mark.parametrize(("field", "value", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_values_that_cannot_be_meant(field: str, value: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, **{field: value})
    for source in (tmp_path, {**SETTINGS, field: value}):
        with pytest.raises(CheckpointError, match=message):
            PeftConfig.read(source)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, MODEL, SITES)


def test_values_of_dicts_that_json_cannot_have() -> None:
    class Odd:
        def __len__(self) -> int:
            raise TypeError

    numbers = torch.ones(3)
    for value in (10**9000, Odd(), numbers, torch.tensor(1), b"a", {1: 2}, object()):
        for field in SETTINGS:
            with contextlib.suppress(CheckpointError):
                PeftConfig.read({**SETTINGS, field: value})
        with pytest.raises(CheckpointError):
            PeftConfig.read({**SETTINGS, "some_field": value})
    with pytest.raises(CheckpointError, match="must map field names"):
        PeftConfig.read({**SETTINGS, 3: 1})


@pytest.mark.parametrize("version", ["9" * 5_000 + ".1", "0." + "9" * 5_000, 19, [0, 19], "", "x"])
def test_versions_that_say_nothing(version: Any) -> None:
    assert PeftConfig.read({**SETTINGS, "peft_version": version}).peft_version is None


FILES: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "digits": b'{"r": ' + b"9" * 5_000 + b"}",
    "no UTF-8": b'{"r": "\xff\xfe"}',
    "a byte order mark": b"\xff\xfe{\x00}\x00",
    "a list": b"[1, 2]",
    "a string": b'"LORA"',
    "null": b"null",
    "nothing": b"",
    "a NUL": b"{\x00}",
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_configuration(case: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(FILES[case])
    with pytest.raises(CheckpointError, match=r"adapter_config.json (cannot be read|must hold)"):
        read(tmp_path, MODEL, SITES)


# --- what lies where a file should be ---


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS, PICKLED])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "nowhere"])
def test_no_file_in_its_place(name: str, kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, pickled=name == PICKLED) / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"device": "/dev/zero", "loop": file, "nowhere": "/nowhere"}[kind])
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
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=edits)
@example(changes=[(0.5, "-", b"0" * 9)])
def test_damaged_files(name: str, changes: Any, good: Path, tmp_path: Path) -> None:
    for other in (CONFIG, PICKLED if name == PICKLED else SAFETENSORS):
        (tmp_path / other).write_bytes((good / other).read_bytes())
    (tmp_path / name).write_bytes(edited((good / name).read_bytes(), changes))
    with contextlib.suppress(LorafxError):
        read(tmp_path, MODEL, SITES)

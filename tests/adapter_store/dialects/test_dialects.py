"""Adapters in every dialect: a batch of all equals dense merges."""

from __future__ import annotations

from pathlib import Path

import pytest
from dense_merge import REFERENCE, Case, check_mixed
from dialect_files import WRITERS, alpha, source
from safetensors.torch import load_file, save
from tiny_models import token_inputs

import lorafx
from lorafx.adapter_store.checkpoint import load_state
from lorafx.errors import (
    ConfigError,
)

pytestmark = [
    pytest.mark.usefixtures("fixed_sizes"),
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore"),
]
DIALECTS = sorted(WRITERS)


@pytest.fixture(scope="module")
def written(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    suffix = {"kohya": ".safetensors", "diffusers": ".safetensors", "loralib": ".pt"}
    return {
        name: WRITERS[name](case.folders[name], folder / f"{name}{suffix.get(name, '')}")
        for name in DIALECTS
    }


@pytest.fixture(scope="module")
def compiled(case: Case, written: dict[str, Path]):
    adapters = {name: source(name, case.folders[name], file) for name, file in written.items()}
    return lorafx.compile(case.model(), adapters, options=REFERENCE)


def test_a_batch_of_all_dialects_is_that_of_dense_merges(case: Case, compiled) -> None:
    check_mixed(compiled, case, [*DIALECTS, None], token_inputs(len(DIALECTS) + 1, 7))
    check_mixed(compiled, case, ["kohya"], token_inputs(1, 7))
    before = compiled.recompiles
    check_mixed(compiled, case, ["mlx", None, "peft"], token_inputs(3, 5))
    assert compiled.recompiles == before


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_told_by_its_keys_and_may_be_forced(
    name: str, case: Case, written: dict[str, Path]
) -> None:
    told = load_state(source(name, case.folders[name], written[name]), case.base)
    assert told.dialect == name
    asked = source(name, case.folders[name], written[name])
    forced = load_state(
        lorafx.AdapterSource(asked.source, config=asked.config, dialect=name), case.base
    )
    assert forced.tensors.keys() == told.tensors.keys()


def test_what_load_adapter_takes_in_memory_and_as_bytes(case: Case, compiled, written) -> None:
    held = load_file(written["kohya"])
    for given_as in (held, save(held), written["kohya"].read_bytes()):
        compiled.load_adapter(given_as, "kohya")
        check_mixed(compiled, case, ["kohya", None], token_inputs(2, 4))
    content = written["loralib"].read_bytes()
    config = {"lora_alpha": alpha(case.folders["loralib"])}
    compiled.load_adapter(lorafx.AdapterSource(content, config=config), "loralib")
    check_mixed(compiled, case, ["loralib", None], token_inputs(2, 4))


def test_an_unknown_dialect_names_the_known_ones(case: Case, written) -> None:
    with pytest.raises(ConfigError, match=r"no dialect 'koya'; nearest: kohya"):
        load_state(lorafx.AdapterSource(written["kohya"], dialect="koya"), case.base)

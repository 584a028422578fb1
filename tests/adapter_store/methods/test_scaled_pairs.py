"""VeRA adapters that scale one pair A, B: each has two vectors of a linear, and no factors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import TOLERANCE, error, random_base
from method_files import TARGETS, merged, save
from torch import nn

import lorafx
from lorafx.runtime.marking import config_covering

RANK = 24
ROADS: Mapping[str, lorafx.Options] = {
    "eager": lorafx.Options(start="eager"),
    "compiled": lorafx.Options(start="compiled", lowering="reference"),
}


def vera(**fields: Any) -> peft.VeraConfig:
    return peft.VeraConfig(**{"r": RANK, "target_modules": TARGETS, "d_initial": 1.0, **fields})


class Files:
    """Three adapters of one pair, one of another, one of another method, and a base."""

    def __init__(self, root: Path) -> None:
        self.base = random_base("llama")
        configs = {
            "one": vera(),
            "second one": vera(),
            "third": vera(),
            "seed": vera(projection_prng_key=5),
            "lora": peft.LoraConfig(r=3, lora_alpha=4, target_modules=TARGETS),
        }
        self.folders = {name: save(self.base, c, root / name) for name, c in configs.items()}
        exact = {name: merged(self.base, folder) for name, folder in self.folders.items()}
        self.exact: dict[Any, nn.Module] = {None: copy.deepcopy(self.base).double(), **exact}

    def of(self, *names: str) -> dict[str, Path]:
        return {name: self.folders[name] for name in names}

    def check(self, cm: Any, names: list[str | None]) -> None:
        ids = torch.randint(0, 60, (len(names), 6))
        with torch.no_grad():
            want = [self.exact[n](ids[i : i + 1]).logits for i, n in enumerate(names)]
        got = cm(ids, adapter_names=names).logits.double()
        assert error(got, torch.cat(want)) <= TOLERANCE
        assert error(want[0], self.exact[None](ids[:1]).logits) > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("road", ROADS)
def test_mixed_batches(files: Files, road: str) -> None:
    adapters = files.of("one", "second one", "lora")
    config = lorafx.LoraConfig(max_rank=4, max_adapters=3)
    cm: Any = lorafx.compile(
        copy.deepcopy(files.base), config, adapters=adapters, options=ROADS[road]
    )
    files.check(cm, ["one", None, "second one", "lora"])
    graphs = cm.recompiles
    cm.load_adapter(files.folders["third"], "third")
    files.check(cm, ["second one", "third", "one", None])
    files.check(cm, ["lora", "one", "one", "third"])
    assert cm.recompiles == graphs
    cm.merge("one")
    ids = torch.randint(0, 60, (1, 6))
    assert error(cm(ids).logits.double(), files.exact["one"](ids).logits) <= TOLERANCE


def test_an_adapter_has_its_vectors_alone(files: Files) -> None:
    cm: Any = lorafx.compile(copy.deepcopy(files.base), adapters=files.of("one", "lora"))
    host = cm._session.store.hold("one").numbers
    sizes = [files.base.get_submodule(f"model.layers.0.{path}") for path in PATHS]
    assert host.nbytes == sum(4 * (RANK + linear.out_features) for linear in sizes)
    views = [g.bank.pair_a for g in cm._session.program.groups]
    storages = {view.untyped_storage().data_ptr() for view in views if view is not None}
    assert len(views) == 4
    assert len(storages) == 1


PATHS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj")


def test_another_pair_needs_room_for_factors(files: Files) -> None:
    config = lorafx.LoraConfig(target_modules=TARGETS, max_rank=4)
    narrow: Any = lorafx.compile(copy.deepcopy(files.base), config, adapters=files.of("one"))
    with pytest.raises(lorafx.CapacityError, match=rf"max_rank.*{RANK}|{RANK}.*max_rank"):
        narrow.load_adapter(files.folders["seed"], "seed")
    both: Any = lorafx.compile(
        copy.deepcopy(files.base), adapters=files.of("one", "seed"), options=ROADS["compiled"]
    )
    files.check(both, ["seed", "one", None])


def test_room_for_factors_is_used(files: Files) -> None:
    config = lorafx.LoraConfig(target_modules=TARGETS, max_rank=2 * RANK)
    cm: Any = lorafx.compile(
        copy.deepcopy(files.base), config, adapters=files.of("one", "seed"), options=ROADS["eager"]
    )
    assert not any(site.own_rows for site in cm._session.program.sites)
    files.check(cm, ["one", "seed", None])
    both = {"one": 0.5, "seed": 2.0}
    assert cm(torch.zeros(1, 2, dtype=torch.long), adapter_names=[both]).logits.isfinite().all()


def test_sums_have_one_scaled_pair(files: Files) -> None:
    cm: Any = lorafx.compile(
        copy.deepcopy(files.base),
        adapters=files.of("one", "second one", "lora"),
        options=ROADS["eager"],
    )
    with pytest.raises(lorafx.CapacityError, match="modules_to_save"):
        cm(torch.zeros(1, 2, dtype=torch.long), adapter_names=[{"one": 1, "second one": 1}])
    with pytest.raises(lorafx.ConfigError, match=r"values beyond the range of torch.float32"):
        cm(torch.zeros(1, 2, dtype=torch.long), adapter_names=[{"one": 1e39}])
    ids = torch.randint(0, 60, (1, 6))
    got = cm(ids, adapter_names=[{"one": 0.5, "lora": -2.0}]).logits
    want = copy.deepcopy(files.exact[None])
    with torch.no_grad():
        for path, weight in want.named_parameters():
            base = files.exact[None].get_parameter(path)
            for name, share in (("one", 0.5), ("lora", -2.0)):
                weight += share * (files.exact[name].get_parameter(path) - base)
        assert error(got.double(), want(ids).logits) <= TOLERANCE


def test_folders_that_are_loaded_later(files: Files) -> None:
    """As a server's: room is made from folders, one after the other."""
    config = lorafx.LoraConfig(target_modules=TARGETS, max_rank=4)
    covering = config_covering(config, files.of("lora", "one", "second one"), files.base)
    cm: Any = lorafx.compile(copy.deepcopy(files.base), covering, options=ROADS["eager"])
    for name, folder in files.of("one", "lora").items():
        cm.load_adapter(folder, name)
    files.check(cm, ["one", None, "lora"])


def test_packages_have_factors(files: Files, tmp_path: Path) -> None:
    inputs, path = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}, tmp_path / "m.pt2"
    base = copy.deepcopy(files.base)
    with pytest.raises(lorafx.UnsupportedAdapterError, match=rf"LoraConfig\(max_rank={RANK}\)"):
        lorafx.export(base, files.of("one"), inputs, path)


#: A head whose pair takes more room than its weight, and a path that ends another one.
NAMED = (
    nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)),
    nn.Sequential(
        OrderedDict(fc=nn.Linear(8, 8), a=nn.Sequential(OrderedDict(fc=nn.LayerNorm(8))))
    ),
)


@pytest.mark.parametrize(("base", "targets"), zip(NAMED, (["0", "1"], "fc"), strict=True))
def test_rooms_of_single_linears(base: nn.Module, targets: Any, tmp_path: Path) -> None:
    folder, x = save(base, vera(target_modules=targets), tmp_path / "a"), torch.randn(2, 8)
    cm: Any = lorafx.compile(copy.deepcopy(base).eval(), [folder], options=ROADS["eager"])
    want = merged(base, folder)(x.double())
    assert error(cm(x, adapter_names=["a", None])[:1].double(), want[:1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("pair", "got"),
    [
        ((torch.zeros(2, 3), torch.zeros(4, 3)), r"\[2, 3\]\) and torch.Size\(\[4, 3\]"),
        ((torch.zeros(2, 3), None), r"\[2, 3\]\) and NoneType"),
        ("ab", "str"),
    ],
)
def test_a_pair_that_is_none(pair: Any, got: str) -> None:
    with pytest.raises(lorafx.ConfigError, match=rf"scaled_pair.*{got}"):
        lorafx.LoraConfig(scaled_pair=pair)

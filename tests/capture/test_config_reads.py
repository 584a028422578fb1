"""Fields of a configuration are read while a graph is traced, as they are read without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import captured
from torch import Tensor, nn
from torch._dynamo.variables import UserDefinedObjectVariable
from transformers import PreTrainedConfig

from lorafx.capture import config_reads


class Config(PreTrainedConfig):
    model_type = "reads"
    attribute_map = {"width": "hidden_size"}  # noqa: RUF012
    hidden_size: int = 4
    scale: float = 2.0
    shift: float = 1.0
    turned: bool = False


class Reads(nn.Module):
    """Reads fields by their names, by another's, and one that there may not be."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config(num_hidden_layers=2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        x = self.linear(x) * config.scale + config.shift
        x = x + config.width + getattr(config, "no_such_field", 0.5)
        return -x if config.turned else x


X = torch.randn(3, 4)
NAMES = ["a", None, "b"]


def run(case: Any, cm: Any) -> Tensor:
    got: Tensor = cm(X, adapter_names=NAMES)
    rows = [case.alone(name)(X[row : row + 1]) for row, name in enumerate(NAMES)]
    torch.testing.assert_close(got, torch.cat(rows), rtol=0, atol=1e-5)
    return got


@pytest.mark.skipif(
    not hasattr(UserDefinedObjectVariable, "generic_getattr"),
    reason="torch before 2.13 has no such method",
)
def test_the_graph_is_that_of_the_reads_as_they_stand(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their guards, but for those that the map of the class lacks a name."""
    case, found, results = small(Reads, ["linear"]), [], []
    for plain in (config_reads._plain, lambda *_: False):
        with captured(monkeypatch) as one, monkeypatch.context() as patch:
            patch.setattr(config_reads, "_plain", plain)
            results.append(run(case, case.compile(dynamic=False)))
        found.append(one)
    fast, slow = found
    assert fast.graphs == slow.graphs
    assert torch.equal(*results)
    (mine,), (all_of_them,) = fast.guards, slow.guards
    assert mine < all_of_them
    assert all("attribute_map" in guard for guard in all_of_them - mine)


def test_a_field_that_is_changed_is_read_again(small: Any) -> None:
    case = small(Reads, ["linear"])
    cm = case.compile(dynamic=False)
    for changes in ({"scale": 3.0}, {"turned": True}, {"hidden_size": 8}, {"no_such_field": 4.0}):
        run(case, cm)
        for name, value in changes.items():
            for config in (cm.model.config, case.base.config, *_configs(case)):
                setattr(config, name, value)
        run(case, cm)
    assert cm.recompiles == 5


def _configs(case: Any) -> list[Config]:
    return [model.config for model in case.merged.values()]


def test_layers_that_come_to_differ_are_refused_as_ever(small: Any) -> None:
    """The graph of equal layers is not taken where a field differs by layer by now."""
    case = small(Reads, ["linear"])
    cm = case.compile(dynamic=False)
    run(case, cm)
    cm.model.config.per_layer_config = {0: {"scale": 3.0}, 1: {"scale": 5.0}}
    with pytest.raises(Exception, match="'scale' is a per-layer attribute"):
        cm.model.config.scale  # noqa: B018
    with pytest.raises(Exception, match="scale"):
        cm(X, adapter_names=NAMES)

"""Hooks of users around forwards: those on the model itself, and those that come after the graphs
were captured. Dynamo looks at neither."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, case_by_targets, error
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

pytestmark = pytest.mark.any_sizes

NAMES = ["a", None, "b"]
Registered = Callable[[nn.Module], RemovableHandle]


class Net(nn.Module):
    """A site, and a module that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter.requires_grad_(False), std=0.3)

    def forward(self, x: Tensor, more: bool = False) -> dict[str, Tensor]:
        if more:  # as transformers does where hidden states are asked for
            self.act.register_forward_hook(lambda *_: None)
        return {"logits": self.down(self.act(self.up(x)))}


def halved(module: nn.Module) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return {"logits": output["logits"] / 2} if isinstance(output, dict) else output / 2

    return module.register_forward_hook(hook)


def doubled(module: nn.Module) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def case_of(base: nn.Module, folder: Any) -> Any:
    torch.manual_seed(0)
    return case_by_targets(base.eval(), folder, {"a": r".*(up|down)", "b": r".*up"})


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return case_of(Net(), tmp_path_factory.mktemp("adapters"))


def served_as(cm: Any, case: Any, path: str, *hooks: Registered) -> None:
    """Each row of a mixed batch of `cm` is that of the merged model with these hooks."""
    x = torch.randn(3, 8)
    got = cm(x, adapter_names=NAMES)["logits"]
    for row, name in enumerate(NAMES):
        merged = case.alone(name)
        handles = [hook(merged.get_submodule(path)) for hook in hooks]
        want = merged(x[row : row + 1])["logits"]
        for handle in handles:
            handle.remove()
        assert error(got[row : row + 1], want) <= TOLERANCE


@pytest.mark.parametrize(("hook", "path"), [(halved, ""), (doubled, "up"), (halved, "act")])
def test_hooks_that_come_and_go_after_the_first_call(case, hook, path):
    cm = case.compile()
    served = partial(served_as, cm, case, path)
    served()
    graphs = cm.recompiles
    handle = hook(cm._orig_mod.get_submodule(path))
    served(hook)
    also = hook(cm._orig_mod.get_submodule(path))
    served(hook, hook)
    also.remove()
    handle.remove()
    before = cm.recompiles
    served()
    assert cm.recompiles == before  # the graphs of before
    assert path or before == graphs  # hooks of the model itself run around its graphs


def test_hooks_that_a_call_registers_are_the_model_s_own(case):
    cm = case.compile()
    x = torch.randn(3, 8)
    cm(x, adapter_names=NAMES)
    cm(x, more=True, adapter_names=NAMES)
    before = cm.recompiles
    served_as(cm, case, "")
    assert cm.recompiles == before


class Scaled:
    """A hook with a number of its own, which the graph has as a constant."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.scale


def test_what_a_hook_holds_is_guarded(case):
    cm, hook = case.compile(), Scaled(2.0)
    cm._orig_mod.act.register_forward_hook(hook)
    for scale in (2.0, 0.5):
        hook.scale = scale
        served_as(cm, case, "act", lambda module: module.register_forward_hook(Scaled(hook.scale)))

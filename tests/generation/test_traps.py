"""Failures, threads, processes: where a compiler of LoRA goes silently wrong (graph breaks are in
test_graph_breaks)."""

from __future__ import annotations

import threading

import pytest
import torch
from dense_merge import check_mixed, error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import CaptureError, ProvenanceError

pytestmark = pytest.mark.any_sizes

K, N = 6, 9
NAMES = ["a", None, "b", "a"]


def features(rows: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, K)}


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, N)
        self.fail = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.w(x)
        if self.fail:
            raise RuntimeError("the model's own")
        return {"logits": y}


def test_a_call_that_failed_in_the_model_leaves_nothing_behind(small):
    """Dynamo gives up on a frame that raises and compiles its parts from then on."""
    case = small(Failing, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    names = ["a", None, "b"]
    check_mixed(cm, case, names, inputs)
    cm._orig_mod.fail = True
    with pytest.raises(RuntimeError, match="the model's own"):
        cm(**inputs, adapter_names=names)
    cm._orig_mod.fail = False
    check_mixed(cm, case, ["b", "b", "b"], inputs)
    check_mixed(cm, case, names, inputs)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


def test_calls_from_several_threads_wait_for_one_another(small):
    """Slots are one state for the model: without a lock a call would read another one's."""
    case = small(Failing, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    mixes = (["a", None, "b"], ["b", "b", None], [None, "a", "a"])
    wanted = [case.expected(names, inputs) for names in mixes]
    errors: list[float] = []

    def serve(index: int) -> None:
        for _ in range(40):
            got = cm(**inputs, adapter_names=mixes[index])["logits"]
            errors.append(error(got, wanted[index]))

    serve(0)
    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 160
    assert max(errors) <= 1e-5


def test_banks_under_modules_that_are_not_of_torch_nn_have_fixed_sizes(small):
    """Dynamo makes the sizes of what hangs on transformers' Conv1D dynamic by itself."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv1D(N, K)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.conv(x)}

    case = small(Transposed, ["conv"], fan_in_fan_out=True)
    cm = case.compile()
    check_mixed(cm, case, NAMES, features(4, 3))
    assert "byte floor at rank 3" in str(cm.explain())


def test_compiling_twice_is_refused(plain):
    with pytest.raises(CaptureError, match="lorafx already compiled this PlainModel; use"):
        lorafx.compile(plain.compile(), plain.folders)


def test_grad_modes_share_the_graphs(plain):
    torch.manual_seed(0)
    cm = plain.compile()
    inputs = {"ids": torch.randint(0, 61, (2, 4))}
    check_mixed(cm, plain, ["a1", None], inputs)
    want = cm(**inputs, adapter_names=["a1", None])["logits"]
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            got = cm(**inputs, adapter_names=["a1", None])["logits"]
        assert torch.equal(got, want)
        assert not got.requires_grad
    assert cm.recompiles <= 2


def test_attributes_made_by_a_call_are_not_constants(small):
    """What an earlier call left on a module belongs to that call's requests."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(K, N)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            kept = x if self.kept is None else self.kept
            self.kept = x
            return {"logits": self.w(x) + self.w(kept.flip(1))}

    case = small(Remembering, ["w"])
    cm = case.compile()
    inputs = features(3, 3)
    assert cm(**inputs, adapter_names=["a", None, "b"])["logits"].shape == (3, 3, N)
    for _ in range(2):
        with pytest.raises(ProvenanceError, match="at w it is not proved"):
            cm(**features(3, 3), adapter_names=["a", None, "b"])

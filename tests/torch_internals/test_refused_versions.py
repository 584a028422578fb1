"""Versions that lorafx refuses, or runs on without having been tested with them; and which errors
another torch is said to be the cause of."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.errors import LorafxError, UnsupportedVersionError
from lorafx.torch_internals import shortcuts, transforms, versions

pytestmark = pytest.mark.quick

TORCH = versions.installed("torch")
REFUSED = [
    (
        {"torch": "2.10.2+cpu"},
        'lorafx needs torch 2.11 or later, and this is torch 2.10.2+cpu: pip install "torch>=2.11"',
    ),
    (
        {"transformers": "4.57.1"},
        "lorafx needs transformers 5.0 or later, and this is transformers 4.57.1: "
        'pip install "transformers>=5.0"',
    ),
    ({"torch": None}, 'lorafx needs torch: pip install "torch=='),
]


@pytest.mark.parametrize(("found", "sentence"), REFUSED)
def test_a_version_that_is_refused_is_one_sentence(
    found: dict[str, str | None], sentence: str, faked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(**found)
    for name in ("compile", "explain", "Options"):
        monkeypatch.delitem(vars(lorafx), name, raising=False)
        with pytest.raises(lorafx.UnsupportedVersionError) as raised:
            getattr(lorafx, name)
        assert sentence in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(lorafx.UnsupportedVersionError), versions.private_names():
        pass
    assert issubclass(lorafx.UnsupportedVersionError, lorafx.LorafxError)


def test_another_triton_is_refused_only_where_its_kernels_run(
    faked: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(triton="2.0.1")
    monkeypatch.delitem(vars(lorafx), "compile", raising=False)  # it is first used here
    small()
    assert [r.getMessage() for r in caplog.records if "this is triton 2.0.1" in r.getMessage()]
    with pytest.raises(UnsupportedVersionError, match=r"and this is triton 2\.0\.1: pip install"):
        small(lowering="triton")


def test_it_is_said_before_torch_is_imported() -> None:
    program = (
        "import sys, importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '2.9.0' if name == 'torch' else real(name)\n"
        "import lorafx\n"
        "try:\n    lorafx.compile\n"
        "except lorafx.UnsupportedVersionError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    sentence = "lorafx needs torch 2.11 or later, and this is torch 2.9.0: "
    assert done.stdout == f'{sentence}pip install "torch>=2.11"\nFalse\n'


def small(**options: Any) -> Any:
    """A compiled model of two linears."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).eval()
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    tensors = {"0.lora_A.weight": a, "0.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    x = torch.randn(2, 4)
    with torch.no_grad():
        hidden = model[0](x)
        hidden[0] += b @ a @ x[0]
        wanted = model[1](hidden)
    source = lorafx.AdapterSource({f"base_model.model.{k}": v for k, v in tensors.items()}, config)
    cm = lorafx.compile(model, {"a": source}, options={"lowering": "reference", **options})
    torch.testing.assert_close(cm(x, adapter_names=["a", None]), wanted)
    return cm


def test_a_newer_torch_runs_with_a_warning_and_without_shortcuts(
    faked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lorafx")
    faked(torch="2.99.0")
    versions.check()
    versions.check()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("torch 2.99.0 is untested: lorafx was tested with 2.11 to ")
    assert "`lorafx doctor`" in line
    report = small().explain()
    assert report.shortcuts_off == dict.fromkeys(shortcuts.SHORTCUTS, "torch 2.99.0 is untested")
    (line,) = [line for line in str(report).splitlines() if line.startswith("shortcuts that are")]
    assert "needless_guards (torch 2.99.0 is untested), " in line
    assert line in report._repr_html_()
    assert report.json()["shortcuts_off"]["needless_guards"] == "torch 2.99.0 is untested"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (TORCH, ", which lorafx was tested with"),
        ("2.99.0", ", and lorafx was tested with 2.11 to "),
    ],
)
def test_a_missing_name_is_said_with_a_way_out(version: str, said: str, faked: Any) -> None:
    faked(torch=version)
    with pytest.raises(lorafx.UnsupportedVersionError) as raised, versions.private_names():
        from torch._dynamo import not_there  # noqa: F401
    assert "cannot import name 'not_there'" in str(raised.value)
    assert f"this is torch {version}{said}" in str(raised.value)


# Shortcuts
@pytest.mark.parametrize("version", ["2.99.0", "2.14.0a0+git1234567"])
def test_shortcuts_are_off_where_torch_is_no_tested_release_and_it_is_said_once(
    version: str, faked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorafx")
    faked(torch=version)
    assert shortcuts.chosen() == shortcuts.chosen() == frozenset()
    reason = f"torch {version} is untested"
    assert shortcuts.states() == dict.fromkeys(shortcuts.SHORTCUTS, reason)
    assert [r.getMessage() for r in caplog.records] == [f"shortcuts are off: {reason}"]
    assert shortcuts.chosen(["needless_guards"]) == {"needless_guards"}  # whoever names it has it


def test_shortcuts_that_are_named() -> None:
    with pytest.raises(
        lorafx.ConfigError, match=r"got 'needless_guard'; nearest: needless_guards"
    ) as raised:
        lorafx.Options(shortcuts=["written_back", "needless_guard"])
    assert str(raised.value).startswith("Options.shortcuts must be a list of needless_guards, ")
    with pytest.raises(lorafx.ConfigError, match=r"must be a list of .* got 'needless_guards'"):
        lorafx.Options(shortcuts="needless_guards")
    off = small(shortcuts=[]).explain().shortcuts_off
    assert off["needless_guards"] == "switched off by Options.shortcuts"


CONFIG = lorafx.LoraConfig(max_rank=2, target_modules="all-linear")


def compiled(model: nn.Module) -> Any:
    return lorafx.compile(model.eval(), CONFIG, options=REFERENCE)


class _Gone:
    """In the place of a module of torch's that lacks what is asked for."""


def test_of_private_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafx.torch_internals import dynamo

    monkeypatch.setattr(dynamo, "OptimizedModule", None)
    monkeypatch.setattr("lorafx.passes.alias.OptimizedModule", None)
    with pytest.raises(UnsupportedVersionError, match=r"pip install .*torch==") as got:
        lorafx.attach(nn.Sequential(nn.Linear(4, 4)).eval(), CONFIG)
    assert f"torch {torch.__version__.partition('+')[0]}" in str(got.value)
    assert isinstance(got.value.__cause__, TypeError)


def test_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = compiled(nn.Sequential(nn.Linear(4, 4)))
    monkeypatch.setattr(transforms, "_C", _Gone())
    with pytest.raises(UnsupportedVersionError, match="_functorch"):
        cm(torch.randn(2, 4))
    with pytest.raises(UnsupportedVersionError, match="_functorch"):
        cm.load_adapter({}, "a")


class Own(nn.Module):
    """Raises an error of its own, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.up(x) + self.nothing


@pytest.mark.parametrize(
    ("model", "given", "error"),
    [
        (Own(), torch.randn(2, 4), AttributeError),
        (nn.Sequential(nn.Linear(4, 4)), "text", TypeError),
    ],
)
def test_not_of_the_model(model: nn.Module, given: Any, error: type[Exception]) -> None:
    cm = compiled(model)
    with pytest.raises(Exception) as got:  # noqa: PT011 - as torch raises it
        cm(given)
    assert not isinstance(got.value, UnsupportedVersionError)
    assert isinstance(got.value, (error, LorafxError, torch._dynamo.exc.TorchDynamoException))

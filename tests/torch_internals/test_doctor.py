"""`lorafx doctor`, here and on versions that lorafx refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from private_names import names_by_module

import lorafx
from lorafx.integrations.cli import diagnosis, main
from lorafx.integrations.cli.diagnosis import TOLERANCE, SmallBatch
from lorafx.torch_internals import shortcuts


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str, code: int = 0) -> Any:
        monkeypatch.setattr("sys.argv", ["lorafx", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        said = capsys.readouterr()
        assert "lorafx" not in said.err  # no progress without a terminal
        return json.loads(said.out) if "--json" in arguments else said.out

    return call


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> list[SmallBatch]:
    """In the place of the mixed batch the one of this list."""
    made = [SmallBatch("Small", "cpu", 0.0, 1.0)]
    monkeypatch.setattr(diagnosis, "run_small_batch", lambda: made[0])
    return made


def test_everything_holds_here(run, unlearnt: None) -> None:
    found = run("--json")
    assert found["holds"]
    assert found["faults"] == []
    assert found["installed"]["lorafx"] == lorafx.__version__
    assert found["required"].keys() >= names_by_module().keys()
    assert set(found["required"].values()) == {"holds"}
    assert found["shortcuts"].keys() == shortcuts.SHORTCUTS.keys()
    assert found["batch"]["model"] == "LlamaForCausalLM"
    assert found["batch"]["difference"] <= TOLERANCE
    assert found["batch"]["seconds"] > 0


@pytest.mark.quick
def test_the_text_has_a_line_for_each_part_and_shortcut(run, batch, faked) -> None:
    faked(torch="2.99.0")
    lines = run().splitlines()
    assert lines[-1] == "everything holds"
    for module in names_by_module():
        assert [module, "holds"] in [line.split() for line in lines]
    for name in shortcuts.SHORTCUTS:
        (line,) = [line for line in lines if line.startswith(name)]
        assert "off: " in line
    assert any(line.startswith("mixed batch: Small on cpu, ") for line in lines)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"torch": "2.10.0"}, "lorafx needs torch 2.11 or later, and this is torch 2.10.0: "),
        ({"transformers": "4.57.1"}, "lorafx needs transformers 5.0 or later, and this is "),
    ],
)
def test_a_version_that_is_refused_is_a_fault(run, faked, batch, found, wrong: str) -> None:
    faked(**found)
    lines = run(code=1).splitlines()
    (fault,) = [line for line in lines if line.startswith("wrong: ")]
    assert wrong in fault
    ((package, version),) = found.items()
    assert [package, version] in [line.split()[:2] for line in lines]
    assert "mixed batch: not run" in lines
    said = run("--json", code=1)
    assert not said["holds"]
    assert said["batch"] is None


@pytest.mark.quick
def test_without_torch_it_says_so(run, faked) -> None:
    faked(torch=None, triton=None)
    said = run("--json", code=1)
    assert said["installed"]["torch"] == "not installed"
    assert said["faults"][0].startswith("lorafx needs torch: pip install ")


@pytest.mark.quick
def test_a_newer_torch_is_untested_and_no_fault(run, faked, batch) -> None:
    faked(torch="2.99.0")
    said = run("--json")
    assert said["installed"]["torch"].startswith("2.99.0 (untested; tested: 2.11, ")
    assert set(said["shortcuts"].values()) == {"torch 2.99.0 is untested"}


@pytest.mark.quick
def test_other_faults(run, unlearnt, batch, monkeypatch) -> None:
    batch[0] = SmallBatch("Small", "cpu", float("nan"), 1.0)
    (fault,) = run("--json", code=1)["faults"]
    assert "not what dense merge gives" in fault
    monkeypatch.setattr(diagnosis, "run_small_batch", lambda: 1 / 0)
    assert run("--json", code=1)["faults"] == ["ZeroDivisionError: division by zero"]

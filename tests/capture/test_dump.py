"""Dumps that cannot be written cost nothing but themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_merge import Case
from tiny_models import FAMILIES

from lorafx import ConfigError, LorafxWarning


@pytest.mark.parametrize("rows", [["a0", None], [None, None]])
def test_a_folder_that_cannot_be_written_to_changes_no_graph(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str | None]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "file" / "dump"))
    cm = plain.compile()
    inputs = FAMILIES["plain"].inputs(2, 4)
    with pytest.warns(LorafxWarning, match="no whole dump in .*file/dump.*Not a directory") as seen:
        found = cm(**inputs, adapter_names=rows)
    assert not any("Dynamo failed" in str(one.message) for one in seen)
    assert cm.recompiles == 1
    with pytest.raises(ConfigError, match=r"file/dump cannot be written: .*Name a folder"):
        cm.dump(tmp_path / "file" / "dump")
    monkeypatch.delenv("LORAFX_DUMP")
    torch.testing.assert_close(found, plain.compile()(**inputs, adapter_names=rows))

"""The predictions in docs/kernels.md are those of the cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafx.kernels.tools import predict

pytestmark = pytest.mark.quick

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"


def test_the_committed_predictions_are_the_models() -> None:
    """`python -m lorafx.kernels.tools.predict docs/kernels.md` writes them anew."""
    assert predict.is_current(DOCUMENT.read_text())


def test_a_document_gets_the_table_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(f"before\n{predict.BEGIN}\nold\n{predict.END}\nbehind\n")
    predict.main([str(path)])
    assert path.read_text() == f"before\n{predict.table()}\nbehind\n"
    assert len(predict.table().splitlines()) == 4 + len(predict.ROWS) * len(predict.LINEARS)
    path.write_text("nothing")
    with pytest.raises(SystemExit, match="has no line"):
        predict.main([str(path)])

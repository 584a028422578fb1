"""The predictions in docs/kernels.md are those of the cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafx.kernels.tools import predict
from lorafx.kernels.tools.predict_decode import ADAPTERS, BATCHES, MODELS, layers

pytestmark = pytest.mark.quick

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"


def test_the_committed_predictions_are_the_models() -> None:
    """`python -m lorafx.kernels.tools.predict docs/kernels.md` writes them anew."""
    assert predict.is_current(DOCUMENT.read_text())


def test_a_document_gets_the_table_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    prefill, decode = predict.tables()
    old = "\nbetween\n".join(f"{first}\nold\n{last}" for first, last, _ in (prefill, decode))
    path.write_text(f"before\n{old}\nbehind\n")
    predict.main([str(path)])
    assert path.read_text() == f"before\n{prefill[2]}\nbetween\n{decode[2]}\nbehind\n"
    mixes = [(rows, D) for rows in BATCHES for D in ADAPTERS if rows >= D]
    assert len(decode[2].splitlines()) == 4 + len(mixes)
    assert len(predict.table().splitlines()) == 4 + len(predict.ROWS) * len(predict.LINEARS)
    path.write_text("nothing")
    with pytest.raises(SystemExit, match="has no line"):
        predict.main([str(path)])


def test_a_step_of_64_rows_is_predicted_as_an_h200_took_it() -> None:
    """Throughput over the base's, by the reader of that day: docs/performance.md."""
    found = {
        layer.works[0].distinct: layer.throughput(MODELS["split, one by one"])
        for layer in layers(predict.LINEARS)
        if layer.works[0].rows == 64
    }
    assert found[1] == pytest.approx(0.927, abs=0.01)
    assert found[8] == pytest.approx(0.904, abs=0.01)

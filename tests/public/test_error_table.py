"""docs/errors.md is made from the docstrings of lorafx.errors: EXPECTTEST_ACCEPT=1 writes it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from pathlib import Path

import pytest

import lorafx
from lorafx import errors

pytestmark = pytest.mark.quick

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
BEGIN, END, WAY_OUT = "<!-- table -->\n", "<!-- end -->", "Way out: "


def raised() -> list[type[BaseException]]:
    """The classes of lorafx.errors, in order."""
    known = vars(errors).values()
    return [e for e in known if isinstance(e, type) and issubclass(e, Exception | Warning)]


def told(error: type[BaseException]) -> tuple[str, str]:
    """The cause and the way out."""
    cause, _, way_out = inspect.cleandoc(error.__doc__ or "").partition("\n\n")
    assert way_out.startswith(WAY_OUT), error
    return " ".join(cause.split()), " ".join(way_out.removeprefix(WAY_OUT).split())


def table() -> str:
    lines = ["| error | cause | way out |", "|---|---|---|"]
    for error in raised():
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
        lines.append("| " + " | ".join((f"`{error.__name__}` ({bases})", *told(error))) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_has_every_error_with_cause_and_way_out() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        PAGE.write_text(wanted)
    assert page == wanted, "run this test with EXPECTTEST_ACCEPT=1"


def test_all_errors_are_public_and_derive_from_the_root() -> None:
    for error in raised():
        assert error.__name__ in lorafx.__all__
        assert issubclass(error, errors.LorafxError | errors.LorafxWarning)


def test_classes_of_other_modules_are_kinds_of_these() -> None:
    """Somebody who handles the page's classes handles all."""
    for module in ("adapter_store", "model", "capture", "runtime", "compiled_model"):
        package = importlib.import_module(f"lorafx.{module}")
        for found in pkgutil.iter_modules(package.__path__, f"lorafx.{module}."):
            for value in vars(importlib.import_module(found.name)).values():
                own = isinstance(value, type) and value.__module__ == found.name
                if own and issubclass(value, errors.LorafxError):
                    assert any(issubclass(value, known) for known in raised()[2:]), value

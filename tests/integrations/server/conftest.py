"""One tiny model with its adapters for all files here."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from served import Files, serving, write_files

from lorafx.integrations.server.run import Opened


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("served"), num_hidden_layers=1)


@pytest.fixture(scope="session")
def server(files: Files) -> Iterator[Opened]:
    with serving(files, max_adapters=3) as server:  # fewer slots than adapters
        yield server


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """The command sets those of the process."""
    loggers = [logging.getLogger(name) for name in ("lorafx", "transformers.cli.serving")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)

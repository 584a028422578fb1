"""One tiny model with its adapters for all files here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from served import Files, anew, serving, write_files
from spoken import tokenizer

from lorafx.integrations.server.run import Opened


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(files: Files) -> Iterator[Opened]:
    with serving(files, max_adapters=3) as server:  # fewer slots than adapters
        yield server


@pytest.fixture(scope="session")
def _chat_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 4096, "vocab_size": 259}
    written = write_files(tmp_path_factory.mktemp("chat"), **sizes)
    tokenizer().save_pretrained(written.model)
    return written


@pytest.fixture(scope="session")
def _chat_server(_chat_files: Files) -> Iterator[Opened]:
    with serving(_chat_files, num_blocks=4096, max_batch_tokens=256) as server:
        yield server


@pytest.fixture
def spoken(_chat_server: Opened, _chat_files: Files) -> Callable[..., Opened]:
    """The server of a chat, with the tokenizer of these templates."""
    return lambda *templates: anew(_chat_server, _chat_files, tokenizer(*templates))


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """The command sets those of the process."""
    loggers = [logging.getLogger(name) for name in ("lorafx", "transformers.cli.serving")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)

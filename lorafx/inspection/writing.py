"""Checks of output folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafx.errors import ConfigError


def check_room(folder: Path) -> None:
    """Raise ConfigError where `folder` cannot be created or written to."""
    with written_into(folder):
        home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not home.is_dir():
            raise NotADirectoryError(f"{home} is a file")
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(f"{home} is not yours to write to")


@contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """Turns failures to write into `folder` into ConfigErrors."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error}. Name a folder that you may write to, or one "
            "that does not exist yet"
        ) from error

"""Reports for programs: values that JSON has, and folders that can be written to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafx.errors import ConfigError


def json_values(value: Any) -> Any:
    """`value` with None in the place of each number that is not finite: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(each) for each in value]
    return value


def check_room(folder: Path) -> None:
    """Raise ConfigError where `folder`, which may not exist yet, cannot be made or written to."""
    with written_into(folder):
        home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not home.is_dir():
            raise NotADirectoryError(f"{home} is a file")
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(f"{home} is not yours to write to")


@contextmanager
def written_into(folder: Path) -> Iterator[None]:
    """Around what writes into `folder`. Raises ConfigError where that cannot be done."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error}. Name a folder that you may write to, or one "
            "that does not exist yet"
        ) from error

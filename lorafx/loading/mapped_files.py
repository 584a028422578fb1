"""Tensors in files, for numbers that need not be in memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def in_file(file: Path, like: Tensor) -> Tensor:
    """A contiguous tensor on the host in `file`, of the shape and dtype of `like`.

    Its room on the disk is taken now. A page that found none when it is written to would end the
    process (SIGBUS), where nobody could say why.

    Raises:
        OSError: there is no room, or the file cannot be written.
    """
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, like.numel() * like.element_size())
    numbers = torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype)
    return numbers.view(like.shape)

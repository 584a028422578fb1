"""Packages of `lorafx.export` that run on the device."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from dense_merge import Case, check_bfloat16
from on_device import assert_served, to
from packaged import served
from tiny_models import token_inputs

import lorafx


def test_mixed_batches(shallow: Case, device: torch.device, tmp_path: Path) -> None:
    example = {**to(token_inputs(3, 5), device), "use_cache": False}
    config = lorafx.LoraConfig(max_adapters=3, max_rank=8)
    model, path = shallow.model().to(device), tmp_path / "llama.pt2"
    package = lorafx.load(lorafx.export(model, config, example, path, adapters=shallow.folders))
    for name, folder in shallow.folders.items():
        package.load_adapter(folder, name)
    for names, length in ((["a1", None, "a0"], 5), (["a3", "a1"], 7), ([None, None], 4)):
        inputs = token_inputs(len(names), length)
        got = package(**to(inputs, device), adapter_names=names)["logits"]
        assert_served(got, shallow, names, inputs)


def test_bfloat16(device: torch.device, tmp_path: Path) -> None:
    check_bfloat16(tmp_path, partial(served, path=tmp_path / "llama.pt2", device=device))

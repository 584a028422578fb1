"""One adapter with huge weights is no reason to give up on the engine."""

from __future__ import annotations

import shutil

import pytest
from dense_merge import Case
from safetensors.torch import load_file, save_file
from step_logits import answers, greedy
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lorafx.serving.continuous.health import IN_A_ROW

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen")


def test_its_requests_alone_fail_however_many_have(llama: Case, tmp_path) -> None:
    folder = shutil.copytree(llama.folders["a1"], tmp_path / "a1")
    file = folder / "adapter_model.safetensors"
    save_file({key: factor * 1e25 for key, factor in load_file(file).items()}, file)
    cm = Case(llama.base, llama.folders | {"a1": folder}).compile()
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=16)
    with cm.continuous_batching(None, config, warmup=False) as engine:
        for _ in range(IN_A_ROW):
            huge = engine.add_request([3, 4], adapter="a1", max_new_tokens=2)
            assert "not finite" in answers(engine, [huge])[huge].error
        assert engine.unhealthy() is None
        with engine.pause():
            names = ("a1", None, "a2")
            added = [engine.add_request([3, 4], adapter=n, max_new_tokens=2) for n in names]
        huge, *fine = answers(engine, added).values()
        assert "not finite" in huge.error
        for name, output in zip(names[1:], fine, strict=True):
            assert [3, 4, *output.generated_tokens] == greedy(llama, name, [3, 4], 2)

"""A small model with an adapter for each dialect, as PEFT saves them."""

from __future__ import annotations

import pytest
from dense_merge import Case, random_base, save_adapter
from dialect_files import WRITERS

DIALECTS = sorted(WRITERS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapters of unequal ranks and scales, one for each dialect, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("peft")
    base = random_base("llama", num_hidden_layers=1)
    targets = {"mlx": ["embed_tokens", "q_proj", "up_proj"], "loralib": ["embed_tokens", "o_proj"]}
    return Case(
        base,
        {
            name: save_adapter(
                base,
                folder / name,
                rank=2 + seed,
                targets=targets.get(name, ["q_proj", "down_proj"]),
                seed=seed,
                lora_alpha=3 + seed,
            )
            for seed, name in enumerate(DIALECTS)
        },
    )

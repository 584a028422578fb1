"""Models that transformers' tensor parallelism cuts among ranks, and what a rank does with them; see
`two_ranks`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.distributed import DistributedConfig

import lorafx

Batch = tuple[Tensor, list[str | None]]


def placed(rank: int, size: int, folder: Path, **settings: Any) -> Any:
    """The saved model, cut by its own plan."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    settings = {"tp_size": size, "tp_plan": "auto", **settings}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**settings)
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def serve(
    rank: int,
    size: int,
    folder: Path,
    folders: Mapping[str, Path],
    batches: Sequence[Batch],
    options: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Logits of each batch, and tokens of the first one."""
    model = placed(rank, size, folder, **(settings or {}))
    keys = list(model.state_dict())
    cm = lorafx.compile(model, folders, options=dict(options))
    logits = [cm(input_ids=ids, adapter_names=names).logits for ids, names in batches]
    ids, names = batches[0]
    tokens = cm.generate(ids, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert list(model.state_dict()) == keys
    return {"logits": logits, "tokens": tokens, "status": str(cm.status())}

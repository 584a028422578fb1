"""aLoRA adapters on disk, a compiled model that serves them, and PEFT's model of the same."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import torch
from dense_merge import REFERENCE, random_base
from peft import PeftModel
from torch import Tensor

import lorafx

#: Adapter -> rank, invocation tokens.
ADAPTERS: dict[str, tuple[int, list[int] | None]] = {
    "x": (3, [5, 6]),
    "y": (2, [7]),
    "plain": (4, None),
}
TARGETS = {
    "llama": {
        "x": ["q_proj", "v_proj", "down_proj"],
        "y": ["k_proj", "gate_proj"],
        "plain": ["q_proj", "o_proj"],
    },
    "gpt2": {
        "x": ["attn.c_attn", "mlp.c_proj"],
        "y": ["mlp.c_fc"],
        "plain": ["attn.c_attn", "attn.c_proj"],
    },
}
LAYERS = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}}
FIXED = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


class Served:
    """A base with three adapters on disk, compiled; and PEFT's model of the same. `warmed`: the
    graphs that a warm-up captured, where there was one."""

    warmed = 0

    def __init__(self, family: str, folder: Path) -> None:
        self.base = random_base(family, **LAYERS[family])
        self.folders = {}
        for seed, (name, (rank, tokens)) in enumerate(ADAPTERS.items()):
            targets = [
                path
                for path, _ in self.base.named_modules()
                if any(path.endswith(own) for own in TARGETS[family][name])
            ]
            self.folders[name] = oracle.save_adapter(
                self.base,
                folder / name,
                rank=rank,
                targets=targets,
                seed=seed,
                task_type="CAUSAL_LM",
                alora_invocation_tokens=tokens,
                fan_in_fan_out=family == "gpt2",
            )
        self.cm = self.compile()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft = PeftModel.from_pretrained(
                copy.deepcopy(self.base), self.folders["x"], adapter_name="x"
            ).eval()
            for name in ("y", "plain"):
                self.peft.load_adapter(self.folders[name], name)

    def compile(self, **kwargs: Any) -> Any:
        return lorafx.compile(copy.deepcopy(self.base), self.folders, options=REFERENCE, **kwargs)

    @torch.no_grad()
    def alone(self, name: str | None, **inputs: Tensor) -> Tensor:
        """(1, T, vocabulary), by PEFT."""
        if name is None:
            return self.base(**inputs).logits
        self.peft.set_adapter(name)
        return self.peft(**inputs).logits

    @torch.no_grad()
    def generated(self, name: str | None, **inputs: Any) -> Any:
        if name is None:
            return self.base.generate(**inputs, **FIXED)
        self.peft.set_adapter(name)
        return self.peft.generate(**inputs, **FIXED)


def inputs_of(rows: int, length: int, side: str = "left") -> dict[str, Tensor]:
    """Ids without invocation tokens, and a mask in which row b has b % 3 padding tokens."""
    ids = torch.randint(8, 61, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def one(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}

"""X-LoRA: a classifier of hidden states weighs the adapters of each token.

h = hidden states of a first pass        w = softmax(classifier(h) / temperature)
y = W x + g · Σ_j w_j Δ_j(x)             at each site of a second one
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafx.adapter_store.names import as_number
from lorafx.adapter_store.peft_config import raw_fields
from lorafx.adapter_store.saved import SAFETENSORS
from lorafx.adapter_store.untrusted_files import read_file
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)
from lorafx.runtime.gates import MOST_GATES, requests_of_tokens

#: The classifier's file by the library of the paper, and by PEFT.
_FILES = ("xlora_classifier.safetensors", SAFETENSORS)
#: Of layers of a classifier.
_NUMBERS = frozenset(map(str, range(100)))
#: Fields that numbers depend on -> their defaults.
_FIELDS: Mapping[str, Any] = {
    "enable_softmax": True,
    "enable_softmax_topk": False,
    "softmax_temperature": 1.0,
    "top_k_lora": None,
    "scaling_pass_value": 0.0,
    "global_scaling_weight": 1.0,
}


class XLora:
    """PEFT's X-LoRA on a compiled model that has its adapters, by the names of its configuration.

    Args:
        cm: the compiled model.
        folder: with adapter_config.json and the classifier's tensors. Paths in it are not read.

    Raises:
        UnknownAdapterError: an adapter is not loaded.
        UnsupportedAdapterError: more than 16 adapters.
        CheckpointError: the folder has no X-LoRA, or tensors that are no classifier for it.
        ConfigError: a field has a value that cannot be meant.
    """

    def __init__(self, cm: CompiledModel, folder: str | Path) -> None:
        fields, where = raw_fields(folder)
        if fields.get("peft_type") != "XLORA":
            raise CheckpointError(f"{where} has peft_type {fields.get('peft_type')!r}, not 'XLORA'")
        adapters = fields.get("adapters")
        self.names = list(adapters) if isinstance(adapters, (dict, list)) else []
        if not 0 < len(self.names) <= MOST_GATES:
            raise UnsupportedAdapterError(
                f"{where} has {len(self.names)} adapters, and a token has 1 to {MOST_GATES}"
            )
        if missing := [name for name in self.names if name not in cm.adapters]:
            raise UnknownAdapterError(
                f"{where} names {missing[0]!r}, which is not loaded; load_adapter(folder, "
                f"{missing[0]!r}) first"
            )
        self._cm, self._fields = cm, {n: fields.get(n, value) for n, value in _FIELDS.items()}
        for name, value in self._fields.items():
            if problem := _problem(name, value, len(self.names)):
                raise ConfigError(f"{where} has {name}={value!r:.40}; give {problem}")
        self._layers: tuple[str, ...] = ()
        if fields.get("layerwise_scalings"):
            touched = {site for name in self.names for site in cm._session.store[name].sites}
            paths = (path for path, _ in cm._orig_mod.named_modules())
            self._layers = tuple(path for path in paths if path in touched)
        depth, hidden = fields.get("xlora_depth", 1), fields.get("hidden_size")
        count = len(self.names) * max(1, len(self._layers))
        self._linears = _classifier(Path(folder), count, depth, hidden)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The model's forward of whole sequences, `input_ids` or `inputs_embeds` (B, T, …), twice.
        Raises BatchError for a cache, names or no tokens, and as `CompiledModel.forward`."""
        refused = ("past_key_values", "adapter_names", "adapter_slots", "adapter_gates")
        if given := [name for name in refused if inputs.get(name) is not None]:
            raise BatchError(
                f"X-LoRA runs whole sequences twice, with its own gates, so it takes no {given[0]}"
            )
        inputs = {**inputs, "use_cache": False}
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise BatchError(
                "X-LoRA takes the keyword input_ids (B, T), or inputs_embeds (B, T, …)"
            )
        shape = tokens.shape[:2]
        parts = (*shape, len(self._layers), len(self.names)) if self._layers else (*shape, -1)
        first = torch.full((*shape, len(self.names)), float(self._fields["scaling_pass_value"]))
        asked = {**inputs, "output_hidden_states": True, "return_dict": True}
        hidden = self._run(first, asked).hidden_states[-1]
        for number, (weight, bias) in enumerate(self._linears):
            x = F.relu(hidden) if number else hidden
            hidden = F.linear(x, weight.to(hidden), None if bias is None else bias.to(hidden))
        hidden = hidden.reshape(parts)
        if self._fields["enable_softmax"]:
            hidden = torch.softmax(hidden / self._fields["softmax_temperature"], -1)
        return self._run(hidden, inputs)

    def _run(self, scalings: Tensor, inputs: dict[str, Any]) -> Any:
        """A pass with these scalings (B, T, adapters), or (B, T, layers, adapters), of which the
        largest count."""
        if (top_k := self._fields["top_k_lora"]) is not None:
            kept = torch.zeros_like(scalings).scatter_(-1, scalings.topk(top_k, -1).indices, 1.0)
            scalings = scalings * kept
        if self._fields["enable_softmax_topk"]:
            among = scalings.masked_fill(scalings == 0, -torch.inf)
            scalings = torch.softmax(among, -1).masked_fill(scalings == 0, 0.0)
        weights = scalings.float().cpu() * self._fields["global_scaling_weight"]
        slots = torch.arange(len(self.names)).expand(*weights.shape[:2], -1)
        layers = self._layers if weights.dim() == 4 else ()
        requests: Any = requests_of_tokens(self.names, slots, weights, layers)
        return self._cm(**inputs, adapter_names=requests)


def _problem(name: str, value: object, count: int) -> str:
    """What a field, of which the value cannot be meant, should be; empty if it can."""
    number, default = as_number(value), _FIELDS[name]
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if default is None:
        fits = value is None or (isinstance(value, int) and 0 < number <= count)
        return "" if fits else f"a number of its adapters, 1 to {count}"
    positive = name == "softmax_temperature"
    fits = (1e-37 if positive else -1e37) < number < 1e37  # what float32 holds
    return "" if fits else "a number above 0" if positive else "a finite number"


def _classifier(
    folder: Path, count: int, depth: object, hidden: object
) -> list[tuple[Tensor, Tensor | None]]:
    """Weights and biases of the linears, in order. Raises CheckpointError."""
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no classifier: none of {', '.join(_FILES)}")
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_file(file)[0].items():
        *_, layers, number, kind = ("", "", *key.split("."))
        known = layers == "layers" and number in _NUMBERS and kind in ("weight", "bias")
        if not known or kind in found.setdefault(int(number), {}):
            raise CheckpointError(f"{file} has {key!r:.80}, which is no part of a classifier")
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{file}: {key!r} has other values than finite floats")
        found[int(number)][kind] = tensor
    linears = [(found[number].get("weight"), found[number].get("bias")) for number in sorted(found)]
    sizes = [weight.shape for weight, _ in linears if weight is not None and weight.dim() == 2]
    fits = all(a[0] == b[1] for a, b in pairwise(sizes)) and len(sizes) == len(linears) == depth
    fits &= all(b is None or b.shape == s[:1] for s, (_, b) in zip(sizes, linears, strict=False))
    if not fits or (sizes[0][1], sizes[-1][0]) != (hidden, count):
        raise CheckpointError(
            f"{file} holds no classifier of {count} outputs with xlora_depth={depth!r} and "
            f"hidden_size={hidden!r}: its weights are "
            f"{', '.join(str(tuple(size)) for size in sizes) or 'none'}. PEFT 0.21 leaves out the "
            "layers whose number is an adapter's name; save all as xlora_classifier.safetensors"
        )
    return [(weight, bias) for weight, bias in linears if weight is not None]

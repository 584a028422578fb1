"""Methods whose numbers stand at single positions, of W or of its spectrum.

FourierFT     W′ = W + s Re F⁻¹(S), numbers of S at positions that a seed draws
WaveFT        W′ = W + s H S Hᵀ of the inverse Haar transform H, or W + s S; as FourierFT's S
SHiRA         W′ = W + S, rows and columns in the file
SuperTuning   W′ = W + S + s B A, flat positions in the file
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given

_DRAWN = {"scaling": checks.alpha, "random_loc_seed": checks.seed}
_DRAWN_IN_TRAINING = frozenset({"n_frequency", "n_frequency_pattern", "init_weights"})


def _waveft(given: Given) -> ChangedWeight:
    if not given.option("use_idwt", True):
        return _at_drawn(given, "waveft_spectrum", 25.0, _as_it_is)
    given.choice("wavelet_family", "db1", ("db1",))
    return _at_drawn(given, "waveft_spectrum", 25.0, _inverse_haar)


def _at_drawn(
    given: Given, leaf: str, scale: float, transform: Callable[[Tensor], Tensor]
) -> ChangedWeight:
    """W + s·transform(S) of S with the numbers of `leaf` where the seed says."""
    of = partial(
        _with_drawn,
        seed=given.option("random_loc_seed", 777),
        scale=given.option("scaling", scale),
        transform=transform,
    )
    return ChangedWeight(of, (given.take(leaf, "n"),), adds=True, misfit=_drawn_misfit)


def _drawn_misfit(n: int, k: int, numbers: Tensor) -> str:
    return f"which has no room for {len(numbers)} numbers" if len(numbers) > n * k else ""


def _with_drawn(
    weight: Tensor, numbers: Tensor, *, seed: int, scale: float, transform: Any
) -> Tensor:
    spectrum = weight.new_zeros(weight.numel())
    spectrum[_drawn(weight.numel(), len(numbers), seed).to(weight.device)] = numbers
    return weight + scale * transform(spectrum.view(weight.shape))


@lru_cache(maxsize=16)
def _drawn(among: int, count: int, seed: int) -> Tensor:
    return torch.randperm(among, generator=torch.Generator().manual_seed(seed))[:count].clone()


def _inverse_fourier(spectrum: Tensor) -> Tensor:
    return torch.fft.ifft2(spectrum).real


def _as_it_is(spectrum: Tensor) -> Tensor:
    return spectrum


def _inverse_haar(spectrum: Tensor) -> Tensor:
    """One level of db1; PEFT has the rows' details at the right and the columns' below."""
    n, k = spectrum.shape
    padded = torch.nn.functional.pad(spectrum, (0, k % 2, 0, n % 2))
    (mean, rows), (columns, both) = (half.chunk(2, 1) for half in padded.chunk(2))
    even = torch.stack((mean + rows + columns + both, mean + rows - columns - both), -1)
    odd = torch.stack((mean - rows + columns - both, mean - rows - columns + both), -1)
    return torch.stack((even.flatten(1), odd.flatten(1)), 1).flatten(0, 1)[:n, :k] / 2


def _shira(given: Given) -> ChangedWeight:
    values = given.take("shira_weight", "n")
    positions = given.indices("shira_indices", "2", "n")
    return ChangedWeight(_with_entries, (values, *positions), adds=True, misfit=_entries_misfit)


def _entries_misfit(n: int, k: int, values: Tensor, rows: Tensor, columns: Tensor) -> str:
    inside = all(
        0 <= int(indices.min()) <= int(indices.max()) < size
        for indices, size in ((rows, n), (columns, k))
    )
    return "" if inside else "and its indices point outside of it"


def _with_entries(weight: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return weight.index_put((rows, columns), values, accumulate=True)


def _supertuning(given: Given) -> ChangedWeight:
    values = given.take("supertuning_values", "n")
    positions = given.indices("supertuning_indices", "n")
    pair: tuple[Tensor, ...] = ()
    if "supertuning_lora_A" in given or "supertuning_lora_B" in given:
        a, b = given.pair("supertuning_lora")
        alpha = given.option("lora_alpha")
        pair = a * (2.0 if alpha is None else alpha / len(a)), b
    tensors = values, positions, *pair
    return ChangedWeight(_with_flat_entries, tensors, adds=True, misfit=_flat_entries_misfit)


def _flat_entries_misfit(n: int, k: int, values: Tensor, positions: Tensor, *pair: Tensor) -> str:
    return _entries_misfit(n, k, values, positions // k, positions % k)


def _with_flat_entries(weight: Tensor, values: Tensor, positions: Tensor, *pair: Tensor) -> Tensor:
    rows, columns = positions // weight.shape[1], positions % weight.shape[1]
    changed = _with_entries(weight, values, rows, columns)
    return changed + pair[1] @ pair[0] if pair else changed


FOURIERFT = AdapterMethod(
    name="FourierFT",
    peft_type="FOURIERFT",
    marks="fourierft_spectrum",
    read=partial(_at_drawn, leaf="fourierft_spectrum", scale=150.0, transform=_inverse_fourier),
    fields=_DRAWN,
    training=_DRAWN_IN_TRAINING,
    form="own weight",
)
WAVEFT = AdapterMethod(
    name="WaveFT",
    peft_type="WAVEFT",
    marks="waveft_spectrum",
    read=_waveft,
    fields={**_DRAWN, "use_idwt": checks.flag, "wavelet_family": checks.text},
    training=_DRAWN_IN_TRAINING | {"proportional_parameters"},
    form="own weight",
)
SHIRA = AdapterMethod(
    name="SHiRA",
    peft_type="SHIRA",
    marks="shira_(?:weight|indices)",
    read=_shira,
    training=frozenset({"mask_type", "random_seed", "init_weights"}),
    unread=frozenset({"r"}),
    form="own weight",
)
SUPERTUNING = AdapterMethod(
    name="SuperTuning",
    peft_type="SUPERTUNING",
    marks="supertuning_(?:values|indices)",
    leaves="supertuning_lora_[AB]",
    read=_supertuning,
    absent={
        "supertuning_indices": "and equal numbers in W make it uncertain which are meant; save the "
        "adapter with save_precomputed_indices=True"
    },
    fields={"lora_alpha": checks.optional(checks.alpha)},
    training=frozenset({"sparsity", "select_top", "save_precomputed_indices", "init_weights"}),
    unread=frozenset({"r", "lora_alpha"}),
    form="own weight",
)

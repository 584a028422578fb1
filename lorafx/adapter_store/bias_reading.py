"""Biases that an adapter was trained with, on their way from a checkpoint to their sites.

    base_model.model.<module>.lora_B.bias        lora_bias: y + s·b, read with the factors
    base_model.model.<module>.base_layer.bias    bias="lora_only" or "all": b' for the base's b
    base_model.model.<module>.bias               bias="all": of a module without factors

A site without factors gets factors of zeros beside its bias. A bias of another module (a norm) is
refused unless it is the model's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafx.adapter_store.findings import Findings, path_label
from lorafx.adapter_store.lora_weights import LoraWeights
from lorafx.adapter_store.own_reading import same
from lorafx.adapter_store.peft_keys import parse
from lorafx.model.extras import bias_of, bias_refusal

if TYPE_CHECKING:
    from lorafx.model.sites import Site


class BiasReading:
    """The biases of one adapter that take the place of the base's; problems are noted in the
    findings.

    Attributes:
        keys: those that are dealt with.
        found: biases by the path of the site.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings, self.places = findings, findings.places
        self.state, self.config = findings.state, findings.config
        self.keys: set[str] = set()
        self.found: dict[str, tuple[Site, Tensor]] = {}
        self._saved: set[int] = set()  # modules whose biases the file has

    def decode(self, owned: Collection[str]) -> None:
        """Find the biases; `owned` are sites of whose weight, and bias, the adapter has its own."""
        if self.config.bias == "none":
            return
        for key, tensor in self.state.tensors.items():
            owner, _, attribute = key.rpartition(".")
            if attribute != "bias" or parse(key) is not None:
                continue
            path = owner.removesuffix(".base_layer")
            module = self.places.module(path)
            base = getattr(module, "bias", None)
            if module is None or not isinstance(base, Tensor):
                continue  # noted as a name that means nothing
            self._saved.add(id(module))
            site = self.places.site(module)
            if site is not None and site.path in owned:
                continue
            self.keys.add(key)
            self.findings.compared = True
            if (site is not None and bias_refusal(site) is None) or not same(tensor, base):
                self._keep(key, tensor, self.places.current(path), module, site)

    def _keep(
        self, key: str, bias: Tensor, path: str, module: nn.Module, site: Site | None
    ) -> None:
        label = f"{path_label(path)} ({type(module).__qualname__})"
        if site is None:
            self.findings.unsupported.append(
                f"{key}: the bias of {label} was trained (bias = {self.config.bias!r}), and it "
                "carries no LoRA here; only linears and convolutions that are named by "
                "target_modules have another bias for each row"
            )
            return
        checked = self.checked(key, bias, label, [site], site.out_features)
        if checked is not None:
            self.found[site.path] = site, checked

    def checked(
        self, key: str, bias: Tensor, label: str, sites: Sequence[Site], count: int
    ) -> Tensor | None:
        """`bias`, where it is one of `count` outputs that these sites may have."""
        reasons = {bias_refusal(site) for site in sites} - {None}
        self.findings.unsupported.extend(
            f"{key}: {label} cannot have a bias of an adapter's: {reason}" for reason in reasons
        )
        if reasons or not self.findings.sound(key, bias):
            return None
        if tuple(bias.shape) != (count,):
            self.findings.problems.append(
                f"{key} has shape {tuple(bias.shape)}, {label} needs ({count},)"
            )
            return None
        return bias

    def added(self, weights: dict[str, LoraWeights]) -> dict[str, LoraWeights]:
        """The factors by part path with the biases in them. Those that equal the base's are kept
        where there are factors: the base's may change, and they would not."""
        found = dict(weights)
        for site, bias in self.found.values():
            sizes = [part.out_features for part in site.parts]
            for index, own in enumerate(bias.split(sizes)):
                path = site.part_path(index)
                if path not in found:
                    base = bias_of(site)
                    if base is not None and same(bias, base):
                        continue
                    found[path] = _zeros(site.parts[index].in_features, own)
                found[path] = found[path]._replace(own_bias=own)
        return found

    def complete(self, sites: Iterable[Site]) -> None:
        """Note the biases that the configuration says were trained, and the file lacks."""
        if self.config.bias == "none":
            return
        for site in dict.fromkeys(sites):
            held = isinstance(getattr(site.module, "bias", None), Tensor)
            if held and id(site.module) not in self._saved:
                self.findings.problems.append(
                    f"bias = {self.config.bias!r} says that the bias of {path_label(site.path)} "
                    "was trained, but the file does not have it (some versions of PEFT do not "
                    "save it)"
                )


def _zeros(in_features: int, like: Tensor) -> LoraWeights:
    return LoraWeights(torch.zeros(1, in_features), torch.zeros(len(like), 1), 0.0)

"""The mark: a forward hook that adds one site's delta to its module's output.

    linear:     y ← y + scales[s, i] · (x A[s, i·R : i·R + r]ᵀ) B[s, :r, o : o + N]
    embedding:  y ← y + e · scales[s, 0] · A[s, ids, :r] B[s, :r]

x (…, K) or ids (…), y (…, N), s the slot of the batch, i the sibling, o its offset in the bank;
a packed module has a sibling for each part of its columns. e is the factor of embeddings that scale
their output. The module's own forward runs untouched.

A mark is a plain picklable object, so deep copies and pickles of a marked model stay marked and
share one runtime and one bank a group among themselves. Dynamo inlines `__call__`: banks and
slots become graph inputs, and nothing in it depends on the values of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx.kernels.ops  # noqa: F401  (defines torch.ops.lorafx)
from lorafx.adapter_store.bank import Bank
from lorafx.errors import MatchError, ProvenanceError
from lorafx.registry import Kind
from lorafx.runtime import Runtime

UNPROVED = 0  # the op's `rows`: which request a row belongs to is not known yet


@dataclass(eq=False)
class SiteMark:
    """Hook of one site, for `register_forward_hook(mark, with_kwargs=True)`.

    Attributes:
        path: canonical path of the site.
        runtime: the batch, one for all marks of a model.
        bank: factors of the site's group, one object for all its siblings.
        siblings, offsets, sizes: of each part of the site: its number in the bank, its first column
            of B, its columns.
        kind: "linear" or "embedding".
        in_features, out_features: K and N.
        weight_name, transposed: where the module keeps W, and whether as (K, N).
        derived: the module's forward is not that of the registered class, so what it computes
            is checked against W once, on the first eager call.
        weight, bias: packed base weight and bias of the group, set by the pack step.
    """

    path: str
    runtime: Runtime
    bank: Bank
    siblings: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    kind: Kind
    in_features: int
    out_features: int
    weight_name: str = "weight"
    transposed: bool = False
    derived: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    checked: bool = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """The output with the delta, or None (output unchanged) when no adapter is active.

        Raises:
            MatchError: input and output do not have the site's sizes, or the forward computes
                something else than the registered class. In a trace the mark adds nothing
                instead, and the `match` pass looks for the weight's use.
            ProvenanceError: an eager forward of a batch that mixes adapters.
        """
        runtime = self.runtime
        if not runtime.active:
            return None
        x = _input_of(args, kwargs)
        scale = self._output_scale(module)
        if not self._fits(x, output, scale):
            if torch.compiler.is_compiling() and runtime.graph_passes:
                return None
            raise MatchError(self._misfit(module, x, output))
        if not torch.compiler.is_compiling():
            self._check_eager(module, x, output, scale)
        bank = self.bank
        if self.kind == "embedding":
            scales = bank.scales if scale is None else bank.scales * scale
            return torch.ops.lorafx.embedding_site(
                x, output, bank.A, bank.B, bank.ranks, scales, runtime.slots, UNPROVED
            )
        return torch.ops.lorafx.site(
            x,
            output,
            bank.A,
            bank.B,
            bank.ranks,
            bank.scales,
            runtime.slots,
            self.siblings,
            self.offsets,
            self.sizes,
            UNPROVED,
            self.weight,
            self.bias,
        )

    def _output_scale(self, module: nn.Module) -> Tensor | float | None:
        """The factor that a scaled embedding's forward multiplies W[ids] by, or None.

        transformers keeps it in `embed_scale`, a number or a buffer that is cast to the
        weight's dtype; PEFT reads the same attribute.
        """
        if self.kind != "embedding" or not self.derived:
            return None
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor):
            return scale.to(getattr(module, self.weight_name).dtype)
        return scale

    def _fits(self, x: Any, output: Any, scale: Tensor | float | None) -> bool:
        """Whether the call maps (…, K) or ids (…) to (…, N)."""
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return False
        if output.dim() == 0 or output.shape[-1] != self.out_features:
            return False
        if self.kind == "embedding":
            # A forward of another class may shift the ids it is given or take something else
            # first (OPT's positions take the mask): only a pure scale is known to be safe.
            if self.derived and scale is None and torch.compiler.is_compiling():
                return False
            return not x.is_floating_point() and x.shape == output.shape[:-1]
        return x.dim() > 0 and x.shape[-1] == self.in_features and x.shape[:-1] == output.shape[:-1]

    def _check_eager(
        self, module: nn.Module, x: Tensor, output: Tensor, scale: Tensor | float | None
    ) -> None:
        if not self.runtime.uniform:
            raise ProvenanceError(
                f"{self.path or 'the model'}: the batch mixes adapters, and in eager mode it is "
                "not known which request a row belongs to; use lorafx.compile, or one adapter a "
                "batch"
            )
        if self.derived and not self.checked:
            if not self._computes_base(module, x, output, scale):
                raise MatchError(
                    f"{self._name(module)}: its forward is its own and does not compute "
                    f"{'W[ids]' if self.kind == 'embedding' else 'x Wᵀ + b'} of its input, so "
                    "adding the delta to its output would not be W + ΔW; use lorafx.compile, "
                    "which finds the weight's use in the graph, or exclude_modules"
                )
            self.checked = True

    def _computes_base(
        self, module: nn.Module, x: Tensor, output: Tensor, scale: Tensor | float | None
    ) -> bool:
        """Whether the output is what the registered class would compute from dense W.

        The tolerance is wide: it tells other arithmetic apart, not other rounding. Weights that
        are not dense numbers (quantised) cannot be compared and pass.
        """
        weight = getattr(module, self.weight_name, None)
        if not isinstance(weight, Tensor) or not is_dense(weight) or weight.is_meta:
            return True
        if self.kind == "embedding":
            # Ids outside the vocabulary would raise here; they are not ids of this table.
            if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.in_features:
                return False
            expected = F.embedding(x.long(), weight)
            expected = expected if scale is None else expected * scale
        else:
            expected = F.linear(
                x.to(weight.dtype),
                weight.T if self.transposed else weight,
                getattr(module, "bias", None),
            )
        expected, output = expected.detach().float(), output.detach().float()
        tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        bound = tolerance * max(1e-6, float(expected.abs().max())) if expected.numel() else 0.0
        return torch.allclose(output, expected, rtol=tolerance, atol=bound)

    def _misfit(self, module: nn.Module, x: Any, output: Any) -> str:
        given = "ids (…)" if self.kind == "embedding" else f"(…, {self.in_features})"
        return (
            f"{self._name(module)}: a call with input {_describe(x)} and output "
            f"{_describe(output)}, but the site maps {given} to (…, {self.out_features}), so the "
            "delta has no place in this call; use lorafx.compile, which finds the weight's use in "
            "the graph, or exclude_modules"
        )

    def _name(self, module: nn.Module) -> str:
        return f"{self.path or 'the model'} ({type(module).__qualname__})"


def is_dense(weight: Tensor) -> bool:
    """Whether the tensor holds plain numbers: strided, floating, of 16 bits or more."""
    return (
        weight.layout is torch.strided
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize >= 2
    )


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first positional argument, or else the first tensor among the keywords."""
    if args:
        return args[0]
    for value in kwargs.values():
        if isinstance(value, Tensor):
            return value
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__qualname__

"""What a merge leaves: its report, and the originals by which it is taken back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafx.adapter_store.host_copies import HostCopy
from lorafx.base_weights.adding import mark_of, write
from lorafx.model.quantized import Stored
from lorafx.model.weight_formats import format_of, own_tensors
from lorafx.program.derived import Holder


@dataclass(frozen=True)
class MergedWeight:
    """One base weight that holds W + ΔW.

    Attributes:
        name: path and attribute.
        nbytes: of the weight.
        error: ‖(W' − W) − ΔW‖ / ‖ΔW‖ in the Frobenius norm: how much of the update was lost by
            rounding to the weight's dtype or quantised format. 0 where ΔW is zero.
    """

    name: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        adapter: the adapter's name.
        weights: the weights that hold W + ΔW, in the order of the model's sites.
        original_bytes: memory that the originals take until `unmerge`: the host's, and for
            quantised weights that of their device.
    """

    adapter: str
    weights: tuple[MergedWeight, ...]
    original_bytes: int

    @property
    def error(self) -> float:
        """The largest error of a weight."""
        return max((weight.error for weight in self.weights), default=0.0)

    def __str__(self) -> str:
        return (
            f"{self.adapter}: merged into {len(self.weights)} weights; rounding lost at "
            f"most {self.error:.1e} of a weight's update; {self.original_bytes} bytes of "
            "originals are kept"
        )


@dataclass(frozen=True, eq=False)
class Original:
    """A tensor as it was: its holder, its numbers in host memory, its look when last written."""

    holder: Holder
    tensor: Tensor
    numbers: Tensor
    mark: int | None = None

    @classmethod
    def of(cls, holder: Holder, tensor: Tensor) -> Original:
        return cls(holder, tensor, tensor.detach().to("cpu", copy=True))

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes

    @property
    def in_place(self) -> bool:
        """Whether the tensor is where it was."""
        return self.holder.tensor is self.tensor

    @property
    def touched(self) -> bool:
        """Whether something else has written or replaced the tensor since."""
        return not self.in_place or mark_of(self.tensor) != self.mark

    def written(self) -> Original:
        """As after the last write of ours."""
        return Original(self.holder, self.tensor, self.numbers, mark_of(self.tensor))

    def restore(self) -> None:
        """Write the numbers back."""
        write(self.tensor, self.numbers)


class StoredOriginal:
    """A quantised weight as it was."""

    in_place, touched = True, False  # formats do not tell

    def __init__(self, holder: Holder, parameter: str | None) -> None:
        self.holder = holder
        self._stored = Stored(holder.module, parameter)
        kept = format_of(holder.module, holder.attribute)
        held = own_tensors(holder.module)
        if kept is not None:
            held = kept.tensors(holder.module, holder.attribute)
        self.nbytes = sum(tensor.nbytes for tensor in held)

    def written(self) -> StoredOriginal:
        return self

    def restore(self) -> None:
        self._stored.restore()


@dataclass(frozen=True, eq=False)
class Merged:
    """The adapter that the base weights hold, and what they were before. Its host copy stays, so
    that it can be merged again."""

    report: MergeReport
    requantize: bool
    originals: tuple[Original | StoredOriginal, ...]
    numbers: HostCopy

    @property
    def name(self) -> str:
        return self.report.adapter

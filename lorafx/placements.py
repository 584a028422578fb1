"""Weights that torch's DTensor cuts among ranks, and this rank's share of the factors.

    W (N, K) by Shard(0)          rows of W and of B          column parallel
    W (N, K) by Shard(1)          columns of W and of A       row parallel; the ranks' y are summed
    W (E, N, K) by Shard(1), (2)  the same of each expert

transformers' tensor parallelism replaces a module's forward by a function that calls the old one
with this rank's tensors, and then sums or gathers what the ranks have computed. The delta is added
in between, to what the old forward returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafx.errors import LorafxError
from lorafx.torch_internals.transformers_parts import cell_of_forward, sums_experts

T = TypeVar("T")


def is_placed(tensor: object) -> bool:
    """Whether this is a DTensor."""
    return is_placed_class(type(tensor))


def is_placed_class(cls: type) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(cls, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, always the same object; another tensor itself."""
    if not is_placed(tensor):
        return tensor
    placed: Any = tensor
    # to_local() makes another object of a parameter at each call.
    parts = (getattr(placed, name) for name in placed.__tensor_flatten__()[0])
    return next(part for part in parts if isinstance(part, Tensor))


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, which every rank has to ask for; another tensor itself."""
    placed: Any = tensor
    return placed.full_tensor() if is_placed(tensor) else tensor


def own_indices(tensor: Tensor, dim: int) -> Tensor | None:
    """The indices along `dim` of a whole tensor that this rank has; None if it has all of them."""
    placed: Any = tensor
    if not is_placed(tensor):
        return None
    indices, dim = None, dim % tensor.dim()
    for mesh_dim, placement in enumerate(placed.placements):
        if not _cuts(placement) or placement.dim % tensor.dim() != dim:
            continue
        mesh: Any = placed.device_mesh
        count, rank = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
        whole = torch.arange(tensor.shape[dim]) if indices is None else indices
        # Interleaved pieces (gate and up in one tensor) are cut one by one.
        pieces = whole.chunk(getattr(placement, "split_factor", 1))
        indices = torch.cat([_chunk(piece, count, rank) for piece in pieces])
    return indices


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `like` is."""
    for dim in range(like.dim()):
        indices = own_indices(like, dim)
        tensor = tensor if indices is None else tensor.index_select(dim, indices)
    return tensor


def divides_experts(tensor: Tensor) -> bool:
    """Whether each rank has other experts of these."""
    return tensor.dim() > 2 and own_indices(tensor, 0) is not None


def _chunk(piece: Tensor, count: int, rank: int) -> Tensor:
    chunks = piece.chunk(count)
    return chunks[rank] if rank < len(chunks) else piece[:0]


def _cuts(placement: Any) -> bool:
    return hasattr(placement, "dim")


def agreed(model: nn.Module, action: Callable[[], T]) -> T:
    """The result of `action`. If ranks share the model, all of them have to come here, and an error
    on one of them is raised on all: otherwise those without it would wait in the next call."""
    mesh = next((_mesh(p) for p in model.parameters() if is_placed(p)), None)
    if mesh is None:
        return action()
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    group, mine = mesh.get_group(0), None
    if error is not None:  # classes of others may not be picklable
        kind = type(error) if isinstance(error, LorafxError) else LorafxError
        mine = kind, str(error)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    if error is not None:
        raise error
    for rank, other in enumerate(found):
        if other is not None:
            kind, text = other
            raise kind(f"rank {rank} failed: {text}")
    return result


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh


def is_gathered(module: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) gathers the weights around each call of the module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, without tensor parallelism around it."""
    cell = cell_of_forward(module)
    found = module.forward if cell is None else cell.cell_contents
    return found.beneath if isinstance(found, LocalForward) else found


class LocalForward(nn.Module):
    """The forward beneath tensor parallelism as a module call, so that hooks see this rank's x and
    y before ranks are combined. It is no child of the module, whose names stay as they are."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.beneath = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.beneath(*args, **kwargs)


def callers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that have hooks around a module's computation: itself, and what `install` made of
    its forward."""
    yield module
    cell = cell_of_forward(module)
    if cell is not None and isinstance(cell.cell_contents, LocalForward):
        yield cell.cell_contents


class Placements(NamedTuple):
    """The sharding of a weight that is a DTensor, the attribute `weight` of its module. `slices`:
    pieces of equal size that its outputs consist of; `transposed`: stored as (…, K, N)."""

    weight: str
    transposed: bool = False
    slices: int = 1

    def saved_sizes(self, module: nn.Module) -> tuple[int, tuple[int, ...]]:
        out, into = self._dims
        shape = module.get_parameter(self.weight).shape
        return shape[into], (shape[out] // self.slices,) * self.slices

    def local_sizes(self, module: nn.Module) -> tuple[int, int]:
        """(K, N) of this rank."""
        out, into = self._dims
        shape = local(module.get_parameter(self.weight)).shape
        return shape[into], shape[out]

    def cut(
        self, module: nn.Module, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        tensor = module.get_parameter(self.weight)
        out, into = self._dims
        columns, rows = own_indices(tensor, into), own_indices(tensor, out)
        if columns is not None:
            A = A.index_select(-1, columns)
        if rows is not None:
            # B has the rows of these slices, one after another.
            size = tensor.shape[out] // self.slices
            starts = ((number * size, place * size) for place, number in enumerate(slices))
            own = [rows[(rows >= a) & (rows < a + size)] - a + to for a, to in starts]
            B = B.index_select(-2, torch.cat(own))
        return A, B

    def product(self, module: nn.Module) -> nn.Module:
        cell = cell_of_forward(module)
        if cell is None or module.get_parameter(self.weight).dim() > 2:
            return module  # the products of experts are found in the graph
        found = cell.cell_contents
        return found if isinstance(found, LocalForward) else LocalForward(found)

    @property
    def _dims(self) -> tuple[int, int]:
        return (-1, -2) if self.transposed else (-2, -1)


def install(module: nn.Module, product: nn.Module) -> Callable[[], None]:
    """Have tensor parallelism call the `LocalForward` in the place of the module's forward. Returns
    a function that undoes it, unless something else has hooks there."""
    cell = cell_of_forward(module)
    assert cell is not None
    assert isinstance(product, LocalForward)
    cell.cell_contents = product

    def undo() -> None:
        if cell.cell_contents is product and not product._forward_hooks:
            cell.cell_contents = product.beneath

    return undo


def refusal(module: nn.Module, name: str) -> str | None:
    """Why the weight `name` of a module is not served as a DTensor; None if it is, or is none."""
    tensor: Any = module._parameters.get(name)
    if not is_placed(tensor):
        return None
    whole = "; gather it (full_tensor()), or leave the module out of target_modules"
    if divides_experts(tensor) and not sums_experts(module):
        return (
            "its experts are divided among ranks, between which tokens move; have each rank "
            'compute all tokens by DistributedConfig(ep_size=tp_size, ep_implementation="auto"), '
            "cut each expert by tensor parallel (no ep_size), or leave them out of target_modules"
        )
    cutting = [placement for placement in tensor.placements if _cuts(placement)]
    if len(cutting) > 1 or any(placement.is_partial() for placement in tensor.placements):
        return f"its weight is a DTensor that is placed as {tensor.placements}{whole}"
    if tensor.dim() == 2 and cell_of_forward(module) is None:
        return (
            f"its weight is a DTensor ({tensor.placements}), and its forward is not one that "
            f"transformers' tensor parallelism has put in (from_pretrained(tp_plan=...)){whole}"
        )
    return None

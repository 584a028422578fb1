"""What vLLM's layers call for LoRA, with the factors in lorafx's banks.

    vLLM's layer           calls                        here
    linear                 add_lora_linear              y += delta, all slices at once
    linear, fully sharded  add_shrink, add_expand       v += x Aᵀ, which the layer gathers; y += v B
    embedding              add_lora_embedding           y += A[slot, ids] B
    logits processor       add_lora_logits              as a linear, for sampled rows
    routed experts         add_lora_w13, add_lora_w2    y[t, j] += delta of token t's j-th expert

vLLM's stacked factors of a layer, A (S, 1, R, K) and B (S, 1, N, R), become views of a bank
(lorafx.model.bank), so that its `set_lora` and `reset_lora` write into the bank. It pads smaller
ranks with zeros and multiplies B by the scale; `read_ranks` finds the ranks in what was written.

vLLM traces a step once and drops all guards. So these methods read tensors at fixed addresses, and
nothing that changes from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import ConfigError
from lorafx.integrations.vllm.wrapper import LoraWrapper
from lorafx.kernels.cpu import delta_kernels
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import Ranges
from lorafx.model.bank import Bank

#: Types of devices whose kernels are generated in C++; on others Triton's are.
COMPILED_ON = {"cpu"}


class BankDelta:
    """The deltas of one bank, by generated kernels."""

    def __init__(self, kind: str, like: Tensor, *, K: int, rank: int, sizes: Sequence[int]) -> None:
        """A bank of zeros with the slots, experts, dtype and device of the stacked factors `like`,
        for an input of K features, and slices of these sizes."""
        self.bank = Bank.allocate(
            kind=kind,
            slots=like.shape[0],
            rank=rank,
            in_features=K,
            out_features=tuple(sizes),
            dtype=like.dtype,
            device=like.device,
            experts=like.shape[1] if kind == "experts" else 1,
        )
        self.bank.scales.fill_(1.0)
        self.capacity = like.shape[0]
        offsets = [sum(sizes[:j]) for j in range(len(sizes))]
        self.ranges = Ranges(list(range(len(sizes))), offsets, list(sizes))
        #: Ids of kernels by the dtypes of x and y, None where plain aten computes.
        self.kernels: dict[tuple[torch.dtype, torch.dtype], tuple[int, ...] | None] = {}
        self.compiled = like.device.type in COMPILED_ON

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bank = self.bank
        return bank.A, bank.B, bank.ranks, bank.scales

    def spec(self, x_dtype: torch.dtype, y_dtype: torch.dtype) -> DeltaSpec:
        A, B, ranks, _ = self.tensors
        x, y = (torch.empty(0, dtype=dtype, device="meta") for dtype in (x_dtype, y_dtype))
        if self.bank.kind == "embedding":
            return DeltaSpec.of_embedding(y, A, B)
        experts = self.bank.experts if self.bank.kind == "experts" and self.compiled else 0
        return DeltaSpec.linear(y, x, A, B, ranks, *self.ranges, experts=experts)

    def build(self, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
        """Makes the kernels for these dtypes; other dtypes are computed in plain aten."""
        spec = self.spec(x_dtype, y_dtype)
        if self.compiled:
            kernel = delta_kernels.build(spec)
            self.kernels[x_dtype, y_dtype] = None if kernel is None else (kernel,)
        else:
            from lorafx.integrations.vllm.launches import launches

            self.kernels[x_dtype, y_dtype] = launches(spec, self.bank.A.device)

    def add_(self, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """Adds the delta of each row of x (M, K), of slot `slots[m]`, to y (M, N)."""
        ops, bank = torch.ops.lorafx, (*self.tensors, slots)
        kernels = self.kernels.get((x.dtype, y.dtype))
        if kernels is None:
            ops.add_delta_(y, x, *bank, *self.ranges, 1)
        elif self.compiled:
            ops.run_delta_(y, x, *bank, 1, *kernels)
        else:
            ops.launch_delta_(y, x, *bank, *kernels)

    def look_up_(self, y: Tensor, ids: Tensor, slots: Tensor) -> None:
        """Adds an embedding's delta for ids (...) to y (..., N), rows counted over all of ids."""
        ops, bank = torch.ops.lorafx, (*self.tensors, slots)
        kernels = self.kernels.get((self.bank.A.dtype, y.dtype))
        if kernels is None:
            ops.add_embedding_delta_(y, ids, *bank, 1)
        elif self.compiled:
            ops.run_embedding_delta_(y, ids, *bank, 1, *kernels)
        else:
            ops.launch_delta_(y.flatten(0, -2), ids.flatten(), *bank, *kernels)

    def route_(self, y: Tensor, x: Tensor, experts: Tensor, slots: Tensor) -> None:
        """Adds the delta of each row of x (T, k, K), of experts (T, k), to y (T, k, N); the slot of
        token t is `slots[t]`."""
        ops, E = torch.ops.lorafx, self.bank.experts
        k, flat = experts.shape[1], experts.flatten()
        kernels = self.kernels.get((x.dtype, y.dtype))
        if kernels is not None and self.compiled:
            tensors = (*self.tensors, slots, self.bank.alike)
            ops.run_expert_delta_(y, x, *tensors, flat, k, E, False, *kernels)
            return
        keys = ops.expert_slots(slots, flat, k, E, self.capacity)
        rows, bank = (y.flatten(0, 1), x.flatten(0, 1)), (*self.tensors, keys)
        if kernels is None:
            ops.add_delta_(*rows, *bank, *self.ranges, 1)
        else:
            ops.launch_delta_(*rows, *bank, *kernels)

    def read_ranks(self, slot: int) -> None:
        """Sets the ranks of `slot` to its last factors that are not zero, on the device."""
        A, B, ranks, _ = (tensor[slot :: self.capacity] for tensor in self.tensors)
        if self.bank.kind == "embedding":
            in_a = (A != 0).any(1).unsqueeze(-1)
        else:
            in_a = (A.unflatten(-1, (ranks.shape[1], -1)) != 0).any(-1)
        columns = zip(self.ranges.offsets, self.ranges.sizes, strict=True)
        in_b = torch.stack([(B[..., o : o + n] != 0).any(-1) for o, n in columns], -1)
        numbers = torch.arange(1, B.shape[1] + 1, dtype=torch.int32, device=B.device)
        ranks.copy_(((in_a & in_b) * numbers.unsqueeze(-1)).amax(1))

    def stacked_a(self, part: int) -> Tensor:
        """A of a slice as vLLM has it, (S, 1, R, K), with experts (S, E, R, K)."""
        K = self.bank.A.shape[2] // self.bank.ranks.shape[1]
        A = self.bank.A[:, :, part * K : (part + 1) * K]
        return A.unflatten(0, (-1, self.capacity)).transpose(0, 1)

    def stacked_b(self, part: int) -> Tensor:
        """B of a slice as vLLM has it, (S, 1, N, R), with experts (S, E, N, R)."""
        start, size = self.ranges.offsets[part], self.ranges.sizes[part]
        B = self.bank.B[:, :, start : start + size].transpose(1, 2)
        return B.unflatten(0, (-1, self.capacity)).transpose(0, 1)


class LayerSite:
    """A layer's deltas, in the place of vLLM's wrapper."""

    def __init__(self, wrapper: LoraWrapper, *deltas: BankDelta) -> None:
        self.wrapper = wrapper
        self.deltas = deltas

    def read_ranks(self, slot: int) -> None:
        for delta in self.deltas:
            delta.read_ranks(slot)


class LinearSite(LayerSite):
    """Of a linear whose slices are the column ranges of one bank."""

    def __init__(self, wrapper: LoraWrapper, layer: Any) -> None:
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        sizes = [each.shape[2] for each in b]
        rank, K = a[0].shape[2:]
        delta = BankDelta("linear", a[0], rank=rank, K=K, sizes=sizes)
        super().__init__(wrapper, delta)
        layer.lora_a_stacked = tuple(delta.stacked_a(j) for j in range(len(a)))
        layer.lora_b_stacked = tuple(delta.stacked_b(j) for j in range(len(b)))
        dtype = layer.base_layer.params_dtype
        delta.build(dtype, dtype)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, *_: Any, add_inputs: bool = True, **__: Any
    ) -> Tensor:
        if not add_inputs:
            y.zero_()
        self.deltas[0].add_(y, x, self.wrapper.tokens.slots)
        return y


class ShardedSite(LayerSite):
    """Of a linear between whose shrink and expand v, in float32, is gathered from other ranks. A of
    all slices is a bank whose B are identities; B is one whose A pick a slice's part of v."""

    def __init__(self, wrapper: LoraWrapper, layer: Any) -> None:
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        self.slices, dtype = len(a), layer.base_layer.params_dtype
        (part, K), rank = a[0].shape[2:], b[0].shape[3]
        self.shrink = BankDelta("linear", a[0], rank=part, K=K, sizes=[part] * len(a))
        self.shrink.bank.B.copy_(torch.eye(part).repeat(1, len(a)))
        self.shrink.build(dtype, torch.float32)
        sizes = [each.shape[2] for each in b]
        self.expand = BankDelta("linear", b[0], rank=rank, K=rank * len(b), sizes=sizes)
        picked = torch.eye(rank * len(b)).unflatten(0, (len(b), rank)).transpose(0, 1)
        self.expand.bank.A.copy_(picked.flatten(1))
        self.expand.build(torch.float32, dtype)
        super().__init__(wrapper, self.shrink, self.expand)
        layer.lora_a_stacked = tuple(self.shrink.stacked_a(j) for j in range(len(a)))
        layer.lora_b_stacked = tuple(self.expand.stacked_b(j) for j in range(len(b)))

    def add_shrink(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """y (slices, M, r) += x Aᵀ."""
        v = y.new_zeros(y.shape[1], y.shape[0] * y.shape[2])
        self.shrink.add_(v, x, self.wrapper.tokens.slots)
        return y.add_(v.unflatten(-1, (self.slices, -1)).transpose(0, 1))

    def add_expand(self, y: Tensor, x: Tensor, *_: Any, offset_start: int = 0, **__: Any) -> Tensor:
        """The columns of y (M, N) from `offset_start` on += v B, for v = x (slices, M, R).

        The operator writes no view of y: torch would compare sizes, and fix those that are alike.
        """
        delta = y.new_zeros(y.shape[0], sum(self.expand.ranges.sizes))
        v = x.transpose(0, 1).flatten(1).contiguous()
        self.expand.add_(delta, v, self.wrapper.tokens.slots)
        y[:, offset_start : offset_start + delta.shape[1]].add_(delta)
        return y


class EmbeddingSite(LayerSite):
    """Of an embedding."""

    def __init__(self, wrapper: LoraWrapper, layer: Any) -> None:
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        (vocabulary, rank), columns = a.shape[1:], b.shape[2]
        delta = BankDelta("embedding", a, rank=rank, K=vocabulary, sizes=[columns])
        super().__init__(wrapper, delta)
        layer.lora_a_stacked, layer.lora_b_stacked = delta.bank.A, delta.stacked_b(0)
        layer.lora_a_stacked_2d = layer.lora_a_stacked.flatten(0, 1)
        delta.build(a.dtype, layer.base_layer.weight.dtype)

    def add_lora_embedding(self, y: Tensor, ids: Tensor) -> Tensor:
        self.deltas[0].look_up_(y, ids, self.wrapper.tokens.slots)
        return y


class LogitsSite(LayerSite):
    """Of the head of a language model, which reads sampled rows."""

    def __init__(self, wrapper: LoraWrapper, layer: Any) -> None:
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        rank, K = a.shape[2:]
        delta = BankDelta("linear", a, rank=rank, K=K, sizes=[b.shape[2]])
        super().__init__(wrapper, delta)
        layer.lora_a_stacked, layer.lora_b_stacked = delta.stacked_a(0), delta.stacked_b(0)

    def add_lora_logits(self, y: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """`y` may have more columns than the vocabulary, which stay as they are."""
        (delta,) = self.deltas
        if (x.dtype, y.dtype) not in delta.kernels:  # a head of another type; never compiled
            delta.build(x.dtype, y.dtype)
        delta.add_(y[..., : delta.ranges.sizes[0]], x, self.wrapper.samples.slots)
        return y


class ExpertsSite(LayerSite):
    """Of routed experts: vLLM's own on a GPU, those of experts.py on a CPU."""

    def __init__(self, wrapper: LoraWrapper, layer: Any) -> None:
        if layer.enable_moe_shared_loras:
            raise ConfigError(
                "lorafx has a factor for each expert, and none that experts share: leave "
                "--enable-moe-shared-loras out, or let vLLM compute LoRA by LORAFX_VLLM=off"
            )
        self.up = self._adopted(layer, "w13")
        self.down = self._adopted(layer, "w2")
        super().__init__(wrapper, self.up, self.down)
        self.columns_of_down = layer.tp_rank * self.down.ranges.sizes[0] * layer.fully_sharded
        # vLLM makes adapters of zeros by the shapes of these lists, which keep the old factors.
        parts = [("w13", 0), ("w2", 0), ("w13", 1)][: 1 + len(self.up.ranges.sizes)]
        for letter in "ab":
            stacks = [getattr(layer, f"{name}_lora_{letter}_stacked")[j] for name, j in parts]
            pairs = (divmod(i, layer.local_num_experts) for i in range(self._count(layer)))
            found = [stack[slot][expert] for slot, expert in pairs for stack in stacks]
            setattr(layer, f"lora_{letter}_stacked", found)

    @staticmethod
    def _count(layer: Any) -> int:
        """Slots times experts."""
        slots, experts = layer.w2_lora_a_stacked[0].shape[:2]
        return int(slots * experts)

    @staticmethod
    def _adopted(layer: Any, name: str) -> BankDelta:
        """The delta of one of the two products, whose stacked factors become views of its bank."""
        a, b = (getattr(layer, f"{name}_lora_{letter}_stacked") for letter in "ab")
        rank, K = a[0].shape[2:]
        sizes = [each.shape[2] for each in b]
        delta = BankDelta("experts", a[0], rank=rank, K=K, sizes=sizes)
        dtype = layer.moe_config.in_dtype
        delta.build(dtype, dtype)
        parts = range(len(sizes))
        setattr(layer, f"{name}_lora_a_stacked", tuple(map(delta.stacked_a, parts)))
        setattr(layer, f"{name}_lora_b_stacked", tuple(map(delta.stacked_b, parts)))
        return delta

    def add_lora_w13(
        self,
        y: Tensor,
        x: Tensor,
        *arguments: Any,
        add_inputs: bool = True,
        token_lora_mapping: Tensor | None = None,
    ) -> tuple[None, Tensor, None, Tensor]:
        """y (T, k, ΣN) += delta of x (T, K). Returns what `add_lora_w2` gets: the experts (T, k) of
        this rank, -1 for others', and the slots of tokens."""
        _, _, experts, _, expert_map, *_ = arguments
        if expert_map is not None:
            experts = expert_map[experts]
        slots = self.wrapper.tokens.slots if token_lora_mapping is None else token_lora_mapping
        slots = slots.to(torch.int32)
        if not add_inputs:
            y.zero_()
        rows = x.unsqueeze(1).expand(-1, experts.shape[1], -1)
        self.up.route_(y.view(*experts.shape, -1), rows, experts, slots)
        return None, experts, None, slots

    def add_lora_w2(self, y: Tensor, x: Tensor, *arguments: Any, add_inputs: bool = True) -> None:
        """y (T, k, N) += w · delta of x (T·k, K), w the routers' weights."""
        _, _, weights, _, experts, _, slots, *_ = arguments
        delta = y.new_zeros(*experts.shape, self.down.ranges.sizes[0])
        self.down.route_(delta, x.view(*experts.shape, -1), experts, slots)
        start = self.columns_of_down
        part = y.view(*experts.shape, -1)[..., start : start + delta.shape[-1]]
        if not add_inputs:
            y.zero_()
        part += (delta * weights.unsqueeze(-1)).to(y.dtype)

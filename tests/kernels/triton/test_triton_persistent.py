"""The strategy "persistent": tiles one after another, several adapters in one, descriptors."""

from __future__ import annotations

import contextvars
import re
from dataclasses import replace

import pytest
import torch
import triton
from compile_only_gpu import compile_only_gpu, generated_code
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import BF16, FP32, Case, assert_right, kernel_of, lora, make_case, run

from lorafx.errors import LoweringError
from lorafx.kernels.tools.triton_variants import representative_specs
from lorafx.kernels.triton.persistent_tiles import persistent_tiles
from lorafx.kernels.triton.strategy_tiles import tiles_for
from lorafx.kernels.triton.triton_build import build, plan_of
from lorafx.kernels.triton.triton_tiles import ARCHITECTURES, Tiles
from lorafx.torch_internals.inductor_wrapper import scratch_for_each_program
from lorafx.torch_internals.triton_compat import allow_scratch

KERNEL_CALL = torch.ops.higher_order.triton_kernel_wrapper_functional
INTERPRETER = ARCHITECTURES["interpreter"]


def tiles_of(case: Case, **changes: object) -> dict[str, Tiles]:
    """The interpreter's tiles of the case, the product's changed."""
    M = case.problem.x.shape[0]
    tiles = tiles_for("persistent", case.spec.delta, M, INTERPRETER)
    return {**tiles, "persistent": replace(tiles["persistent"], **changes)}


@pytest.mark.parametrize(
    "changes",
    [
        {"programs": 1},
        {"programs": 7, "slices": 1},
        {"slices": 4, "early": False},
        {"slices": 2, "early": False, "block_r": 4},
        {"tma": False, "block_k": 32},
        {"group_m": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(64, 32), (40, 72)], ids=str)
def test_tiles_of_any_rows(sizes: tuple[int, ...], changes: dict[str, object]) -> None:
    """Runs of rows that end within tiles, base rows among them, the last tile cut off."""
    slots = (2, 2, -1, 0, 1, 3, 3, 2)
    case = make_case(K=80, sizes=sizes, slots=slots, rows=11, rank=7, dtypes=(BF16,) * 3)
    tiles = tiles_of(case, block_m=16, block_n=32, **changes)
    assert_right(case, "persistent", run(case, "persistent", tiles))


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_no_number_stays_with_its_rows(factor: str, value: float) -> None:
    """In a tile of several adapters and base rows: bit-equal with the neighbour's factors sound."""
    slots = (0, 1, -1, 1, 2)
    case = make_case(K=64, sizes=(32, 16), slots=slots, rows=3, rank=8, dtypes=(BF16,) * 3)
    sound = run(case, "persistent")
    tensor = getattr(case.problem, factor).clone()
    tensor[1, 0, 3] = value
    got = run(case.with_(**{factor: tensor}), "persistent")
    spoiled = torch.tensor([slot == 1 for slot in slots]).repeat_interleave(3)
    assert torch.equal(got[~spoiled], sound[~spoiled])
    assert not got[spoiled].isfinite().all(1).any()
    base = run(case.with_(slots=torch.full_like(case.problem.slots, -1)), "persistent")
    assert torch.equal(got[6:9].view(torch.int16), base[6:9].view(torch.int16))


def wide(tensor: Tensor) -> Tensor:
    """The same rows, not at multiples of 16 bytes."""
    return torch.cat([tensor, tensor[:, :1]], 1)[:, : tensor.shape[1]]


def shifted(tensor: Tensor) -> Tensor:
    """The same rows behind one more element."""
    flat = torch.cat([tensor.flatten()[:1], tensor.flatten()])
    return flat[1:].view(tensor.shape)


@pytest.mark.parametrize("laid", [wide, shifted])
def test_rows_that_no_descriptor_can_read_are_refused(laid) -> None:
    case = make_case(K=64, sizes=(32,), slots=(0, 1), rank=4, bias=False)
    p, kernel = case.problem, kernel_of(case, "persistent")
    assert plan_of(kernel).by_descriptor
    with pytest.raises(LoweringError, match="rows of x do not begin at multiples of 16 bytes"):
        lora.triton_linear(laid(p.x), case.weight, None, *p.bank, p.rows, kernel)
    with pytest.raises(LoweringError, match="rows of weight do not begin at multiples"):
        lora.triton_linear(p.x, laid(case.weight), None, *p.bank, p.rows, kernel)


def test_sizes_that_descriptors_cannot_have_are_read_by_pointers() -> None:
    case = make_case(K=77, sizes=(45,), slots=(0, -1, 1), rows=5, rank=4, dtypes=(FP32,) * 3)
    assert not plan_of(kernel_of(case, "persistent")).by_descriptor
    assert_right(case, "persistent", run(case, "persistent"))


def test_inductor_runs_it_on_what_there_is() -> None:
    """Descriptors are made in the kernel, which Inductor sees through: it writes y and nothing
    else, so x, W and the bank are not copied."""
    spec = representative_specs()["qkv_r16_bf16"]
    tiles = persistent_tiles(spec.delta, 4096, ARCHITECTURES["cuda90"])
    assert tiles["persistent"].tma
    cuda, d = torch.device("cuda", 0), spec.delta
    with compile_only_gpu(), FakeTensorMode() as mode:
        kernel = build(spec, "persistent", rows_hint=4096, device=cuda, tiles=tiles)
        assert kernel is not None

        def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=cuda)

        tensors = (
            *(empty(4096, d.in_features), empty(d.columns, d.in_features)),
            *(empty(4, d.max_rank, d.group * d.in_features), empty(4, d.max_rank, d.columns)),
            *(empty(4, d.group, dtype=torch.int32), empty(4, d.group, dtype=FP32)),
            empty(8, dtype=torch.int32),
        )

        def call(x: Tensor, weight: Tensor, *bank: Tensor) -> tuple[Tensor]:
            return (lora.triton_linear(x, weight, None, *bank, 512, kernel),)

        gm = make_fx(dispatch_functionalize(call, FunctionalTensorMode()))(*tensors)
    calls = [node for node in gm.graph.nodes if node.target is KERNEL_CALL]
    assert [node.kwargs["tensors_to_clone"] for node in calls] == [["v_ptr"], ["y_ptr"]]
    text = generated_code(gm, mode)
    assert "make_tensor_descriptor" in text
    body = text[text.index("def call(") :]
    assert re.search(r"persistent_\d+\.run\(", body)
    assert "clone" not in body


def test_packages_have_scratch_for_every_program() -> None:
    from torch._inductor.codegen.common import TritonScratchWorkspace
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    scratch_for_each_program()
    scratch_for_each_program()  # once is enough
    workspace = TritonScratchWorkspace(384, generate_dtype_str=lambda: "uint8")
    found = CUDADeviceOpOverrides().cpp_scratch(3, workspace, "global_scratch")
    assert found is not None
    assert found[0][0].endswith("{static_cast<int64_t>(384) * grid_0 * grid_1 * grid_2};")
    nothing = TritonScratchWorkspace(0, generate_dtype_str=lambda: "uint8")
    scratch = CUDADeviceOpOverrides().cpp_scratch(3, nothing, "global_scratch")
    assert scratch is not None
    assert "grid_0" not in "".join(scratch[0])


def test_plain_launches_have_scratch_and_a_users_own_allocator_stays() -> None:
    from triton.runtime import _allocation

    def in_a_context_of_its_own() -> None:
        assert isinstance(_allocation._allocator.get(), _allocation.NullAllocator)
        allow_scratch()
        ours = _allocation._allocator.get()
        with FakeTensorMode():
            assert ours(384, 128, None).numel() == 384
        triton.set_allocator(theirs)
        allow_scratch()
        assert _allocation._allocator.get() is theirs

    def theirs(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    contextvars.Context().run(in_a_context_of_its_own)

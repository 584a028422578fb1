"""How base weights are stored: formats that libraries keep W in, and how to read and write them.

    plain              W itself, numbers of 16 bits or more
    quant_method       lorafx.layers and classes like them: the method reads and writes it
    tensor subclass    torchao's and others: `weight.dequantize()`, or x Wᵀ for unit vectors x
    bitsandbytes       Int8Params (W ≈ CB · SCB / 127), Params4bit (blocks of a code times absmax)
    fine-grained fp8   transformers' FP8Linear, FP8Experts: W = Q · s of its block, and one scale
    gptqmodel          GPTQ's and AWQ's integers, in a layout of the kernel that multiplies

A format is found by the class of what holds W; no library is imported here. One file: the table at
its end, whose order decides, with a short class for each.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lorafx.libraries import is_of_library
from lorafx.placements import is_placed, local
from lorafx.registry import Eligible
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass


class CannotStore(Exception): ...


class Format(ABC):
    """One way to store a weight. `name` is the attribute of the module that holds it."""

    @abstractmethod
    def holds(self, module: nn.Module, name: str) -> bool: ...

    @abstractmethod
    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        """W as numbers, laid out as the module stores it."""

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        """Those that may hold the weight, of a module without children."""
        return own_tensors(module)

    def settle(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:  # noqa: B027
        """Make the changes of the next call, with x in `dtype`, to the module's tensors now: no
        graph can capture them. Most formats have none."""

    def can_be_unsettled(self, module: nn.Module, name: str) -> bool:
        """Whether something other than calls undoes `settle`."""
        return False

    def sizes_by_data(self, module: nn.Module) -> bool:
        """Whether its kernels return tensors whose sizes depend on other tensors' contents."""
        return False

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Store `weight` in place. Raises CannotStore, possibly after changing some tensors."""
        raise CannotStore(f"lorafx can read {type(self).__name__}, but not write it")

    def keep(self, module: nn.Module, name: str) -> Callable[[], None]:
        """Returns a function that restores the current numbers, bit by bit."""
        copies = [tensor.detach().clone() for tensor in self.tensors(module, name)]
        return lambda: _write(self.tensors(module, name), copies)


@dataclass(frozen=True)
class Declared(Format):
    """A format declared by `lorafx.register(dequantize=...)`."""

    entry: Eligible

    def holds(self, module: nn.Module, name: str) -> bool:
        return True

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        assert self.entry.dequantize is not None
        return self.entry.dequantize(module)

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        raise CannotStore("its class declares how to read its weight, but not how to write it")


class QuantMethod(Format):
    """A `quant_method` with `dequantize(module)`, as the layers of lorafx.layers have."""

    def holds(self, module: nn.Module, name: str) -> bool:
        method = getattr(module, "quant_method", None)
        return callable(getattr(method, "dequantize", None))

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        method: Any = module.quant_method
        return method.dequantize(module)

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        method: Any = module.quant_method
        incoming = getattr(method, "incoming", None)
        if incoming is None:
            raise CannotStore(f"{type(method).__qualname__} has no method `incoming`")
        for target, value in incoming(module, name, weight):
            getattr(module, target).data.copy_(value)
        method.process_weights_after_loading(module)


class Bitsandbytes8(Format):
    """Linear8bitLt: CB (N, K) int8 and SCB (N,), the largest |W| of each row."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight: Any = getattr(module, name, None)
        return (
            is_of_library(weight, "bitsandbytes.nn.modules", "Int8Params")
            and weight.dtype == torch.int8
        )

    def settle(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        # Statistics move from the parameter to the module's state.
        if isinstance(module, nn.Linear) and getattr(module, name).CB is not None:
            module.init_8bit_state()  # type: ignore[operator]

    def sizes_by_data(self, module: nn.Module) -> bool:
        state: Any = getattr(module, "state", None)
        return state is not None and state.threshold > 0  # the columns of outliers in x

    def scale(self, module: nn.Module, name: str) -> Tensor:
        # The first forward moves it from the parameter to the module's state.
        scale = getattr(module, name).SCB
        return scale if scale is not None else module.state.SCB  # type: ignore[union-attr, return-value]

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        scale = self.scale(module, name)
        return getattr(module, name).data.float() * (scale.float() / 127)[:, None]

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        return [getattr(module, name).data, self.scale(module, name)]

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        functional: Any = sys.modules["bitsandbytes.functional"]
        stored, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        _write(self.tensors(module, name), [stored, scale])


class Bitsandbytes4(Format):
    """Linear4bit: two numbers a byte; `quant_state` has the code, the scales and the shape."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight: Any = getattr(module, name, None)
        return (
            is_of_library(weight, "bitsandbytes.nn.modules", "Params4bit") and weight.bnb_quantized
        )

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        weight = getattr(module, name)
        data, state = self._unpacked(weight.data, self._state(module, name))
        functional: Any = sys.modules["bitsandbytes.functional"]
        return functional.dequantize_4bit(data, state)

    def settle(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        # On CPUs with bfloat16 products the call of one row repacks the weight.
        weight, state = getattr(module, name), self._state(module, name)
        packed = getattr(state, "packing_format_for_cpu", False)
        on_cpu = weight.device.type == "cpu"
        if not isinstance(module, nn.Linear) or not on_cpu or packed or module.training:
            return
        own: Any = getattr(module, "compute_dtype", None) or state.dtype
        with torch.no_grad():
            module.forward(torch.zeros(1, state.shape[-1], dtype=own))

    def can_be_unsettled(self, module: nn.Module, name: str) -> bool:
        # state_dict() undoes the packing.
        return isinstance(module, nn.Linear) and getattr(module, name).device.type == "cpu"

    def _state(self, module: nn.Module, name: str) -> Any:
        return getattr(module, name).quant_state or module.quant_state

    def _unpacked(self, data: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Data and state in the common layout, which the first forward repacks on some CPUs."""
        if not getattr(state, "packing_format_for_cpu", False):
            return data, state
        functional: Any = sys.modules["bitsandbytes.functional"]
        absmax = state.absmax.T.reshape(-1).float()
        state = copy.copy(state)
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.nested = absmax, False
        return data, state

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        state = self._state(module, name)
        scales = [state.absmax]
        if state.nested:
            scales += [state.offset, state.state2.absmax]
        return [getattr(module, name).data, *scales]

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        parameter, state = getattr(module, name), self._state(module, name)
        functional: Any = sys.modules["bitsandbytes.functional"]
        packed = getattr(state, "packing_format_for_cpu", False)
        data, new = functional.quantize_4bit(
            weight.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested and not packed,
            quant_type=state.quant_type,
            quant_storage=parameter.quant_storage,
        )
        if packed:
            data, new = functional._convert_weight_packed_for_cpu(data, new)
        values = [data.view(parameter.dtype).view_as(parameter.data), new.absmax]
        if new.nested:
            values += [new.offset, new.state2.absmax]
        _write(self.tensors(module, name), values)

    def keep(self, module: nn.Module, name: str) -> Callable[[], None]:
        restore_in_place = super().keep(module, name)
        data = getattr(module, name).data.clone()
        state = copy.deepcopy(vars(self._state(module, name)))
        packed = state.get("packing_format_for_cpu", False)

        def restore() -> None:
            current = self._state(module, name)
            if getattr(current, "packing_format_for_cpu", False) == packed:
                restore_in_place()
            else:  # a forward has repacked it since
                getattr(module, name).data = data.clone()
                vars(current).clear()
                vars(current).update(copy.deepcopy(state))

        return restore


class Bitsandbytes4Parameter(Format):
    """What `replace_parameter_4bit` makes of any parameter: a parametrisation dequantises it."""

    def holds(self, module: nn.Module, name: str) -> bool:
        return self.maker(module, name) is not None

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        return getattr(module, name).detach()

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        makers: Any = module.parametrizations
        return list(makers[name].parameters())

    def described(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the weight's sizes and dtype, on meta."""
        state: Any = self.maker(module, name).quant_state
        return torch.empty(tuple(state.shape), dtype=state.dtype, device="meta")

    def maker(self, module: nn.Module, name: str) -> Any:
        """The parametrisation; None for a weight of another kind."""
        if not is_parametrized(module, name):
            return None
        makers: Any = module.parametrizations
        maker, *others = makers[name]
        known = is_of_library(maker, "bitsandbytes.nn.parametrize", "Bnb4bitParametrization")
        return maker if known and not others else None


class WrapperSubclass(Format):
    """A tensor subclass that wraps others and has `dequantize()`: torchao's."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = getattr(module, name, None)
        return is_wrapped(weight) and callable(getattr(weight, "dequantize", None))

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        weight = getattr(module, name).detach()
        try:
            return weight.dequantize()
        except NotImplementedError:  # of torchao's Int4OpaqueTensor, which multiplies only
            units = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            return torch.nn.functional.linear(units, weight).T.contiguous()

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        return list(plain_tensors(getattr(module, name)))


class FineGrained8(Format):
    """transformers' FP8Linear and FP8Experts: `<name>_scale_inv` holds a scale for each block of
    rows and columns (…, N / n, K / k), or one for all."""

    def holds(self, module: nn.Module, name: str) -> bool:
        owner = "transformers.integrations.finegrained_fp8"
        known = is_of_library(module, owner, "FP8Linear") or is_of_library(
            module, owner, "FP8Experts"
        )
        return known and getattr(module, f"{name}_scale_inv", None) is not None

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        weight, scale = (tensor.detach().float() for tensor in self.tensors(module, name))
        block: Any = module.block_size
        if block is None or scale.dim() < 2:  # a single scale, or one per expert
            return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        rows, columns = weight.shape[-2:]
        scale = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
        return weight * scale[..., :rows, :columns]

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        return [getattr(module, name), getattr(module, f"{name}_scale_inv")]


class QuantLinear(Format):
    """gptqmodel's linears, which hold integers, scales and zeros. The first call chooses a kernel
    by the dtype of x, and may pack them for it."""

    def holds(self, module: nn.Module, name: str) -> bool:
        return is_of_library(module, "gptqmodel.nn_modules.qlinear", "BaseQuantLinear")

    def settle(self, module: nn.Module, name: str, dtype: torch.dtype) -> None:
        inputs: Any = module.in_features
        tensors = own_tensors(module)
        if not module.training and tensors and not tensors[0].is_meta:
            with torch.no_grad():
                module.forward(tensors[0].new_zeros((1, inputs), dtype=dtype))

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        own: Any = copy.deepcopy(module)  # the call may pack the integers
        scales = next(filter(is_dense, own_tensors(own)))
        units = torch.eye(own.in_features, device=scales.device)
        with torch.no_grad():
            try:
                y = own.forward(units)  # in float32 nothing is rounded
            except Exception:  # of a kernel for the dtype of the scales alone
                y = own.forward(units.to(scales.dtype))
        return (y if own.bias is None else y - own.bias).T.contiguous()


class Plain(Format):
    """Numbers of 16 bits or more in a tensor of no other format, or this rank's part of one."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = getattr(module, name, None)
        return isinstance(weight, Tensor) and is_dense(weight) and not is_wrapped(weight)

    def dequantize(self, module: nn.Module, name: str) -> Tensor:
        return local(getattr(module, name)).detach()

    def tensors(self, module: nn.Module, name: str) -> list[Tensor]:
        return [local(getattr(module, name))]

    def store(self, module: nn.Module, name: str, weight: Tensor) -> None:
        local(getattr(module, name)).data.copy_(weight)


#: Formats whose tensors do not hold W's numbers, even if they are floating-point.
LIBRARIES: tuple[Format, ...] = (
    Bitsandbytes4(),
    Bitsandbytes8(),
    Bitsandbytes4Parameter(),
    WrapperSubclass(),
    FineGrained8(),
    QuantLinear(),
)
#: The first that holds a weight is its format.
FORMATS: tuple[Format, ...] = (*LIBRARIES, QuantMethod(), Plain())


def in_library_format(module: nn.Module, name: str) -> bool:
    return any(item.holds(module, name) for item in LIBRARIES)


def is_dense(weight: Tensor) -> bool:
    """Whether the tensor holds plain numbers: strided, floating, of 16 bits or more."""
    return (
        weight.layout is torch.strided
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize >= 2
    )


def is_wrapped(weight: Any) -> bool:
    """Whether a tensor is a subclass that stores its numbers in others, by a format of its own."""
    wraps = isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight)
    return wraps and (not is_placed(weight) or is_wrapped(local(weight)))


def format_of(module: nn.Module, name: str) -> Format | None:
    """The format of the weight `name`; None if it is unknown."""
    return next((item for item in FORMATS if item.holds(module, name)), None)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """All tensors that a module without children may store its weight in."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a wrapper consists of; any other tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from plain_tensors(part)


def _write(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy in place. Raises CannotStore if a tensor would have to change its size or dtype."""
    for target, value in zip(targets, values, strict=True):
        if target.shape != value.shape or target.dtype != value.dtype:
            raise CannotStore(
                f"it is quantised to {tuple(value.shape)} {value.dtype}, but stored as "
                f"{tuple(target.shape)} {target.dtype}"
            )
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

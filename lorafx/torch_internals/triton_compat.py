"""Triton's interpreter on a CPU, and differences between the versions of Triton.

The interpreter is used whether or not TRITON_INTERPRET is set, so that a process can compile
kernels ahead of time and also run them. Its errors (triton 3.6 to 3.9) are corrected only while a
kernel runs. Arithmetic on bfloat16 other than casts and `tl.dot` stays wrong, so generated kernels
have none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch.library import triton_op

from lorafx.errors import LoweringError
from lorafx.torch_internals.versions import private_names, unsupported

with private_names():
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._library import triton as triton_library
    from torch._library.triton import is_wrap_triton_enabled
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor

# The interpreter patches triton.language and keeps the current program in a global.
_LOCK = threading.RLock()

#: numpy's dtypes by the names of triton's scalar types.
_DTYPES: dict[str, np.dtype[Any]] = {}


def _is_bf16(value: Any) -> bool:
    return value.dtype.scalar == tl.bfloat16


def _floats_of_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits_of_floats(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


# The interpreter stores bfloat16 as bits in uint16; its casts truncate, and it multiplies the bits.


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if _is_bf16(src) and target == tl.float32:
            return interpreter.TensorHandle(_floats_of_bits(src.data), target)
        if src.dtype.scalar == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_bits_of_floats(src.data), target)
        return original(src, dst_type)

    return cast


def _dot(a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left = _floats_of_bits(a.data) if _is_bf16(a) else a.data.astype(np.float32)
    right = _floats_of_bits(b.data) if _is_bf16(b) else b.data.astype(np.float32)
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _with_bool_mask(original: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A masked access whose mask, the argument number `place`, is converted to bools."""

    def access(*arguments: Any, **kwargs: Any) -> Any:
        values = list(arguments)
        if isinstance(values[place], interpreter.TensorHandle):  # a descriptor's mask is an array
            values[place] = interpreter.TensorHandle(values[place].data.astype(bool), tl.int1)
        return original(*values, **kwargs)

    return access


def _reduction(combine: Any) -> Callable[..., Any]:
    def reduce(input: Any, axis: int) -> Any:
        return tl.reduce(input, axis, combine)  # which the interpreter has replaced

    return reduce


def _cached_dtype(original: Callable[[Any], np.dtype[Any]]) -> Callable[[Any], np.dtype[Any]]:
    def look(dtype: Any) -> np.dtype[Any]:
        name = dtype.scalar.name
        numpy_dtype = _DTYPES.get(name)
        if numpy_dtype is None:
            numpy_dtype = _DTYPES[name] = original(dtype)
        return numpy_dtype

    return look


def _scalars_as_indices(original: Callable[..., None]) -> Callable[..., None]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)  # whose scope also undoes what follows
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patch


@contextlib.contextmanager
def _interpreter_corrected() -> Iterator[None]:
    builder, standard = interpreter.interpreter_builder, tl.standard

    def running_sum(input: Any, axis: int = 0) -> Any:
        return tl.associative_scan(input, axis, standard._sum_combine)

    changes: list[tuple[Any, str, Any]] = [
        # These are compiled functions unless TRITON_INTERPRET was set before triton was imported;
        # calling those leaves triton.language patched.
        (tl, "sum", _reduction(standard._sum_combine)),
        (tl, "min", _reduction(standard._elementwise_min)),
        (tl, "max", _reduction(standard._elementwise_max)),
        (tl, "cumsum", running_sum),
        # Inline assembly of generated kernels orders launches and returns its argument.
        (tl, "inline_asm_elementwise", lambda asm, constraints, args, **_: args[0]),
        # Two changes that save a third of the time: a table is made for each lookup of a dtype, and
        # overflows are checked by operators whose result is not used.
        (interpreter, "_get_np_dtype", _cached_dtype(interpreter._get_np_dtype)),
        (builder, "options", replace(builder.options, sanitize_overflow=builder.options.debug)),
        (interpreter, "_patch_lang_tensor", _scalars_as_indices(interpreter._patch_lang_tensor)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    builder.cast_impl, builder.create_dot = _cast(builder.cast_impl), _dot
    builder.create_masked_load = _with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = _with_bool_mask(builder.create_masked_store, 2)
    for change in changes:
        setattr(*change)
    try:
        yield
    finally:
        for change in before:
            setattr(*change)
        # Deleting the attributes restores the methods of the class.
        del builder.cast_impl, builder.create_dot
        del builder.create_masked_load, builder.create_masked_store


class _Executor(GridExecutor):
    """Does not copy whole storages, such as banks, to the host and back at each launch."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        return args_dev, kwargs

    def _restore_args_dev(self, *arguments: Any) -> None:
        pass


def _rewritten(kernel: Any) -> Callable[..., None]:
    if not isinstance(kernel, interpreter.InterpretedFunction):  # no TRITON_INTERPRET
        kernel = interpreter.InterpretedFunction(kernel.fn)
    return kernel.rewrite()


def interpret(kernel: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    """Run `kernel` over `grid` on CPU tensors, in Triton's interpreter. Raises LoweringError if the
    kernel fails, UnsupportedVersionError if this module fails because of another Triton."""
    function = kernel.fn  # the function that @triton.jit decorates
    with _LOCK, _interpreter_corrected(), np.errstate(all="ignore"):  # x may hold NaN
        try:
            _Executor(_rewritten(kernel), kernel.arg_names, tuple(grid))(*arguments)
        except interpreter.InterpreterError as error:
            failure = unsupported(error.__cause__ or error)
            if failure is not None:
                raise failure from error
            raise LoweringError(
                f"{function.__name__} of {function.__code__.co_filename} failed in Triton's"
                f" interpreter: {error}"
            ) from error


def version() -> str:
    return triton.__version__


def generated_triton_op(
    name: str, *, mutates_args: Sequence[str]
) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` without its search for kernels in sources, which takes 0.8 s."""

    def registered(function: Callable[..., Any]) -> Any:
        library: Any = triton_library
        with _LOCK:
            search = library.get_inner_triton_kernels
            library.get_inner_triton_kernels = lambda function: []
            try:
                return triton_op(name, mutates_args=mutates_args)(function)
            finally:
                library.get_inner_triton_kernels = search

    return registered


def launches_directly() -> bool:
    """Whether `wrap_triton` returns the kernel itself, since nothing is being traced."""
    return not is_wrap_triton_enabled()

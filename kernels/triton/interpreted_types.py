"""Types and shapes of values in Triton's interpreter, made once.

    with_known_shapes()     changes to `triton.language` while kernels run in the interpreter
    rewritten(kernel)       the function that the interpreter runs for a @triton.jit kernel

Triton makes a type for each value that a kernel computes, as a compiler does, and each type lists
its sizes, prints itself and checks that they are powers of two. A kernel has few shapes, but the
interpreter computes each value anew in every step of a loop of every program: that was a third of
its time. Sizes that have been seen are looked up here; those that have not go through Triton's own
code, which refuses what it refuses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import get_jit_fn_file_line

AttributePatch = tuple[Any, str, Any]


@dataclass(frozen=True, eq=False)
class _Shape:
    """What Triton makes of some sizes, shared by all types and values that have them."""

    sizes: Any  # a triton.language.tuple of int
    constants: Any  # the same as constexpr
    numel: int
    count: Any  # `numel` as constexpr
    text: str


#: By sizes.
_SHAPES: dict[tuple[int, ...], _Shape] = {}
#: Names of what is built in, by the module or class that has them.
_BUILTINS: dict[Any, list[str]] = {}


def _sizes(shape: Any) -> tuple[int, ...]:
    values = shape.values if isinstance(shape, tl.core.tuple) else shape
    return tuple([size.value if isinstance(size, tl.constexpr) else size for size in values])


def _block_type(original: Callable[..., None]) -> Callable[..., None]:
    def make(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = _sizes(shape)
        known = _SHAPES.get(sizes) if sizes else None  # Triton refuses a block without sizes
        if known is None:
            original(self, element_ty, shape)
            constants = tl.core.tuple([tl.constexpr(size) for size in sizes])
            numel = tl.constexpr(self.numel)
            _SHAPES[sizes] = _Shape(self.shape, constants, self.numel, numel, str(self.shape))
            return
        self.element_ty, self.shape, self.numel = element_ty, known.sizes, known.numel
        self.name = f"<{known.text}, {element_ty}>"

    return make


def _tensor(original: Callable[..., None]) -> Callable[..., None]:
    def make(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        known = _SHAPES.get(sizes)
        if known is None:
            original(self, handle, type)
            if not sizes:  # a scalar, whose type has no shape
                none = tl.core.tuple([])
                _SHAPES[()] = _Shape(none, self.shape, 1, self.numel, str(none))
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known.constants, known.count

    return make


def _broadcast(semantic: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`TritonSemantic.broadcast_impl_value`; two shapes that are no pair for it go there."""
    original, builder = semantic.broadcast_impl_value, semantic.builder

    def stretched(value: Any, sizes: list[int]) -> Any:
        if value.type.shape.values == sizes:
            return value
        found = tl.block_type(value.type.scalar, sizes)
        return semantic.tensor(builder.create_broadcast(value.handle, sizes), found)

    def spread(value: Any, like: Any) -> Any:
        found = like.with_element_ty(value.type.scalar)
        return semantic.tensor(builder.create_splat(found, value.handle), found)

    def broadcast(left: Any, right: Any) -> tuple[Any, Any]:
        blocks = left.type.is_block(), right.type.is_block()
        if blocks == (False, False):
            return left, right
        if blocks == (True, False):
            return left, spread(right, left.type)
        if blocks == (False, True):
            return spread(left, right.type), right
        of_left, of_right = left.type.shape.values, right.type.shape.values
        if of_left == of_right:
            return left, right
        pairs = list(zip(of_left, of_right, strict=False))
        if len(of_left) != len(of_right) or any(a != b and 1 not in (a, b) for a, b in pairs):
            return original(left, right)
        sizes = [b if a == 1 else a for a, b in pairs]
        return stretched(left, sizes), stretched(right, sizes)

    return broadcast


def _builtins(pkg: Any, builder: Any, scope: Any) -> None:
    """`interpreter._patch_builtin`, which looks through all members of `pkg` at every launch."""
    names = _BUILTINS.get(pkg)
    if names is None:
        members = inspect.getmembers(pkg)
        names = _BUILTINS[pkg] = [name for name, found in members if tl.core.is_builtin(found)]
    for name in names:
        member = getattr(pkg, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(pkg, name, member, builder, scope)


def with_known_shapes() -> Sequence[AttributePatch]:
    """Owner, attribute and value of each change, for as long as a kernel runs."""
    semantic = interpreter.interpreter_semantic
    return (
        (tl.block_type, "__init__", _block_type(tl.block_type.__init__)),
        (tl.tensor, "__init__", _tensor(tl.tensor.__init__)),
        (semantic, "broadcast_impl_value", _broadcast(semantic)),
        (interpreter, "_patch_builtin", _builtins),
    )


class _Rewriter(interpreter.FunctionRewriter):
    """Takes the text that @triton.jit has read, in the place of reading it twice more."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel.fn)
        self.kernel = kernel

    def rewrite_ast(self) -> Callable[..., None]:
        self.filename, self.def_file_lineno = get_jit_fn_file_line(self.kernel)
        return self._compile_and_exec(self._transform_ast(self.kernel.src))


def rewritten(kernel: Any) -> Callable[..., None]:
    """The function of `kernel` as the interpreter runs it, made once for each."""
    if isinstance(kernel, interpreter.InterpretedFunction):  # of a process with TRITON_INTERPRET
        return kernel.rewrite()
    made: dict[Any, Callable[..., None]] = interpreter.InterpretedFunction.rewritten_fn
    if kernel.fn not in made:
        made[kernel.fn] = _Rewriter(kernel).rewrite_ast()
    return made[kernel.fn]

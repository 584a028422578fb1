"""A captured graph as a function of slots and arguments, for torch.export.

What each of its inputs is, and what becomes of its results, is found by the identity of the call's
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorafx.capture.compiler_failures import explained, failing_in
from lorafx.errors import (
    CaptureError,
    ConfigError,
    LorafxError,
)
from lorafx.package.aten import InAten, checked
from lorafx.package.stand_in import FORMAT, constants_of
from lorafx.program.frame import Frame, fake_value
from lorafx.program.inputs import FrameInput
from lorafx.program.program import Program
from lorafx.torch_internals.frames import largest_size

#: Plain values among the arguments and the outputs, which are constants of the package.
PLAIN = (bool, int, float, str, type(None))

#: Kinds of the graph's inputs that belong to the model.
_OF_MODEL = ("weight", "state", "bank", "packed")


@contextmanager
def failing_compiler(part: str, error: type[LorafxError], model: str) -> Iterator[None]:
    """Failures of a compiler in the block become an `error`."""
    try:
        with failing_in(part, error, "leave what cannot be exported out of the model's forward"):
            yield
    except Exception as raised:
        failure = None if isinstance(raised, LorafxError) else explained(raised, model)
        if failure is None:
            raise
        raise failure from raised


class ExportedGraph:
    """A captured graph as a function of the slots and the arguments.

    Attributes:
        model: the name of the model's class.
        inputs: the slots and the arguments that the graph takes, by name.
        shapes: the sizes of each input: numbers, or names of dynamic ones.
        limits: the largest values of dynamic sizes that have one.
        constants: weights, buffers and banks by name.
        places: of each input of the graph: ("constant", name), ("input", number), ("size", number,
            dimension) or ("value", value).
        returned: the numbers of the graph's results that are outputs.
        form: the model's output, with {"tensor": number} in the place of each of them.
    """

    def __init__(self, program: Program, gm: fx.GraphModule) -> None:
        self.model = type(program.model).__name__
        self.slot_count = program.config.max_adapters
        self.run = InAten(gm).run
        self.nodes = gm.graph.find_nodes(op="placeholder")
        self.inputs: dict[str, Tensor] = {"slots": program.runtime.slots}
        self.shapes: list[list[int | str]] = [["batch"]]
        self.limits: dict[str, int] = {}
        self.constants: dict[str, Tensor] = {}
        self.places: list[tuple[Any, ...]] = []
        self.returned: list[int] = []
        self.form: Any = None
        tensors: dict[str, Tensor] = {}
        tensors |= program.model.named_parameters(remove_duplicate=False)
        tensors |= program.model.named_buffers(remove_duplicate=False)
        tensors |= constants_of(program.groups)
        self._names = {id(value): name for name, value in reversed(tensors.items())}

    def exported(self) -> torch.export.ExportedProgram:
        names = dict.fromkeys(size for sizes in self.shapes for size in sizes)
        dims = {
            name: torch.export.Dim(name, max=self.limits.get(name))
            for name in names
            if isinstance(name, str)
        }
        slots, *others = (
            {dim: dims[size] for dim, size in enumerate(sizes) if isinstance(size, str)}
            for sizes in self.shapes
        )
        inputs, shapes = tuple(self.inputs.values()), (slots, tuple(others))
        with failing_compiler("torch.export", CaptureError, self.model), torch.no_grad():
            return torch.export.export(
                _Function(self),
                inputs,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # torch 2.11 cannot prove some
            )

    def description(self) -> dict[str, Any]:
        inputs = zip(self.inputs.items(), self.shapes, strict=True)
        return {
            "format": FORMAT,
            "model": self.model,
            "inputs": [
                {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": sizes}
                for (name, value), sizes in inputs
            ],
            "limits": self.limits,
            "output": self.form,
        }

    def take_inputs(
        self, frame: Frame, values: Sequence[Any], arguments: Mapping[str, Tensor]
    ) -> None:
        """Find what the `values` are that the graph was called with."""
        node_of = {id(value): node for node, value in zip(self.nodes, values, strict=True)}
        numbers: dict[int, int] = {}
        symbols: dict[str, tuple[int, int]] = {}
        names: dict[str, str] = {}
        for name, value in {**self.inputs, **arguments}.items():
            node = node_of.get(id(value))
            if node is None:
                continue  # the graph does not use it
            if name != "slots":
                self.inputs[name] = value
                self.shapes.append(self._sizes(name, node, frame.by_node[node], names))
            number = numbers[id(value)] = len(self.shapes) - 1
            for dim, size in enumerate(fake_value(node).shape):
                symbols.setdefault(str(size), (number, dim))
        if not any("batch" in sizes for sizes in self.shapes[1:]):
            raise ConfigError(
                f"the example of {', '.join(arguments)} has one request, and a size of one is a "
                "constant of the graph; give an example of at least two requests"
            )
        for node, value in zip(self.nodes, values, strict=True):
            if not isinstance(value, Tensor):
                place = symbols.get(str(fake_value(node)))
                self.places.append(("value", value) if place is None else ("size", *place))
            elif id(value) in numbers:
                self.places.append(("input", numbers[id(value)]))
            else:
                self.places.append(("constant", self._constant(frame.by_node.get(node), value)))

    def _sizes(
        self, name: str, node: fx.Node, item: FrameInput, names: dict[str, str]
    ) -> list[int | str]:
        """The sizes of an input; `names` has those of dynamic ones by symbol."""
        sizes: list[int | str] = []
        for dim, size in enumerate(fake_value(node).shape):
            if not isinstance(size, torch.SymInt):
                sizes.append(size)
                continue
            requests = dim == item.requests_dim
            text = "batch" if requests else names.setdefault(str(size), f"{name}_{dim}")
            if (limit := largest_size(size)) is not None:
                self.limits[text] = limit
            sizes.append(text)
        return sizes

    def _constant(self, item: FrameInput | None, value: Tensor) -> str:
        """The name of a constant, which is kept."""
        if item is None or item.kind not in _OF_MODEL:
            raise CaptureError(
                f"the graph takes {'a tensor' if item is None else item.label} from outside of the "
                "model and the call; make it a buffer of the model or an argument"
            )
        name = self._names.get(id(value), f"lorafx.constant_{len(self.places)}")
        self.constants[name] = value.detach()
        return name

    def take_output(self, output: Any, results: Sequence[Any], where: str = "the output") -> Any:
        """The form of the model's output, whose tensors are `results` of the graph."""
        if isinstance(output, Tensor):
            number = next((n for n, item in enumerate(results) if item is output), None)
            if number is None:
                raise CaptureError(f"{where} is made outside of the graph, or is an argument")
            self.returned.append(number)
            return {"tensor": len(self.returned) - 1}
        if isinstance(output, Mapping):
            named = output.items()
            return {"items": {k: self.take_output(v, results, f"{where} {k!r}") for k, v in named}}
        if isinstance(output, (list, tuple)):
            parts = enumerate(output)
            return {"list": [self.take_output(v, results, f"{where} [{n}]") for n, v in parts]}
        if isinstance(output, PLAIN):
            return {"value": output}
        raise ConfigError(
            f"{where} is a {type(output).__name__}; a package returns tensors in mappings and "
            "lists, and no caches: give the example use_cache=False"
        )


class _Function(nn.Module):
    """A graph with its constants as buffers, under their names."""

    def __init__(self, graph: ExportedGraph) -> None:
        super().__init__()
        self._graph = graph
        for name, value in graph.constants.items():
            *parents, last = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.register_buffer(last, value)

    def forward(self, slots: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        graph, highest = self._graph, self._graph.slot_count - 1
        accepted = (slots >= -1) & (slots <= highest)
        slots = checked(slots, accepted, f"a slot is outside of -1 to {highest}")
        inputs = slots, *arguments
        results = graph.run(*(self._value(place, inputs) for place in graph.places))
        return tuple(results[number] for number in graph.returned)

    def _value(self, place: tuple[Any, ...], inputs: Sequence[Tensor]) -> Any:
        match place:
            case "constant", name:
                return self.get_buffer(name)
            case "input", number:
                return inputs[number]
            case "size", number, dim:
                return inputs[number].shape[dim]
        return place[1]

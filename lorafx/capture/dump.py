"""Graph dumps: every pass's graph as a readable program, and what the pass changed as a diff.

A legend on top of each graph says how its names are made, what its sizes are, and what lorafx's own
operators in it compute.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from lorafx.capture.graph_text import text_lines
from lorafx.capture.node_names import NodeNames, Renamer
from lorafx.capture.stage_views import KeptStage, StageViews
from lorafx.config import Options
from lorafx.errors import LorafxWarning
from lorafx.pass_order import CAPTURED
from lorafx.program.frame import Frame
from lorafx.program.program import Program
from lorafx.torch_internals.dynamo import trace_structured
from lorafx.viewer.page import folder_of
from lorafx.viewer.stages import StageView

_OP = re.compile(r"torch\.ops\.lorafx\.(\w+)")

NAMES = (
    "Nodes are named by the site or module that they belong to and by what they do, inputs by",
    "what they hold. (In the graph itself and in torch's own logs they have other names.) The",
    "comments are the module's path and the line of your own code. This is text; it does not run.",
)

#: Operators of namespace `lorafx`, without what tells a variant apart.
OPS: Mapping[str, str] = {
    "site": "y + the LoRA delta of one module: the mark that the hook on it leaves",
    "embedding_site": "y + the LoRA delta of an embedding: the mark that the hook on it leaves",
    "conv_site": "y + the LoRA delta of a convolution",
    "grouped_site": "y + the LoRA delta of a product with blocks of a weight",
    "expert_site": "y + the LoRA delta of a product with the weights of routed experts",
    "expert_mark": "says which experts the rows belong to, until `match` has found their product",
    "rows_of": "y, whose row m was computed from row m of x",
    "own_mask": "asks whether each request takes only its own elements",
    "own_linear": "y with the outputs that adapters have weights of their own for",
    "own_embedding": "y with the rows that adapters have of their own in an embedding",
    "fused_linear": "x Wᵀ + b and the deltas of one site, or of a pack of siblings",
    "fused_experts": "a product with the weights of routed experts and its deltas",
    "grouped_mm": "product of sorted rows with the weights of routed experts, by generated C++",
    "dense_mm": "x Wᵀ, of few rows by generated C++",
    "dense_addmm": "x Wᵀ + b, of few rows by generated C++",
    "dense_mm_delta": "x Wᵀ and the deltas, of few rows by generated C++ as one",
    "dense_addmm_delta": "x Wᵀ + b and the deltas, of few rows by generated C++ as one",
    "add_delta": "adds the delta into y in place, in plain aten",
    "add_embedding_delta": "adds the delta of an embedding into y in place, in plain aten",
    "run_delta": "adds the delta into y in place, by generated C++ (kernel-*.cpp)",
    "run_embedding_delta": "adds the delta of an embedding into y in place, by generated C++",
    "run_expert_delta": "adds the delta of routed rows into y in place, by generated C++",
    "expert_slots": "the bank's row of each routed row: its slot and its expert",
    "triton_linear": "x Wᵀ + b and the deltas in one Triton kernel (kernel-*.py)",
    "triton_delta": "adds the delta into y in place, by Triton (kernel-*.py)",
    "triton_embedding_delta": "adds the delta of an embedding into y in place, by Triton",
    "triton_experts": "products with routed experts and their deltas, by Triton",
    "triton_shrink": "v = x Aᵀ, what a delta needs that is added later",
    "triton_activate": "the activation h, and v = h Aᵀ of the linear behind it",
    "triton_expand": "y += v B in place",
    "triton_expanded": "v B + b, into which the vendor's product is added",
    "triton_concat": "v behind the columns of x, and B behind those of W, for one product",
    "add_product": "y += x Wᵀ in place, the vendor's product",
    "paged_cache": "writes keys and values of new tokens into a paged cache, and reads it",
    "paged_attention": "the same, and the attention to it, request by request",
    "stamp": "stands for a layer that is traced once",
    "overwrite": "writes what a stamp gives into the cache of its layer",
    "checked_index": "an index as it is; one that is outside of its table raises",
}

#: Their arguments that shapes alone do not explain.
ARGUMENTS = (
    "slots: of each request the adapter's index in the banks, -1 for the base",
    "rows: how many rows of x each request has; 0 where that is not proved",
    "bank_A (slots, rank, in), bank_B (slots, rank, out): the factors of all adapters that are",
    "loaded; bank_ranks, bank_scales: their real ranks and scales, for each sibling",
)


def legend(
    lines: Iterable[str], symbols: Mapping[str, str], outlined: Sequence[object]
) -> list[str]:
    """The legend of one stage, as comments, from its lines and what the graph's symbols are."""
    text = "\n".join(lines)
    ops = dict.fromkeys(plain_name(name) for name in _OP.findall(text))
    found = [*NAMES]
    found += [f"{name}: {words}" for name, words in symbols.items() if _in_shapes(name, text)]
    found += ARGUMENTS if ops else ()
    found += [f"lorafx.{name}: {OPS[name]}" for name in ops if name in OPS]
    found += [f"one body for layers that are alike: {item}" for item in outlined]
    return ["#", *(f"# {line}" for line in found), "#"]


def plain_name(op: str) -> str:
    """An operator's name without what says that it writes in place, or is run by the interpreter of
    Triton."""
    return op.strip("_").replace("interpreted_", "triton_")


def _in_shapes(symbol: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(symbol)}\b", text) is not None


def dump_folder(options: Options) -> Path | None:
    """Where dumps go: `Options.dump`, else LORAFX_DUMP, else nowhere. The one place that asks."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None


#: Folders -> the program that dumps into each.
_HELD: weakref.WeakValueDictionary[Path, Program] = weakref.WeakValueDictionary()


def own_folder(program: Program) -> Path | None:
    """Where the graphs of one program go: into `dump_folder`, or, while another model in service
    dumps there, into a folder inside that is called as its class: LlamaForCausalLM-2."""
    folder = found = dump_folder(program.options)
    number = 1
    while folder is not None and found is not None:
        holder = _HELD.get(found.absolute())
        if holder is None or holder is program or holder.runtime.session is None:
            _HELD[found.absolute()] = program
            break
        number += 1
        found = folder / f"{type(program.model).__name__}-{number}"
    return found


@contextmanager
def beside_compiling(folder: Path) -> Iterator[None]:
    """Around what is written while graphs are compiled: a folder that cannot be written to costs
    the dump, not the graph."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"there is no whole dump in {folder}, and models run without one: {error}. Change "
            "Options(dump=...) or the variable LORAFX_DUMP",
            LorafxWarning,
            stacklevel=2,
        )


def traced(name: str, text: Callable[[], str]) -> None:
    """Put a text into torch's structured trace, where tlparse shows it as `lorafx_<name>` beside
    Dynamo's and Inductor's. It is made only if somebody keeps the trace."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"lorafx_{name}", "encoding": "string"},
        payload_fn=text,
    )


@dataclass
class GraphDump:
    """The graphs of one capture, kept as text and written as they come when a folder is given.

    Printed nodes are kept, which the stages have in common. Lines are put together where they are
    read; names of nodes and generated sources are made there too.
    """

    title: str
    folder: Path | None
    names: NodeNames = field(default_factory=NodeNames)
    #: Of repeated layers, what one body computes.
    outlined: Sequence[object] = ()
    _stages: list[KeptStage] = field(default_factory=list)
    _sources: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    _renamed: list[list[str]] = field(default_factory=list)
    _renamer: Renamer | None = None

    @property
    def stages(self) -> list[tuple[str, str, str]]:
        """Of each stage the pass, a heading and the graph, its nodes by their readable names."""
        found = zip(self._stages, self._readable(), strict=True)
        return [(kept.name, self._heading(kept), "\n".join(lines)) for kept, lines in found]

    @property
    def sources(self) -> dict[str, str]:
        """Texts that belong to the graph, generated kernels above all, by file name."""
        return {
            name: text if isinstance(text, str) else text() for name, text in self._sources.items()
        }

    @property
    def named_views(self) -> list[StageView]:
        """The stages for the viewer, their nodes by their readable names."""
        self._readable()
        assert self._renamer is not None
        named, views = self._renamer.named, [kept.view for kept in self._stages]
        found = {node: node for stage in views for _, nodes in stage.graphs for node in nodes}
        for node in found:
            inputs = tuple(map(named, node.inputs))
            found[node] = replace(node, name=named(node.name), line=named(node.line), inputs=inputs)
        return [stage.exchanged(found) for stage in views]

    def add(self, stage: KeptStage) -> None:
        """Record the graph after a pass, which `StageViews` has kept with `names`."""
        self._stages.append(stage)
        index = len(self._stages) - 1
        traced(f"{self._file_title}_{index:02d}_{stage.name}", lambda: self._text(index))
        if self.folder is not None:
            with beside_compiling(self.folder):
                self._write(index, self.folder)

    def add_base(self, gm: fx.GraphModule, frame: Frame) -> None:
        """Record a graph that no pass sees."""
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), frame.inputs, strict=True))
        self.names.note_inputs(frame, inputs)
        self.add(StageViews(self.names, inputs).stage(gm, CAPTURED))
        self.names.forget_nodes()

    def source(self, name: str, text: str | Callable[[], str]) -> None:
        """Record a text that belongs to the graph, or what makes it where it is read."""
        if name not in self._sources:
            self._sources[name] = text
            traced(f"{self._file_title}_{name}", text if callable(text) else lambda: text)
            if self.folder is not None:
                with beside_compiling(self.folder):
                    self._write_source(name, self.folder)

    def code(self, text: str) -> None:
        """Record what Inductor made of the graph, or of one of several that it consists of."""
        number = sum(name.startswith("inductor") for name in self._sources)
        self.source(f"inductor{f'-{number}' if number else ''}.py", text)

    def write(self, folder: Path) -> None:
        """Write all stages and sources into `folder`, as LORAFX_DUMP would have."""
        for index in range(len(self._stages)):
            self._write(index, folder)
        for name in self._sources:
            self._write_source(name, folder)

    def _readable(self) -> list[list[str]]:
        """The lines of all stages with names in them. They are made once: a stage that is written
        while others are to come has the names that it has afterwards."""
        if self._renamer is None:
            self._renamer = Renamer(self.names.facts)
        for stage in self._stages[len(self._renamed) :]:
            self._renamed.append(self._renamer.stage(text_lines(stage.printed)))
        return self._renamed

    def _heading(self, stage: KeptStage) -> str:
        heading = f"# {self.title}, after {stage.name}"
        if stage.edits is None:
            return heading
        nodes = len(stage.printed[0][1])
        return f"{heading}: {stage.edits} edits, {nodes} nodes, {stage.seconds * 1e3:.1f} ms"

    @property
    def _file_title(self) -> str:
        return self.title.replace(" ", "_")

    def _target(self, folder: Path) -> Path:
        target = folder_of(folder, self.title)
        target.mkdir(parents=True, exist_ok=True)
        return target

    def _write_source(self, name: str, folder: Path) -> None:
        text = self._sources[name]
        text = text if isinstance(text, str) else text()
        (self._target(folder) / name).write_text(text, encoding="utf-8")

    def _text(self, index: int) -> str:
        """A stage with its heading and its legend."""
        lines = self._readable()[index]
        words = {symbol: size.words for symbol, size in self.names.symbols.items()}
        top = [self._heading(self._stages[index]), *legend(lines, words, self.outlined)]
        return "\n".join([*top, *lines, ""])

    def _write(self, index: int, folder: Path) -> None:
        target = self._target(folder)
        name = self._stages[index].name
        (target / f"{index:02d}-{name}.py").write_text(self._text(index), encoding="utf-8")
        if index:
            before = self._stages[index - 1].name
            old, new = self._readable()[index - 1 : index + 1]
            changes = difflib.unified_diff(old, new, before, name, lineterm="", n=2)
            text = "\n".join([self._heading(self._stages[index]), *changes, ""])
            (target / f"{index:02d}-{name}.diff").write_text(text, encoding="utf-8")

"""Saved graphs of an entry, which are tried before Dynamo traces.

    Dynamo converts a frame → a saved graph's guards hold: its bytecode, guards and graph are used
                            → none fits: Dynamo traces, and the result is saved

Only a graph that serves a whole call is saved: one frame without a graph break. An error in this
module never fails a call.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from torch import fx

from lorafx.capture.backend import Backend
from lorafx.capture.compilation import Compilation, Observer
from lorafx.capture.compile_log import tell
from lorafx.capture.executable import Lowered
from lorafx.capture.missed import Missed
from lorafx.capture.record import GraphRecord
from lorafx.capture.saved_graphs import folder as folders
from lorafx.capture.saved_graphs.fingerprints import Fingerprints, Undescribed
from lorafx.capture.saved_graphs.guards import SavedGuards
from lorafx.capture.saved_graphs.key import (
    SavedInputs,
    can_save,
    entry_key,
    hash_of_file,
    machine,
    own_sources,
    source_files,
)
from lorafx.capture.saved_graphs.lowered_graph import (
    BUILTINS,
    GRAPH,
    SLOTS,
    PortableNames,
    SavedLowered,
    dump,
    load,
)
from lorafx.capture.saved_graphs.pieces import Pieces, Wrappers, foreign_operators
from lorafx.config import dump_folder
from lorafx.errors import ConfigError, LorafxWarning
from lorafx.kernels.cpu.delta_kernels import builds_noted
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.program.context import Context
from lorafx.program.program import PassReport, Program
from lorafx.progress import LOG
from lorafx.torch_internals.compat import traced_anew
from lorafx.torch_internals.dynamo import ConvertFrameReturn, disable, input_codes
from lorafx.torch_internals.saved_graphs import (
    CleanupHook,
    CleanupManager,
    GuardedCode,
    InstructionTranslator,
    SerializedCode,
    _debug_get_cache_entry_list,
    get_compile_id,
    inference_info_noted,
    orig_code_map,
    output_codes,
    unique_id,
    wrap_guarded_code,
)

_MODULE = "<module "
_MAX_FILES = 64  # of a key, the newest, that are tried
_MAX_PREPARED = 8  # of these, that are prepared before the first is tried
_PREPARED: set[Path] = set()


class SavedGraphs:
    """Loads and saves the graphs of an entry of the program.

    Args:
        option: `Options.cache`, or a folder of this process.
        instead: a folder of this process, for where that of "auto" cannot be used.
    """

    def __init__(
        self,
        backend: Backend,
        option: str | bool | os.PathLike[str],
        entry: Mapping[str, Any],
        instead: os.PathLike[str] | None = None,
    ) -> None:
        self._backend, self._option, self._entry = backend, option, entry
        self._auto, self._instead = option == folders.AUTO, instead
        #: The files of the graphs that Dynamo has now.
        self._loaded: set[Path] = set()
        #: The file of the graph of the last conversion, or why it has none.
        self.file: Path | None = None
        self.unsaved = ""

    def converted(
        self, convert: Callable[..., ConvertFrameReturn], frame: Any, *arguments: Any, **kwargs: Any
    ) -> ConvertFrameReturn:
        """Dynamo's conversion of the entry's frame, or a saved one. Dynamo's lock is held."""
        self.file, self.unsaved = None, ""
        place = self._folder_and_key(frame)
        if not isinstance(place, tuple):
            known = len(self._backend.records)
            result = convert(frame, *arguments, **kwargs)
            for record in self._backend.records[known:]:
                record.saved = place
            return result
        loaded = self._load(*place, frame, arguments)
        if loaded is not None:
            return loaded
        conversion = _Conversion(self._backend.program)
        with self._backend.observed_by(conversion):
            result = convert(frame, *arguments, **kwargs)
        if result.guarded_code is None:
            self.unsaved = "Dynamo made no graph of it"
        else:
            self._save(*place, result.guarded_code, conversion)
        return result

    def found(self, frame: Any, arguments: Sequence[Any]) -> ConvertFrameReturn | Missed:
        """A saved conversion of the entry's frame. None is loaded while `prepare` has not had the
        newest. Dynamo's lock is held."""
        self.file, self.unsaved = None, ""
        place = self._folder_and_key(frame)
        if not isinstance(place, tuple):
            return Missed()
        newest = folders.files(*place)[-_MAX_PREPARED:]
        if unprepared := [path for path in newest if path not in _PREPARED]:
            return Missed(unprepared=unprepared)
        return self._load(*place, frame, arguments) or Missed()

    def _folder_and_key(self, frame: Any) -> tuple[Path, str] | str:
        """Where graphs of this entry are now, or a sentence that says why they are not kept."""
        program = self._backend.program
        try:
            program.look_at_modules()
            if (
                program.site_watch.missing
                or (program.runtime.session is not None and program.runtime.session.neighbours)
                or dump_folder(program.options) is not None  # dumps need the passes
                or not can_save(program)
            ):
                self.unsaved = "graphs of this model or with these options cannot be saved"
                return ""
            return self._folder(), entry_key(program, {**self._entry, "code": frame.f_code})
        except Exception as error:  # from the model's attributes or the file system
            self._warn(f"graphs of {type(program.model).__name__} are not saved: {error}")
            self.unsaved = f"not saved: {error}"
            return self.unsaved

    def _folder(self) -> Path:
        """The folder. Raises ConfigError if it cannot be used."""
        try:
            return folders.folder_of(self._option)
        except ConfigError:
            if not self._auto or self._instead is None:
                raise
            return Path(self._instead)

    def _save(self, folder: Path, key: str, code: GuardedCode, conversion: _Conversion) -> None:
        try:
            body, record = conversion.body(code)
            self.file = folders.write(folder, key, body)
            record.saved = "saved for other processes"
            bounded = self._auto and folder == folders.default_folder()
            folders.trim(folder, folders.most_bytes() if bounded else sys.maxsize)
        except OSError as error:
            self.unsaved = f"not saved: {error}"
            self._warn(f"a graph could not be saved in {folder}: {error}")
            conversion.tell(self.unsaved)
        except Exception as error:  # Undescribed, or errors of pickling
            self.unsaved = f"not saved: {error}"
            conversion.tell(self.unsaved)

    def _load(
        self, folder: Path, key: str, frame: Any, arguments: Sequence[Any]
    ) -> ConvertFrameReturn | None:
        if not _debug_get_cache_entry_list(frame.f_code):
            self._loaded.clear()  # Dynamo was reset
        # Nothing changes meanwhile, and most of the time is the fingerprints'.
        prints = Fingerprints({self._backend.program.runtime._key: SLOTS})
        for path in folders.files(folder, key)[-_MAX_FILES:]:
            if path in self._loaded:
                continue
            start = time.perf_counter()
            try:
                code = _load_conversion(
                    self._backend, frame, arguments, folders.read(path, key), prints
                )
            except Exception as error:
                self._warn(f"{path} cannot be loaded, so its graph is compiled anew: {error!r}")
                with suppress(OSError):
                    path.unlink()
                continue
            if code is not None:
                self._loaded.add(path)
                self.file = path
                record = self._backend.records[-1]
                record.seconds["loading"] = time.perf_counter() - start
                record.reason = record.saved
                tell(record, type(self._backend.program.model).__name__)
                return code
        return None

    def _warn(self, text: str) -> None:
        """Warn, or log what concerns a folder that the user has not asked for."""
        if self._auto:
            LOG.info("%s", text)
        else:
            warnings.warn(text, LorafxWarning, stacklevel=2)


def prepare(program: Program, path: Path) -> None:
    """Load the parts of a saved graph that take long, which are then kept in memory: generated code
    and hashes of lorafx's files. No lock is held, and nothing of the program changes."""
    _PREPARED.add(path)  # a call that loads it raises what is raised here
    modules, _, second_half = pickle.loads(folders.read(path, path.parent.name))
    stand_ins = (SLOTS, BUILTINS, GRAPH, *json.loads(modules))
    load(second_half, program, {name: name for name in stand_ins})["lowered"].load()
    own_sources()
    machine()


class _Conversion(Observer):
    """What is noted of one conversion by Dynamo, to save its graph."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._graphs: list[Compilation] = []
        self._foreign: list[str] = []
        self._kernels: dict[DeltaSpec, int] = {}
        self._infos: list[tuple[Any, ...]] = []
        self._output: Any = None
        self._guards: SavedGuards | None = None
        self._why = "Dynamo made no graph of it"

    @contextmanager
    def compiling(self, record: GraphRecord) -> Iterator[None]:
        # Without traced_anew, torch's cache may return a function that has no visible parts.
        with builds_noted() as self._kernels, inference_info_noted() as self._infos, traced_anew():
            yield

    def after(self, gm: fx.GraphModule, ctx: Context, done: PassReport | str) -> None:
        if isinstance(done, str):
            self._foreign += foreign_operators(gm)

    def compiled(self, compilation: Compilation) -> None:
        self._graphs.append(compilation)
        self._output = InstructionTranslator.current_tx().output

    def guarded(self, guards: Sequence[Any], kept: Sequence[bool], watched: Sequence[Any]) -> None:
        if len(self._graphs) != 1:
            self._why = "the model breaks into several graphs"
            return
        try:
            prints = Fingerprints({self._program.runtime._key: SLOTS})
            plain = [guard.orig_guard for guard in guards]
            self._guards = SavedGuards.of(plain, kept, watched, self._output, prints)
        except Exception as error:
            self._why = str(error)

    def tell(self, text: str) -> None:
        for graph in self._graphs:
            graph.record.saved = text

    def body(self, guarded_code: GuardedCode) -> tuple[bytes, GraphRecord]:
        """A file's contents, and the graph's record. Raises Undescribed if it cannot be saved."""
        output, guards = self._output, self._guards
        if guards is None or len(self._graphs) != 1:
            raise Undescribed(self._why)
        (graph,) = self._graphs
        if not self._infos or not graph.whole:
            raise Undescribed("it cannot be rebuilt from its parts")
        if self._foreign:
            raise Undescribed(f"operators of other packages: {', '.join(self._foreign)}")
        if not graph.frame.begins_call or graph.frame.follows_another:
            raise Undescribed("it does not begin with the arguments of a call")
        config, metadata, subclasses, boxed, *_, wrappers = self._infos[-1]
        outer = Wrappers(metadata, wrappers, config.to_cacheable(), subclasses)
        lowered = graph.lowered or Lowered(boxed)
        names = self._portable_names(guarded_code.code)
        compared = {
            "guards": guards,
            "imports": dict(output.import_sources),
            "files": source_files(output.tracing_context.traced_code),
            "inputs": SavedInputs.of(graph, self._program),
        }
        loaded = {
            "code": SerializedCode.from_code_object(guarded_code.code),
            "lowered": SavedLowered.of(lowered.run, self._kernels),
            "pieces": Pieces(graph.record.checks, graph.base, outer, lowered.extra, lowered.banks),
            "record": graph.record.to_save(),
            "reached": (self._program.reached, self._program.replaced),
            "changed": self._program.changed_inputs,
        }
        modules = {name: name[len(_MODULE) : -1] for name in names if name.startswith(_MODULE)}
        halves = [dump(half, self._program, names) for half in (compared, loaded)]
        return pickle.dumps((json.dumps(modules), *halves)), graph.record

    def _portable_names(self, code: CodeType) -> PortableNames:
        assert self._guards is not None
        names = {SLOTS: self._program.runtime._key, BUILTINS: self._guards.builtins_name}
        for name in sorted(set(self._output.installed_globals) - set(names.values())):
            value = self._output.global_scope[name]
            if isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value:
                names[f"{_MODULE}{value.__name__}>"] = name
            elif name in code.co_names and GRAPH not in names and name.startswith("__compiled_fn"):
                names[GRAPH] = name
            else:
                raise Undescribed(f"Dynamo's code needs an object of this process: {name}")
        if GRAPH not in names:
            raise Undescribed("Dynamo's code calls no graph")
        return names


def _load_conversion(
    backend: Backend, frame: Any, arguments: Sequence[Any], body: bytes, prints: Fingerprints
) -> ConvertFrameReturn | None:
    """The result of a conversion from a file's contents; None if its graph is not for this call."""
    program = backend.program
    # In two halves, since most files are of other calls, as the first half shows.
    modules, first_half, second_half = pickle.loads(body)
    names = {SLOTS: program.runtime._key, BUILTINS: unique_id("__builtins_dict__")}
    added: dict[str, Any] = {}
    for stand_in, module in json.loads(modules).items():
        names[stand_in] = unique_id("__module")
        added[names[stand_in]] = importlib.import_module(module)
    compared = load(first_half, program, names)
    if any(hash_of_file(name) != saved_hash for name, saved_hash in compared["files"].items()):
        return None
    f_globals, f_locals = frame.f_globals, frame.f_locals
    built_in = f_globals["__builtins__"]
    added[names[BUILTINS]] = built_in if isinstance(built_in, dict) else vars(built_in)
    for alias, module in compared["imports"].items():
        added[alias] = importlib.import_module(module)
    if any(f_globals.get(name, value) is not value for name, value in added.items()):
        return None
    f_globals.update(added)
    guards: SavedGuards = compared["guards"]
    same = guards.hold(f_locals, f_globals, prints)
    if not same or not compared["inputs"].hold(program, f_locals, f_globals):
        return None
    watched = guards.watched_places(f_locals, f_globals)
    manager = guards.manager(frame.f_code, f_locals, f_globals, watched)
    if len(watched.guards) < len(guards.watched) or not manager.check(f_locals):
        return None
    program.watched_places.append(watched)
    names[GRAPH] = unique_id("__compiled_fn", with_uuid=True)
    loaded = load(second_half, program, names)
    pieces: Pieces = loaded["pieces"]
    title = f"graph {len(backend.records)} {'base' if pieces.base else 'lora'}"
    record = GraphRecord(title, saved="loaded from the folder", **loaded["record"])
    run = pieces.executable(program, loaded["lowered"].load())
    code = SerializedCode.to_code_object(loaded["code"])
    hook = CleanupHook.create(f_globals, names[GRAPH], disable(run, reason="a compiled graph"))
    CleanupManager.instance[code] = [hook]
    input_codes.add(frame.f_code)
    output_codes.add(code)
    orig_code_map[code] = frame.f_code
    reached, replaced = loaded["reached"]
    program.reached.update(reached)
    program.replaced.update(replaced)
    for site in (site for site in program.sites if site.path in loaded["changed"]):
        program.note_changed_input(site)
    backend.records.append(record)
    compile_id = get_compile_id(arguments[2])
    guarded_code = GuardedCode(code, cast(Any, manager), compile_id, "a graph that lorafx loaded")
    return wrap_guarded_code(guarded_code)

"""Every error that lorafx raises on purpose, in one hierarchy.

`LorafxError` is the root. Errors about a value that the caller passed also derive from
`ValueError`, so that `except ValueError` keeps working for people who do not know lorafx.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Setting:
    """A field of LoraConfig or Options as a message names it; `str` gives these words.

    Attributes:
        value: one that would do, if the message says so.
        given: whether it would also do to give the adapter when compiling.
    """

    field: str
    words: str
    value: object = None
    given: bool = False

    def __str__(self) -> str:
        return self.words


def numbered(number: int, one: str, many: str = "") -> str:
    """Such as "1 entry" and "2 entries"; `many` is `one` with an s by default."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def way_out_by(field: str, value: object, *, given: bool = False) -> Setting:
    """A sentence fragment: LoraConfig needs this value; `given`: or the adapter when compiling."""
    words = f"compile with LoraConfig({field}={value!r})"
    return Setting(field, words + ", or give the adapter when compiling" * given, value, given)


class LorafxError(Exception):
    """Root of all errors raised by lorafx.

    Way out: `except lorafx.LorafxError` catches all of them, in calls and while compiling. The
    message of each names the thing and what to do.
    """

    #: Those that the message names, for programs with other words for them.
    settings: tuple[Setting, ...] = ()

    def naming(self, *settings: Setting) -> Self:
        """The same error, whose message has the words of these settings."""
        self.settings += settings
        return self


def respelled(error: LorafxError, spell: Callable[[Setting], str | None]) -> str:
    """The error's message with `spell(setting)` in the place of the words of each setting, for
    programs with other names for them; where it returns None, they stay."""
    message = str(error)
    for setting in error.settings:
        message = message.replace(setting.words, spell(setting) or setting.words)
    return message


class LorafxWarning(UserWarning):
    """Something may not be what the caller expects: a module left out, an assumption made.

    Way out: the message names the setting that confirms or changes it. Options(strict=True) makes
    adapters with missing or unused factors an error. `warnings.simplefilter("error",
    lorafx.LorafxWarning)` stops at each.
    """


class ConfigError(LorafxError, ValueError):
    """A `LoraConfig`, `Options` or call argument that cannot be honoured.

    Way out: the message names the field, what it may be, and the nearest known name where one is
    near.
    """


class TargetError(ConfigError):
    """`target_modules` names nothing, or names a module that cannot carry LoRA.

    Way out: choose names from those in the message, or from `print(lorafx.explain(model))`;
    "all-linear" takes what can carry LoRA; `lorafx.register` makes a class of your own one of them.
    """


class CheckpointError(LorafxError, ValueError):
    """An adapter checkpoint that is absent, truncated, misshapen or for another model.

    Way out: `lorafx inspect ADAPTER --model MODEL` shows what it holds and each problem. For
    modules that moved, AdapterSource(prefix=...) or key_mapping=; otherwise load it with the model
    that it was trained on, or save it again.
    """


class BaseWeightsError(CheckpointError):
    """Base weights that do not fit the model. `problems` lists everything that is wrong.

    Way out: the old weights stay in service. Give what `problems` says is missing, or
    strict=False; docs/base_weights.md has the names that are understood.
    """

    problems: tuple[str, ...] = ()


class UnsupportedAdapterError(CheckpointError):
    """An adapter whose configuration or keys ask for arithmetic that lorafx does not support.

    Way out: merge it into a copy of the base model with the library that trained it, and serve that
    copy; or train it as plain LoRA. docs/peft_features.md has what is supported.
    """


class UnsupportedVersionError(LorafxError):
    """A version of torch, triton, transformers or peft that lorafx does not run on, or a torch that
    lacks something that lorafx needs of it.

    Way out: install a version that the message names; `lorafx doctor` shows what is installed and
    what of it lorafx can use.
    """


class UnknownAdapterError(LorafxError, ValueError):
    """A request names an adapter that is not loaded.

    Way out: load it first with `load_adapter(source, name)`; `adapters` has the loaded names. None
    is the base model.
    """


class CapacityError(LorafxError, ValueError):
    """More distinct adapters, or a larger rank, than the banks were allocated for.

    Way out: compile with a larger LoraConfig(max_adapters=...) or LoraConfig(max_rank=...); unpin
    adapters; split the batch, or have Options(overflow="waves") do so.
    """


class BatchError(LorafxError, ValueError):
    """The rows of a batch and the adapters named for them do not fit together; an aLoRA adapter has
    no token ids in which its invocation tokens could be found; a method is called while a call is
    running, or the model itself on another thread than the running call; or a call is captured into
    a CUDA graph while its adapters are being copied into slots.

    Way out: one name, or None, per row. Where another dimension holds the requests,
    LoraConfig(row_dims={argument: dim}). For an aLoRA adapter `input_ids`, `generate`, or
    `adapter_slots=` of shape (B, T). Call the method when the running call has returned.
    Where several threads serve, call the compiled model; None in `adapter_names` is the base. Call
    the model once before a capture.
    """


class OutOfRangeError(BatchError, IndexError):
    """An index of a call is outside of the table that it points into: a token id without a row in
    the embedding, a position behind the last one, a label that is no class, a position behind the
    end of a static cache. The graph that would have read it has not run. Only a few indices that
    the model computes itself (relative positions, or under torch.vmap) are checked inside of the
    graph, when caches may have been written.

    Way out: the message names the argument, the position in it, the index and the size. Ids beyond
    the vocabulary come from another tokenizer, or from tokens that were added to it: resize the
    embedding before compiling. On a GPU indices are not checked, and torch's own assertion makes
    the device unusable for the process.
    """


class MatchError(LorafxError):
    """A selected weight is used in a way that lorafx cannot apply LoRA to.

    Way out: leave the module out (LoraConfig(exclude_modules=...)) and serve adapters that do not
    touch it; call the compiled model, not a part of it; for a class of your own, register a handler
    (`lorafx.register(handler=...)`). Calls without such an adapter are served.
    """


class ProvenanceError(LorafxError):
    """It cannot be proved which request a row belongs to, and the batch mixes adapters.

    Way out: one adapter per batch is served. Options(start="eager") follows rows by their values,
    such as those of an index. Declare the roles of arguments with LoraConfig(row_dims=...); the
    message names the operator at which the proof ends, which the model may avoid for rows of
    several requests.
    """


class CaptureError(LorafxError):
    """The model cannot be captured or served as asked: it is compiled already, was detached or
    changed, needs more graphs than allowed, or a compiler failed on it.

    Way out: use the compiled model, or `lorafx.detach(model)` and compile again; raise
    Options.recompile_limit; attach before torch.compile; switch off the pass that the message names
    (Options(passes={name: False})).
    """


class ReplacedModuleError(CaptureError):
    """A module that carries LoRA is not where it was when lorafx was given the model.

    Way out: put the module back, or detach() and compile the changed model. Adapters that do not
    touch it are served.
    """


class VerifyError(LorafxError):
    """A pass left a graph that is malformed or computes something else; or a call's graph and its
    answer in eager mode differ.

    Way out: a fault of lorafx, or of a pass of your own. Options(passes={name: False}) goes without
    the pass, Options(start="compiled") without eager mode; `lorafx.bisect` tells which is wrong.
    Please report it with the folder that Options(dump=...) writes.
    """


class LoweringError(LorafxError):
    """A kernel could not be generated, compiled or loaded.

    Way out: Options(lowering="inductor") or "reference" needs none of lorafx's kernels; the message
    names what the compiler said. Calls without an adapter are served.
    """


#: Least similarity of two near names by difflib, from 0 to 1. At 0.4 "conv" was near "fc_in".
_SIMILARITY = 0.6
#: The lines of a message.
_MOST_LINES = 100
#: Longer names are near none: the time of a comparison grows with their length.
_LONGEST = 1024


def some(names: Iterable[str], most: int = 3) -> str:
    """A sentence fragment with the first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def itemised(head: str, lines: Iterable[str], end: str = "") -> str:
    """A message: `head`, different `lines` below it, of which at most a hundred, and `end`."""
    listed = list(dict.fromkeys(lines))  # a file may name a million modules that the model lacks
    hidden = len(listed) - _MOST_LINES
    more = [f"and {hidden} more"] if hidden > 0 else []
    shown = (f"  - {line}" for line in (*listed[:_MOST_LINES], *more))
    return "\n".join([f"{head}:", *shown, *([end] if end else [])])


def nearest(
    name: str,
    candidates: Iterable[str],
    count: int = 3,
    *,
    cutoff: float = _SIMILARITY,
    prefix: str = "",
) -> str:
    """A sentence fragment naming the candidates closest to `name`, with `prefix` before each; empty
    if none has a similarity of `cutoff` or differs in one character."""
    if len(name) > _LONGEST:
        return ""
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=count, cutoff=cutoff)
    typos = {other for other in known if other not in close and _one_typo_apart(name, other)}
    close += sorted(typos, reverse=True)
    return f"; nearest: {', '.join(prefix + other for other in close[:count])}" if close else ""


def _one_typo_apart(name: str, other: str) -> bool:
    return len(name) == len(other) > 1 and sum(map(str.__ne__, name, other)) == 1

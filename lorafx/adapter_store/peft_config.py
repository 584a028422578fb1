r"""PEFT's `adapter_config.json`: the meaning of a LoRA configuration for inference.

    y = base(x) + s · B (A x),   s = α/r, or α/√r with `use_rslora`;   y scaled with `use_dora`

r and α are those of the first key k of `rank_pattern` / `alpha_pattern`, in the file's order, that
`re.match(rf"(.*\.)?({k})$", path)` matches, else `r` and `lora_alpha`. Patterns are not trusted and
are matched with a time limit (lorafx.model.targets). Fields that change this arithmetic, unknown
fields that are set, and other methods of PEFT are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from lorafx.adapter_store import field_checks as checks
from lorafx.adapter_store.field_checks import Check, Malformed, is_off, json_object, short
from lorafx.adapter_store.methods.method import MERGE as _MERGE
from lorafx.adapter_store.methods.method import AdapterMethod
from lorafx.adapter_store.methods.table import METHODS, REFUSED_TYPES, method_of, with_tokens
from lorafx.errors import CheckpointError, UnsupportedAdapterError, itemised
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.packed_names import PackedNames
from lorafx.model.targets import (
    Entries,
    Pattern,
    SavedTargets,
    is_all_linear,
    names,
    output_embedding,
)
from lorafx.registry import lookup

CONFIG_FILE = "adapter_config.json"
#: PEFT writes some kilobytes; paths of all modules of the largest models take megabytes.
_LARGEST = 1 << 26


def raw_fields(source: Any) -> tuple[dict[str, Any], str]:
    """The raw fields in a folder, a mapping or a `peft.LoraConfig`, and their name in messages."""
    if isinstance(source, Mapping):
        values = {name: _plain(value) for name, value in source.items()}
        where = "adapter configuration"
    elif dataclasses.is_dataclass(source) and hasattr(source, "peft_type"):
        # Not source.to_dict(), which depends on the installed PEFT; private fields are not read.
        names = [f.name for f in dataclasses.fields(source)]
        return {name: _plain(getattr(source, name)) for name in names}, "peft configuration"
    elif isinstance(source, str | os.PathLike):
        values, where = _load_file(Path(source))
    else:
        raise CheckpointError(
            "an adapter configuration is a folder, a dict or a peft.LoraConfig, not "
            f"{short(source)}"
        )
    if not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} must map field names to values, it is {short(values)}")
    return values, where


def _plain(value: Any) -> Any:
    """An enumeration's value, and the fields of a configuration in PEFT's, as files have them."""
    if isinstance(value, Enum):
        return value.value
    own = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dict(vars(value)) if own else value


def _load_file(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / CONFIG_FILE
    try:
        # Reading a pipe or a device would block or never end.
        size = file.stat().st_size if file.is_file() else None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder} cannot be read: {exc}") from exc
    if size is None:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}")
    if size > _LARGEST:
        raise CheckpointError(
            f"{file} has {size} bytes, and a configuration may have at most {_LARGEST}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} cannot be read as JSON: {exc}") from exc
    return json_object(text, str(file)), str(file)


#: Initialisations that keep the base weight, so that s·B A is the whole update.
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_EXPORT = (
    "export with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which writes a "
    f"plain LoRA of rank 2r, or {_MERGE}"
)
#: Fields of training, packaging and initialisation. The *_config fields of initialisations stay set
#: after an exact export; `velora_config` changes gradients only, `monteclora_config` samples
#: in training only.
_NO_ARITHMETIC = frozenset(
    {
        *("task_type", "revision", "inference_mode", "lora_dropout"),
        *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "peft_type", "init_lora_weights"),
        "monteclora_config",
    }
)

_FOLDER = "save the adapter, and load its folder into the plain base model"
# Fields that change the arithmetic if they are set, and what to do instead.
_REFUSED: Mapping[str, str] = {
    "use_bdlora": f"BD-LoRA has the blocks of a diagonal instead of its factors; {_FOLDER}",
    "use_qalora": f"QALoRA pools the inputs of lora_A; {_FOLDER}",
    "layer_replication": (
        "the adapter belongs to a model with repeated layers; build that model, save it, and "
        "train or convert the adapter against it"
    ),
    "megatron_config": "Megatron's parallel layers; export the adapter for the plain model",
    "arrow_config": "Arrow routes tokens between adapters; load those adapters separately",
    "kasa_config": f"KaSA truncates the base weight and adds a diagonal; {_FOLDER}",
}
# Their empty objects count as set: PEFT would fill in defaults.
_OBJECTS = frozenset({"arrow_config", "kasa_config"})

# Features that PEFT lacks with aLoRA, or applies to all tokens.
_NOT_WITH_ALORA = (
    *("use_dora", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config"),
)


def _version(name: str, value: Any) -> tuple[int, ...] | None:
    """(0, 19) of "0.19.1.dev0"."""
    match = re.match(
        r"([0-9]{1,6})\.([0-9]{1,6})(?![0-9])", value if isinstance(value, str) else ""
    )
    return None if match is None else (int(match[1]), int(match[2]))


def _class(name: str, value: Any) -> tuple[str, str] | None:
    fields = value if isinstance(value, Mapping) else {}
    cls, module = fields.get("base_model_class"), fields.get("parent_library")
    return (cls, module) if isinstance(cls, str) and isinstance(module, str) else None


def _checked_field(check: Check, default: Any = None, name: str = "") -> Any:
    """A dataclass field with its check, and its name in the file if that differs."""
    return field(default_factory=lambda: default, metadata={"check": check, "name": name})


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a PEFT LoRA configuration that lorafx uses; it refuses others that are set.

    Attributes:
        r: rank of modules that `rank_pattern` does not match; None if absent.
        lora_bias: lora_B has a bias, added with the scale s.
        bias: "none", "lora_only" (biases of modules with factors are trained) or "all".
        target_modules, exclude_modules: exact or dotted-suffix names, one regular expression (a
            str, `re.fullmatch`), "all-linear", or None.
        target_parameters: exact or dotted-suffix names of parameters ("mlp.experts.down_proj"),
            which rank_pattern and alpha_pattern use too.
        layers_to_transform, layers_pattern: restrict a tuple of suffixes to these layers.
        modules_to_save: endings of names of modules that were trained as a whole; with
            ensure_weight_tying, modules tied to them were too.
        trainable_token_indices: trained tokens by the ending of an embedding's name; "" is for the
            file's only embedding.
        fan_in_fan_out: the base weight is stored (in, out); the delta is the same.
        invocation: `alora_invocation_tokens` of an aLoRA adapter, which is active from their last
            occurrence in a sequence on; else empty.
        trained_class: the name and the Python module of the class that it was trained on.
        peft_version: PEFT's release that wrote the file, such as (0, 19).
        method, options: another method than LoRA that the tensors are of, and its own fields.
    """

    r: int | None = _checked_field(checks.rank)
    lora_alpha: float = _checked_field(checks.alpha, 8)
    use_rslora: bool = _checked_field(checks.flag, False)
    use_dora: bool = _checked_field(checks.flag, False)
    lora_bias: bool = _checked_field(checks.flag, False)
    bias: str = _checked_field(checks.bias, "none")
    rank_pattern: Mapping[str, int] = _checked_field(checks.by_name(checks.rank), {})
    alpha_pattern: Mapping[str, float] = _checked_field(checks.by_name(checks.alpha), {})
    target_modules: str | tuple[str, ...] | None = _checked_field(checks.targets)
    target_parameters: tuple[str, ...] = _checked_field(checks.strings, ())
    exclude_modules: str | tuple[str, ...] | None = _checked_field(checks.targets)
    layers_to_transform: frozenset[int] | None = _checked_field(checks.layers)
    layers_pattern: tuple[str, ...] = _checked_field(checks.layer_names, ())
    modules_to_save: tuple[str, ...] = _checked_field(checks.names, ())
    ensure_weight_tying: bool = _checked_field(checks.flag, False)
    trainable_token_indices: Mapping[str, tuple[int, ...]] = _checked_field(
        checks.tokens_by_ending, {}
    )
    fan_in_fan_out: bool = _checked_field(checks.flag, False)
    invocation: tuple[int, ...] = _checked_field(checks.tokens, (), "alora_invocation_tokens")
    base_model: str | None = _checked_field(checks.text, None, "base_model_name_or_path")
    trained_class: tuple[str, str] | None = _checked_field(_class, None, "auto_mapping")
    peft_version: tuple[int, ...] | None = _checked_field(_version)
    method: AdapterMethod | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Any, *, where: str | None = None, methods: bool = False) -> PeftConfig:
        """The configuration in a folder, a mapping, or a `peft.LoraConfig`; with `methods` also of
        the methods whose files are read. Raises CheckpointError, or UnsupportedAdapterError with
        all refused fields."""
        if isinstance(source, PeftConfig):
            return source
        values, label = raw_fields(source)
        return _read(values, where or label, method_of(values) if methods else None)

    @property
    def max_rank(self) -> int | None:
        ranks = [*self.rank_pattern.values(), *([] if self.r is None else [self.r])]
        return max(ranks, default=None)

    def targets_parameter(self, path: str) -> bool:
        return names(self.target_parameters, [path])

    def name_of(self, path: str, parameter: str = "weight") -> str:
        """The name of the module at `path` in patterns: its parameter's if that is the target."""
        name = f"{path}.{parameter}" if path else parameter
        return name if self.targets_parameter(name) and not self.matches(path) else path

    def rank(self, path: str) -> int | None:
        """The rank of the module at `path`, a dotted path without PEFT's prefixes."""
        return _by_pattern(self._ranks, path, self.r)

    def scale(self, path: str, rank: int) -> float:
        """s of the module at `path`, whose A has `rank` rows."""
        alpha = _by_pattern(self._alphas, path, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def matches(self, path: str) -> bool:
        """Whether PEFT would have put LoRA on the module; false for "all-linear" and None."""
        targets = self.target_modules
        excluded = self.exclude_modules
        if targets is None or targets == "all-linear":
            return False
        if excluded is not None and names(excluded, [path]):
            return False
        by_suffix = isinstance(targets, Entries) and path not in targets.as_set
        return names(targets, [path]) and (not by_suffix or self._selects_layer_of(path))

    def trains(self, path: str) -> bool:
        """Whether the module or a parent was trained as a whole; names may match by any ending."""
        parts = path.split(".") if self.modules_to_save else ()
        with_parents = accumulate(parts, "{}.{}".format)
        return any(name.endswith(self.modules_to_save) for name in with_parents)

    def saves(self, path: str) -> bool:
        """Whether the module at `path`, or a module tied to it, was trained as a whole."""
        tied = self.ensure_weight_tying and bool(self.modules_to_save)
        return tied or self.trains(path)

    def tokens_of(self, path: str) -> tuple[int, ...] | None:
        """The trained tokens of the embedding at `path`, if the configuration names them."""
        endings = filter(path.endswith, self.trainable_token_indices)
        longest = max(endings, key=len, default=None)
        return None if longest is None else self.trainable_token_indices[longest]

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(checks.key_pattern(key), rank) for key, rank in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(checks.key_pattern(key), alpha) for key, alpha in self.alpha_pattern.items()]

    def _selects_layer_of(self, path: str) -> bool:
        if self.layers_to_transform is None:
            return True
        # In PEFT the first number in the path is the layer's; later ones may be experts'.
        patterns = self.layers_pattern or (r"[^.]*",)
        lead = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for name in patterns:
            match = re.match(rf"{lead}{name}\.(?P<idx>\d+)\.", path)
            if match:
                return int(match["idx"]) in self.layers_to_transform
        return False


def _by_pattern(patterns: Iterable[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    matching = (value for p, value in patterns if path.endswith(p.tail) and p.fullmatches(path))
    return next(matching, default)


#: The fields by their names in the file.
_READ = {f.metadata["name"] or f.name: f for f in dataclasses.fields(PeftConfig) if f.metadata}
#: Fields without a neutral value.
_NEVER_OFF = ("r", "lora_alpha", "target_modules")


def _read(values: Mapping[str, Any], where: str, method: AdapterMethod | None) -> PeftConfig:
    values = with_tokens(values)
    if refused := list(_refusals(values, method)):
        raise UnsupportedAdapterError(
            itemised(f"{where} asks for what lorafx does not do", refused)
        )
    read: dict[str, Any] = {"method": method, "options": {}}
    malformed: list[str] = []
    for name, check in (method.fields if method else {}).items():
        if name in values:
            try:
                read["options"][name] = check(name, values[name])
            except Malformed as error:
                malformed.append(str(error))
    values = _in_terms_of_lora(values, method)
    for name, attribute in _READ.items():
        if name not in values or (is_off(values[name]) and name not in _NEVER_OFF):
            continue
        try:
            read[attribute.name] = attribute.metadata["check"](name, values[name])
        except Malformed as error:
            malformed.append(str(error))
    if malformed:
        raise CheckpointError(itemised(f"{where} is malformed", malformed))
    return PeftConfig(**read)


def _in_terms_of_lora(values: Mapping[str, Any], method: AdapterMethod | None) -> Mapping[str, Any]:
    """The fields without those that `method` has other values for than LoRA."""
    if method is None:
        return values
    values = {name: value for name, value in values.items() if name not in method.unread}
    if "alpha" in method.fields and values.get("alpha") is not None:
        values["lora_alpha"] = values["alpha"]
    if isinstance(bias := values.get("bias"), str) and bias.endswith("_only"):
        values["bias"] = "lora_only"  # each method has its own word for it
    return values


def _refusals(values: Mapping[str, Any], method: AdapterMethod | None) -> Iterable[str]:
    kind = values.get("peft_type")
    if method is None and kind is not None and not (isinstance(kind, str) and kind == "LORA"):
        reason = REFUSED_TYPES.get(kind) if isinstance(kind, str) else None
        types = ", ".join(dict.fromkeys(m.peft_type for m in METHODS if m.peft_type))
        reason = reason or f"only LORA adapters and files of {types} are read; {_MERGE}"
        yield f"peft_type = {short(kind)}: {reason}"
        return  # another type's fields have other meanings
    init = values.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else ""
    if not (init is None or isinstance(init, bool) or name in _PLAIN_INITS):
        yield (
            f"init_lora_weights = {short(init)}: it may take its start out of the base weight, so "
            f"the saved factors alone are not the whole update; {_EXPORT}"
        )
    own = {*method.fields, *method.training} if method else set()
    for name, way_out in _REFUSED.items():
        value = None if name in own else values.get(name)
        off = value is None or value is False if name in _OBJECTS else is_off(value)
        if not off:
            yield f"{name} = {short(value)}: {way_out}"
    if not is_off(values.get("alora_invocation_tokens")):
        conflicts = [name for name in _NOT_WITH_ALORA if not is_off(values.get(name))]
        if values.get("bias", "none") not in ("none", None):
            conflicts.append("bias")
        for name in conflicts:
            yield (
                f"{name} = {short(values[name])} with alora_invocation_tokens: PEFT trains no such "
                "aLoRA adapter, or applies this to all tokens; train it without"
            )
    for name in sorted(values.keys() - _READ.keys() - _NO_ARITHMETIC - _REFUSED.keys() - own):
        if not is_off(values[name]):
            yield (
                f"{name} = {short(values[name])}: unknown field, which may change the arithmetic; "
                "remove it if it does not, or upgrade lorafx"
            )


def targeted_paths(config: PeftConfig, model: nn.Module) -> SavedTargets:
    """The paths of modules and 3-D parameters of `model` on which PEFT would put LoRA; for a matrix
    the path of its module. Modules may have packed names."""
    all_linear = is_all_linear(config.target_modules)
    head = output_embedding(model) if all_linear else None
    paths: dict[str, None] = {}
    for path, module in model.named_modules():
        entry = lookup(module) if all_linear else None
        linear = entry is not None and entry.is_linear and module is not head
        if linear or config.matches(path):
            paths[path] = None
        for name, parameter in module.named_parameters(recurse=False):
            if config.targets_parameter(join(path, name)):
                paths[path if parameter.dim() < 3 else join(path, name)] = None
    packed = PackedNames(ModuleGraph(model)).named()
    paths.update((path, None) for path, _ in packed if config.matches(path))
    return SavedTargets(paths)

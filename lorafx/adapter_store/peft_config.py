r"""PEFT's `adapter_config.json`: the meaning of a LoRA configuration for inference.

    y = base(x) + s · B (A x),   s = α/r, or α/√r with `use_rslora`;   y scaled with `use_dora`

For r and α the first key k of `rank_pattern` / `alpha_pattern`, in the file's order, with
`re.match(rf"(.*\.)?({k})$", path)` decides, else `r` and `lora_alpha`. Untrusted patterns are
matched with a time limit (lorafx.model.targets). Fields that change this arithmetic, unknown fields
that are set, and other methods of PEFT are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import nn

from lorafx.adapter_store import config_values as checks
from lorafx.adapter_store.config_values import Check, Malformed, is_off, keyed, raw_fields, short
from lorafx.errors import CheckpointError, UnsupportedAdapterError
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


@dataclass(frozen=True)
class BlockDiagonal:
    """PEFT's `use_bdlora`: path parts of modules whose A, or B, is saved as diagonal `blocks`."""

    a: tuple[str, ...] = ()
    b: tuple[str, ...] = ()
    blocks: int = 1

    def letter(self, path: str) -> str | None:
        if any(part in path for part in self.a):
            return "A"
        return "B" if any(part in path for part in self.b) else None


def _blocks(name: str, value: Any) -> BlockDiagonal:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise Malformed(f"{name} must be an object, it is {short(value)}")
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not known >= value.keys():
        unknown = min(map(str, value.keys() - known))
        raise Malformed(f"{name} has the unknown field {short(unknown)}")
    a, b = (
        checks.names(f"{name}.{field}", value.get(field) or ())
        for field in ("target_modules_bd_a", "target_modules_bd_b")
    )
    return BlockDiagonal(a, b, checks.rank(f"{name}.nblocks", value.get("nblocks", 1)))


_MERGE = "merge it into a copy of the base model (`PeftModel.merge_and_unload()`) instead"
_PROMPT = "it learns prompts and no weights; put them before the inputs (`inputs_embeds`) instead"
_MIXED = (
    "a router of its own mixes adapters for each token; load its adapters one by one, and give a "
    "request weights by name for a fixed mixture"
)
_PROMPTS = (
    "ADAPTION_PROMPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)
#: PEFT methods that cannot be merged, and the way out.
_UNMERGED = {**dict.fromkeys(("POLY", "XLORA"), _MIXED), **dict.fromkeys(_PROMPTS, _PROMPT)}

#: Initialisations that keep the base weight, so that s·B A is the whole difference.
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_EXPORT = (
    "export with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which writes a "
    f"plain LoRA of rank 2r, or {_MERGE}"
)
#: Fields of training, packaging and initialisation. The *_config fields of initialisations stay set
#: after an exact export; `velora_config` changes gradients only.
_NO_ARITHMETIC = frozenset(
    {
        *("task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout"),
        *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "peft_type", "init_lora_weights"),
    }
)

# Fields that change the arithmetic whenever set, with the way out.
_REFUSED: Mapping[str, str] = {
    "use_qalora": f"QALoRA pools the inputs of lora_A; {_MERGE}",
    "layer_replication": (
        "the adapter belongs to a model with repeated layers; build that model, save it, and "
        "train or convert the adapter against it"
    ),
    "megatron_config": "Megatron's parallel layers; export the adapter for the plain model",
    "arrow_config": "Arrow routes tokens between adapters; load those adapters separately",
    "kasa_config": f"KaSA truncates the base weight and adds a diagonal; {_MERGE}",
    "monteclora_config": f"MonteCLoRA samples its weights; {_MERGE}",
}
# Empty configuration objects count as set: PEFT would fill in defaults.
_OBJECTS = frozenset({"arrow_config", "kasa_config", "monteclora_config"})

# Features that PEFT lacks with aLoRA, or applies to all tokens.
_NOT_WITH_ALORA = (
    *("use_dora", "use_bdlora", "target_parameters", "modules_to_save"),
    "trainable_token_indices",
)


def _version(name: str, value: Any) -> tuple[int, ...] | None:
    """(0, 19) of "0.19.1.dev0"."""
    found = re.match(
        r"([0-9]{1,6})\.([0-9]{1,6})(?![0-9])", value if isinstance(value, str) else ""
    )
    return None if found is None else (int(found[1]), int(found[2]))


def _read_by(check: Check, default: Any = None, name: str = "") -> Any:
    """A dataclass field with its check and its name in the file."""
    return field(default_factory=lambda: default, metadata={"check": check, "name": name})


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a PEFT LoRA configuration that lorafx uses; all others were refused.

    Attributes:
        r: rank where `rank_pattern` has no match; None where absent.
        lora_bias: lora_B has a bias, added with the scale s.
        bias: "none", "lora_only" (biases of modules with factors are trained) or "all".
        target_modules, exclude_modules: exact or dotted-suffix names, one regular expression (a
            str, `re.fullmatch`), "all-linear", or None.
        target_parameters: exact or dotted-suffix names of parameters ("mlp.experts.down_proj"),
            which rank_pattern and alpha_pattern use too.
        layers_to_transform, layers_pattern: restrict a tuple of suffixes to these layers.
        modules_to_save: endings of names of modules trained as a whole; with ensure_weight_tying
            also modules tied to them.
        trainable_token_indices: trained tokens by the ending of an embedding's name; "" is the
            file's only embedding.
        fan_in_fan_out: the base weight is stored (in, out); the delta is the same.
        invocation: `alora_invocation_tokens`, from whose last occurrence in a sequence an aLoRA
            adapter is active; else empty.
        peft_version: the writing release, (0, 19) say.
    """

    r: int | None = _read_by(checks.rank)
    lora_alpha: float = _read_by(checks.alpha, 8)
    use_rslora: bool = _read_by(checks.flag, False)
    use_dora: bool = _read_by(checks.flag, False)
    lora_bias: bool = _read_by(checks.flag, False)
    bias: str = _read_by(checks.bias, "none")
    rank_pattern: Mapping[str, int] = _read_by(checks.by_pattern(checks.rank), {})
    alpha_pattern: Mapping[str, float] = _read_by(checks.by_pattern(checks.alpha), {})
    target_modules: str | tuple[str, ...] | None = _read_by(checks.targets)
    target_parameters: tuple[str, ...] = _read_by(checks.strings, ())
    exclude_modules: str | tuple[str, ...] | None = _read_by(checks.targets)
    layers_to_transform: tuple[int, ...] | None = _read_by(checks.layers)
    layers_pattern: tuple[str, ...] = _read_by(checks.layer_names, ())
    modules_to_save: tuple[str, ...] = _read_by(checks.names, ())
    ensure_weight_tying: bool = _read_by(checks.flag, False)
    trainable_token_indices: Mapping[str, tuple[int, ...]] = _read_by(checks.tokens_by_ending, {})
    fan_in_fan_out: bool = _read_by(checks.flag, False)
    invocation: tuple[int, ...] = _read_by(checks.tokens, (), "alora_invocation_tokens")
    block_diagonal: BlockDiagonal | None = field(
        default=None, metadata={"check": _blocks, "name": "use_bdlora"}
    )
    base_model: str | None = _read_by(checks.text, None, "base_model_name_or_path")
    peft_version: tuple[int, ...] | None = _read_by(_version)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, tuple):  # thousands of entries where a checkpoint lists all paths
                object.__setattr__(self, name, Entries(value))

    @classmethod
    def read(cls, source: Any, *, where: str | None = None) -> PeftConfig:
        """The configuration in a folder, a mapping, or a `peft.LoraConfig`. Raises CheckpointError,
        or UnsupportedAdapterError with all refused fields."""
        if isinstance(source, PeftConfig):
            return source
        values, found = raw_fields(source)
        return _read(values, where or found)

    @property
    def max_rank(self) -> int | None:
        ranks = [*self.rank_pattern.values(), *([] if self.r is None else [self.r])]
        return max(ranks, default=None)

    def targets_parameter(self, path: str) -> bool:
        return names(self.target_parameters, [path])

    def name_of(self, path: str, parameter: str = "weight") -> str:
        """The name of the module at `path` in patterns: its parameter where that is the target."""
        name = f"{path}.{parameter}" if path else parameter
        return name if self.targets_parameter(name) and not self.matches(path) else path

    def rank(self, path: str) -> int | None:
        """Rank of the module at `path`, a dotted path without PEFT's prefixes."""
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
        return names(targets, [path]) and (not by_suffix or self._layer_wanted(path))

    def trains(self, path: str) -> bool:
        """Whether the module or a parent was trained as a whole; any ending of a name counts."""
        parts = path.split(".") if self.modules_to_save else ()
        around = accumulate(parts, "{}.{}".format)
        return any(name.endswith(self.modules_to_save) for name in around)

    def saves(self, path: str) -> bool:
        """Whether the module at `path`, or a module tied to it, was trained as a whole."""
        tied = self.ensure_weight_tying and bool(self.modules_to_save)
        return tied or self.trains(path)

    def tokens_of(self, path: str) -> tuple[int, ...] | None:
        """The trained tokens of the embedding at `path`, where the configuration names them."""
        return next((ids for name, ids in self._longest_first if path.endswith(name)), None)

    @cached_property
    def _longest_first(self) -> list[tuple[str, tuple[int, ...]]]:
        """The trained tokens by endings of names; every module of a model is looked up."""
        return sorted(self.trainable_token_indices.items(), key=lambda item: -len(item[0]))

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(keyed(key), rank) for key, rank in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(keyed(key), alpha) for key, alpha in self.alpha_pattern.items()]

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.layers_to_transform or ())

    def _layer_wanted(self, path: str) -> bool:
        if self.layers_to_transform is None:
            return True
        # PEFT: the first numbered segment is the layer; later numbers may be experts.
        patterns = self.layers_pattern or (r"[^.]*",)
        lead = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for name in patterns:
            found = re.match(rf"{lead}{name}\.(?P<idx>\d+)\.", path)
            if found:
                return int(found["idx"]) in self._layers
        return False


def _by_pattern(patterns: Iterable[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    for pattern, value in patterns:
        if path.endswith(pattern.tail) and pattern.fullmatches(path):
            return value
    return default


#: Fields by their names in the file.
_READ = {f.metadata["name"] or f.name: f for f in dataclasses.fields(PeftConfig)}
#: Fields without a neutral value.
_NEVER_OFF = ("r", "lora_alpha", "target_modules")


def _read(values: Mapping[str, Any], where: str) -> PeftConfig:
    if refused := list(_refused(values)):
        raise UnsupportedAdapterError(
            f"{where} asks for what lorafx does not do:\n"
            + "\n".join(f"  - {line}" for line in refused)
        )
    read: dict[str, Any] = {}
    malformed: list[str] = []
    for name, attribute in _READ.items():
        if name not in values or (is_off(values[name]) and name not in _NEVER_OFF):
            continue
        try:
            read[attribute.name] = attribute.metadata["check"](name, values[name])
        except Malformed as error:
            malformed.append(str(error))
    if malformed:
        raise CheckpointError(
            f"{where} is malformed:\n" + "\n".join(f"  - {line}" for line in malformed)
        )
    return PeftConfig(**read)


def _refused(values: Mapping[str, Any]) -> Iterable[str]:
    kind = values.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind is not None and not (isinstance(kind, str) and kind == "LORA"):
        known = _UNMERGED.get(kind) if isinstance(kind, str) else None
        yield f"peft_type = {short(kind)}: {known or f'only LORA adapters are read; {_MERGE}'}"
        return  # another type's fields have other meanings
    init = values.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else ""
    if not (init is None or isinstance(init, bool) or name in _PLAIN_INITS):
        yield (
            f"init_lora_weights = {short(init)}: it may take its start out of the base weight, so "
            f"the saved factors alone are not the whole update; {_EXPORT}"
        )
    for name, way_out in _REFUSED.items():
        value = values.get(name)
        off = value is None or value is False if name in _OBJECTS else is_off(value)
        if not off:
            yield f"{name} = {short(value)}: {way_out}"
    if not is_off(values.get("alora_invocation_tokens")):
        others = [name for name in _NOT_WITH_ALORA if not is_off(values.get(name))]
        if values.get("bias", "none") not in ("none", None):
            others.append("bias")
        for name in others:
            yield (
                f"{name} = {short(values[name])} with alora_invocation_tokens: PEFT trains no such "
                "aLoRA adapter, or applies this to all tokens; train it without"
            )
    for name in sorted(values.keys() - _READ.keys() - _NO_ARITHMETIC - _REFUSED.keys()):
        if not is_off(values[name]):
            yield (
                f"{name} = {short(values[name])}: unknown field, which may change the arithmetic; "
                "remove it if it does not, or upgrade lorafx"
            )


def picked(config: PeftConfig, model: nn.Module) -> SavedTargets:
    """Paths of the modules and 3-D parameters of `model` that PEFT would put LoRA on; a matrix is
    named by its module. Modules may be given by packed names."""
    every = is_all_linear(config.target_modules)
    head = output_embedding(model) if every else None
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        entry = lookup(module) if every else None
        linear = entry is not None and entry.is_linear and module is not head
        if linear or config.matches(path):
            found[path] = None
        for name, parameter in module.named_parameters(recurse=False):
            if config.targets_parameter(join(path, name)):
                found[path if parameter.dim() < 3 else join(path, name)] = None
    packed = PackedNames(ModuleGraph(model)).named()
    found.update((path, None) for path, _ in packed if config.matches(path))
    return SavedTargets(found)

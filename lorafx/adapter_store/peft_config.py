r"""PEFT's `adapter_config.json`: what a LoRA adapter's configuration means for inference.

    y = base(x) + s · B (A x),   s = α/r, or α/√r with `use_rslora`;   y scaled with `use_dora`

r and α are per module: the first key k of `rank_pattern` / `alpha_pattern`, in the file's order,
with `re.match(rf"(.*\.)?({k})$", path)` decides, else `r` and `lora_alpha`. The patterns are not
trusted, so they are matched against a clock (lorafx.model.targets). Fields that change this
arithmetic are refused by name; so is any field that this reader does not know, unless it holds
null, false or nothing: PEFT adds fields with every version, and their "off" is harmless.

Other methods of PEFT are refused by name, with the way out. `use_bdlora` says which factors are
saved as blocks; lorafx.adapter_store.checkpoint makes them whole.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorafx.adapter_store.config_source import raw_fields, short
from lorafx.adapter_store.config_values import Values, is_off, keyed
from lorafx.errors import CheckpointError, UnsupportedAdapterError
from lorafx.model.targets import Entries, Pattern, names


@dataclass(frozen=True)
class BlockDiagonal:
    """PEFT's `use_bdlora`.

    Attributes:
        a, b: parts of the paths of modules whose A, or B, is block-diagonal; anywhere in a path.
        blocks: n.
    """

    a: tuple[str, ...] = ()
    b: tuple[str, ...] = ()
    blocks: int = 1

    def letter(self, path: str) -> str | None:
        """Which factor of the module at `path` is block-diagonal; None for neither."""
        if any(part in path for part in self.a):
            return "A"
        return "B" if any(part in path for part in self.b) else None


def block_diagonal(value: Any) -> BlockDiagonal | str | None:
    """The field `use_bdlora`: None where it is off, a message where it is malformed."""
    if value is None or value is False:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        return f"use_bdlora must be an object, it is {short(value)}"
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not known >= value.keys():
        return f"use_bdlora has the unknown field {short(min(map(str, value.keys() - known)))}"
    names = [value.get(f"target_modules_bd_{letter}") or () for letter in "ab"]
    for own in names:
        if not isinstance(own, list | tuple) or not all(isinstance(n, str) and n for n in own):
            return f"use_bdlora must name parts of module paths in lists, not {short(own)}"
    blocks = value.get("nblocks", 1)
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        return f"use_bdlora.nblocks must be a positive integer, it is {short(blocks)}"
    return BlockDiagonal(tuple(names[0]), tuple(names[1]), blocks)


_MERGE = "merge it into a copy of the base model (`PeftModel.merge_and_unload()`) instead"
_PROMPT = "it learns prompts and no weights; put them before the inputs (`inputs_embeds`) instead"
_MIXED = (
    "a router of its own mixes adapters for each token; load its adapters one by one, and give a "
    "request weights by name for a fixed mixture"
)

_TYPES: Mapping[str, str] = {
    "ADALORA": f"factors with singular values between them; {_MERGE}",
    "BOFT": f"it rotates the base weight; {_MERGE}",
    "FOURIERFT": f"its difference is a Fourier transform; {_MERGE}",
    "HRA": f"it reflects the base weight; {_MERGE}",
    "IA3": f"it scales activations, and adds no matrix; {_MERGE}",
    "LOHA": f"its difference is a product of matrices element by element; {_MERGE}",
    "LOKR": f"its difference is a Kronecker product; {_MERGE}",
    "LN_TUNING": f"it trains norms; {_MERGE}",
    "OFT": f"it rotates the base weight; {_MERGE}",
    "VERA": f"it scales random matrices that all modules share; {_MERGE}",
    "VBLORA": f"its factors are made of shared vectors; {_MERGE}",
    "RANDLORA": f"it scales random matrices that all modules share; {_MERGE}",
    "POLY": _MIXED,
    "XLORA": _MIXED,
    "ADAPTION_PROMPT": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
}

_EXPORT = (
    "export with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which writes a "
    f"plain LoRA of rank 2r, or {_MERGE}"
)
_INITIALISATIONS: Mapping[str, str] = {
    "pissa": "PiSSA starts from principal components, which it takes out of the base weight",
    "olora": "OLoRA starts from a QR decomposition, which it takes out of the base weight",
    "corda": "CorDA starts from components of the base weight, which it takes out of it",
    "lora_ga": "LoRA-GA starts from gradients, and takes its start out of the base weight",
    "loftq": "LoftQ replaces the base weight by a quantised one that the adapter corrects",
}


def method(kind: object) -> str:
    """What an adapter of this `peft_type` is, and the way out."""
    return _TYPES.get(
        kind if isinstance(kind, str) else "", f"only LORA adapters are read; {_MERGE}"
    )


def initialisation(init: object) -> str:
    """What this value of `init_lora_weights` does to the base weight, and the way out."""
    name = init.lower() if isinstance(init, str) else ""
    known = next((text for key, text in _INITIALISATIONS.items() if name.startswith(key)), None)
    why = known or "this initialisation may subtract from the base weight"
    return f"{why}, so the saved factors alone are not the whole update; {_EXPORT}"


# Fields that say how the adapter was trained, packaged or initialised, and nothing about what it
# computes once trained. The *_config fields of initialisations stay set after an exact export,
# PEFT ignores them unless `init_lora_weights` asks for them; `velora_config` changes gradients
# only.
_NO_ARITHMETIC = frozenset(
    {
        "task_type",
        "auto_mapping",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
    }
)

_READ = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "use_bdlora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "init_lora_weights",
        "target_parameters",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "alora_invocation_tokens",
        "peft_version",
    }
)

# Fields whose every set value changes the arithmetic, with the way out.
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
# Configuration objects count as asked for even when empty: PEFT would build one with defaults.
_OBJECTS = frozenset({"arrow_config", "kasa_config", "monteclora_config"})

# What PEFT has no aLoRA with, or applies to all tokens of an aLoRA adapter.
_NOT_WITH_ALORA = (
    "use_dora",
    "use_bdlora",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
)

# Initialisations that leave the base weight alone, so that s·BA is the whole difference.
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})


@dataclass(frozen=True)
class PeftConfig:
    """What lorafx needs of a PEFT LoRA configuration; everything else was refused.

    Attributes:
        r: rank where `rank_pattern` says nothing; None where the file leaves it out.
        lora_alpha, use_rslora, use_dora, rank_pattern, alpha_pattern: see the module's equation.
        lora_bias: lora_B has a bias, which is added with the scale s.
        bias: "none"; "lora_only" where the biases of the modules with factors were trained too, and
            "all" where those of the whole model were.
        target_modules, exclude_modules: a tuple of exact or dotted-suffix names, one regular
            expression (a str, `re.fullmatch`), "all-linear", or None.
        target_parameters: exact or dotted-suffix names of parameters ("mlp.experts.down_proj");
            rank_pattern and alpha_pattern go by the parameter's name there.
        layers_to_transform, layers_pattern: restrict a tuple of suffixes to these layers.
        modules_to_save: endings of the names of modules that were trained as a whole.
        ensure_weight_tying: what is tied to one of them was trained and saved with it. (A tied
            head's factors are in the file like any other's.)
        trainable_token_indices: the tokens that were trained, by the ending of an embedding's name;
            "" stands for the one that the file has.
        fan_in_fan_out: the base weight is stored (in, out); the delta is the same.
        invocation: of an aLoRA adapter, the token ids from whose last occurrence on it is active
            in a sequence (`alora_invocation_tokens`); empty for others.
        block_diagonal: which factors are saved as blocks (`use_bdlora`).
        base_model: `base_model_name_or_path`, for messages.
        peft_version: the release that wrote it, (0, 19) say; None where it does not tell.
    """

    r: int | None = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    invocation: tuple[int, ...] = ()
    block_diagonal: BlockDiagonal | None = None
    base_model: str | None = None
    peft_version: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, tuple):  # thousands of entries where a checkpoint lists all paths
                object.__setattr__(self, name, Entries(value))

    @classmethod
    def read(cls, source: Any, *, where: str | None = None) -> PeftConfig:
        """The configuration in a folder, a mapping, or a `peft.LoraConfig`.

        `where` names it in messages. Raises CheckpointError for what is absent or malformed and
        UnsupportedAdapterError, naming every refused field at once.
        """
        if isinstance(source, PeftConfig):
            return source
        values, found = raw_fields(source)
        return _Fields(values, where or found).config()

    @property
    def max_rank(self) -> int | None:
        """The largest rank that the configuration asks for anywhere; None if it does not say."""
        ranks = [*self.rank_pattern.values(), *([] if self.r is None else [self.r])]
        return max(ranks, default=None)

    def targets_parameter(self, path: str) -> bool:
        """Whether PEFT would have put LoRA on the parameter at `path`."""
        return _named(self.target_parameters, path)

    def name_of(self, path: str, parameter: str = "weight") -> str:
        """What the patterns call the module at `path`: its parameter where that is the target."""
        name = f"{path}.{parameter}" if path else parameter
        return name if self.targets_parameter(name) and not self.matches(path) else path

    def rank(self, path: str) -> int | None:
        """Rank of the module at `path` (its dotted path without PEFT's prefixes)."""
        return _by_pattern(self._ranks, path, self.r)

    def scale(self, path: str, rank: int) -> float:
        """s of the module at `path`, whose A has `rank` rows."""
        alpha = _by_pattern(self._alphas, path, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def matches(self, path: str) -> bool:
        """Whether PEFT would have put LoRA on the module at `path`.

        False for every path where the configuration does not name modules ("all-linear", None).
        """
        targets = self.target_modules
        if targets is None or targets == "all-linear" or _named(self.exclude_modules, path):
            return False
        by_suffix = isinstance(targets, Entries) and path not in targets.as_set
        return _named(targets, path) and (not by_suffix or self._layer_wanted(path))

    def trains(self, path: str) -> bool:
        """Whether the module at `path`, or one that it lies in, was trained as a whole. PEFT goes
        by the ending of a name, dots or not."""
        if not self.modules_to_save:
            return False
        parts = path.split(".")
        around = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return any(_ending(self._saved, name) is not None for name in around)

    def saves(self, path: str) -> bool:
        """Whether a whole weight that is saved for the module at `path` was trained: as it is, or
        what it is tied to."""
        tied = self.ensure_weight_tying and bool(self.modules_to_save)
        return tied or self.trains(path)

    def tokens_of(self, path: str) -> tuple[int, ...] | None:
        """The tokens that were trained of the embedding at `path`; None where it does not say."""
        name = _ending(self._tokens, path)
        return None if name is None else self.trainable_token_indices[name]

    @cached_property
    def _saved(self) -> Mapping[int, frozenset[str]]:
        return _by_length(self.modules_to_save)

    @cached_property
    def _tokens(self) -> Mapping[int, frozenset[str]]:
        return _by_length(self.trainable_token_indices)

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
        # PEFT: the first numbered segment is the layer (a later one may be an expert).
        patterns = self.layers_pattern or (r"[^.]*",)
        lead = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        for name in patterns:
            found = re.match(rf"{lead}{name}\.(?P<idx>\d+)\.", path)
            if found:
                return int(found["idx"]) in self._layers
        return False


def _named(spec: str | tuple[str, ...] | None, path: str) -> bool:
    return spec is not None and names(spec, [path])


def _by_length(names: Iterable[str]) -> dict[int, frozenset[str]]:
    """Names by their length, longest first: a file may have as many as a model has modules."""
    found: dict[int, set[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        found.setdefault(len(name), set()).add(name)
    return {length: frozenset(own) for length, own in found.items()}


def _ending(names: Mapping[int, frozenset[str]], path: str) -> str | None:
    """The longest of the names that `path` ends with."""
    endings = ((path[len(path) - n :], own) for n, own in names.items() if n <= len(path))
    return next((ending for ending, own in endings if ending in own), None)


def _by_pattern(patterns: Iterable[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    for own, value in patterns:
        if path.endswith(own.tail) and own.fullmatches(path):
            return value
    return default


class _Fields(Values):
    """One configuration's raw fields, checked and turned into a PeftConfig."""

    def config(self) -> PeftConfig:
        refused = list(self._refused())
        if refused:
            raise UnsupportedAdapterError(
                f"{self.where} asks for what lorafx does not do:\n"
                + "\n".join(f"  - {line}" for line in refused)
            )
        layers = self.values.get("layers_to_transform")
        config = PeftConfig(
            r=self._rank("r", self.values["r"]) if "r" in self.values else None,
            lora_alpha=self._alpha("lora_alpha", self.values.get("lora_alpha", 8)),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            bias=self._bias(),
            rank_pattern=self._patterns("rank_pattern", self._rank),
            alpha_pattern=self._patterns("alpha_pattern", self._alpha),
            target_modules=self._names("target_modules"),
            target_parameters=self._parameters(),
            exclude_modules=self._names("exclude_modules") or None,
            layers_to_transform=None if is_off(layers) else self._layers(layers),
            layers_pattern=self._layer_names(),
            modules_to_save=self._endings("modules_to_save"),
            ensure_weight_tying=self._flag("ensure_weight_tying"),
            trainable_token_indices=self._tokens("trainable_token_indices"),
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            invocation=self._token_ids("alora_invocation_tokens"),
            block_diagonal=self._block_diagonal(),
            base_model=self._text("base_model_name_or_path"),
            peft_version=_version(self.values.get("peft_version")),
        )
        if self.malformed:
            raise CheckpointError(
                f"{self.where} is malformed:\n" + "\n".join(f"  - {m}" for m in self.malformed)
            )
        return config

    def _block_diagonal(self) -> BlockDiagonal | None:
        found = block_diagonal(self.values.get("use_bdlora"))
        if isinstance(found, str):
            self.malformed.append(found)
            return None
        return found

    def _bias(self) -> str:
        bias = self.values.get("bias", "none")
        if isinstance(bias, str) and bias in ("none", "lora_only", "all"):
            return bias
        if not is_off(bias):
            self.malformed.append(f"bias must be none, lora_only or all, not {short(bias)}")
        return "none"

    def _refused(self) -> Iterable[str]:
        kind = self.values.get("peft_type")
        kind = getattr(kind, "value", kind)
        if not (kind is None or (isinstance(kind, str) and kind == "LORA")):
            yield f"peft_type = {short(kind)}: {method(kind)}"
            return  # another type's fields have meanings of their own
        init = self.values.get("init_lora_weights", True)
        plain = isinstance(init, str) and init.lower() in _PLAIN_INITS
        if not (init is None or isinstance(init, bool) or plain):
            yield f"init_lora_weights = {short(init)}: {initialisation(init)}"
        for name, way_out in _REFUSED.items():
            value = self.values.get(name)
            off = value is None or value is False if name in _OBJECTS else is_off(value)
            if not off:
                yield f"{name} = {short(value)}: {way_out}"
        if not is_off(self.values.get("alora_invocation_tokens")):
            others = [name for name in _NOT_WITH_ALORA if not is_off(self.values.get(name))]
            if self.values.get("bias", "none") not in ("none", None):
                others.append("bias")
            for name in others:
                yield (
                    f"{name} = {short(self.values[name])} with alora_invocation_tokens: PEFT "
                    "trains no such aLoRA adapter, or applies this to all tokens; train it without"
                )
        for name in sorted(set(self.values) - _READ - _NO_ARITHMETIC - set(_REFUSED)):
            if not is_off(self.values[name]):
                yield (
                    f"{name} = {short(self.values[name])}: unknown field, which may change the "
                    "arithmetic; remove it if it does not, or upgrade lorafx"
                )


def _version(value: Any) -> tuple[int, ...] | None:
    """(0, 19) of "0.19.1.dev0"."""
    found = re.match(
        r"([0-9]{1,6})\.([0-9]{1,6})(?![0-9])", value if isinstance(value, str) else ""
    )
    return None if found is None else (int(found[1]), int(found[2]))

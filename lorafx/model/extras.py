"""What an adapter may have at a module beside its factors: DoRA, biases, rows of the weight.

    y ← y + s·b              PEFT's lora_bias=True: b is lora_B's
    y ← y + b' − b           bias="lora_only", "all": b' is the adapter's, b the base's

`modules_to_save` names modules that were trained as a whole: all rows are the adapter's.
`trainable_tokens` bounds the trained rows of an embedding, and of what is tied to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lorafx.errors import ConfigError
from lorafx.model import targets
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.quantized import is_stored, readable
from lorafx.model.sites import Site
from lorafx.registry import Eligible, lookup

#: Batches in which a graph refuses a site.
When = Literal["always", "mixed", "dora", "own", "bias"]
#: Kinds of modules whose weight may differ between rows.
OWN_KINDS = ("linear", "embedding")
_STORED = "its weight is quantised"


def own_refusal(site: Site) -> str | None:
    """Why an adapter cannot replace rows of the site's weight, or None where it can."""
    return structure_refusal(site) or (_STORED if is_stored(site.module, site.eligible) else None)


def structure_refusal(site: Site) -> str | None:
    """Why an adapter cannot change the site's weight by a structure (`ChangedWeight`), or None
    where it can."""
    entry = site.eligible
    if site.expert_weight is not None:
        return "it holds routed experts"
    if reason := class_refusal(entry):
        return reason
    if len(site.parts) > 1:
        return "it packs several projections"
    return _STORED if entry.kind != "linear" and is_stored(site.module, entry) else None


def class_refusal(entry: Eligible) -> str | None:
    """Why no module with this entry can have another weight for each row, or None."""
    if entry.kind not in OWN_KINDS:
        return "only linears and embeddings have another weight for each row"
    if entry.inner:
        return "its forward does more than multiply by this weight"
    if entry.handler is not None:
        return "a registered handler says what its call computes, but not with another weight"
    return None if entry.sharding is None else "its weight is one rank's share"


def dora_refusal(site: Site) -> str | None:
    """Why DoRA adapters cannot have factors at `site`, or None where they can."""
    entry = site.eligible
    if site.expert_weight is not None:
        return "the weight of each routed expert would have its own norms, which is not supported"
    if entry.handler is not None:
        return (
            "a registered handler says where the delta goes, but not what DoRA's scale applies to"
        )
    shared = entry.sharding is not None and entry.sharding.product(site.module) is not site.module
    if shared and getattr(site.module, "bias", None) is not None:
        return "several ranks share it, and its bias is added inside the rank's own product"
    if not readable(site.module, entry):
        return (
            "DoRA needs the norm of its base weight, which is in a format that lorafx "
            "cannot read; see lorafx.register(dequantize=...)"
        )
    return None


def replaceable_rows(
    modules_to_save: targets.Entries, trainable_tokens: Mapping[str, int], paths: Sequence[str]
) -> int | None:
    """How many rows an adapter may replace in the module at `paths`; None for all of them."""
    with_parents = [parent for path in paths for parent in _with_parents(path)]
    if isinstance(modules_to_save, targets.SavedTargets):  # full paths
        named = not modules_to_save.as_set.isdisjoint(with_parents)
    else:
        named = targets.names(modules_to_save, with_parents)
    if named:
        return None
    counts = (count for name, count in trainable_tokens.items() if targets.names((name,), paths))
    return max(counts, default=0)


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def token_rooms(room: int | Mapping[str, int], model: nn.Module) -> dict[str, int]:
    """Room for trained tokens by module path, tied modules included. A number is for the input
    embedding. ConfigError for an invalid number, or a model without `get_input_embeddings`."""
    if not room:
        return {}
    graph = ModuleGraph(model)
    if not isinstance(room, Mapping):
        embedding = targets.input_embedding(model)
        if embedding is None or not graph.has(embedding):
            raise ConfigError(
                f"LoraConfig(trainable_tokens={room!r}): {type(model).__name__} does not tell its "
                "input embedding; give {name of the module: number}"
            )
        room = {graph.paths(embedding)[0]: room}
    rooms: dict[str, int] = {}
    for name, count in room.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(
                f"LoraConfig(trainable_tokens=...): {name!r} has room for {count!r} rows; give a "
                "positive integer"
            )
        module = graph.find(name)
        tied = [] if module is None else tied_paths(graph, module)
        for path in (name, *tied):
            rooms[path] = max(count, rooms.get(path, 0))
    return rooms


def is_input_embedding(graph: ModuleGraph, path: str, module: nn.Module) -> bool:
    """Whether `module` is the input embedding of the outermost module that has one."""
    parents = reversed([*_with_parents(path.rpartition(".")[0])])
    candidates = (graph.root, *map(graph.find, parents))
    embeddings = (targets.input_embedding(parent) for parent in candidates if parent is not None)
    return next((item for item in embeddings if item is not None), None) is module


def tied_paths(graph: ModuleGraph, module: nn.Module) -> list[str]:
    entry = lookup(module)
    weight = None if entry is None else getattr(module, entry.weight, None)
    if weight is None:
        return []
    holders = graph.holders(weight)
    return [h.path for h in holders if h.module is not module and lookup(h.module) is not None]


#: Kinds of modules that have biases at all.
BIAS_KINDS = ("linear", "conv")


def bias_refusal(site: Site) -> str | None:
    """Why adapters cannot have biases at `site`, or None where they can."""
    entry = site.eligible
    if entry.kind not in BIAS_KINDS:
        return "only linears and convolutions have one"
    if entry.inner:
        return "PEFT leaves it out there"
    if entry.handler is not None:
        return "a registered handler says where the delta goes, but not a bias"
    if entry.sharding is not None:
        return "several ranks share it"
    return None


class Extra(NamedTuple):
    """What an adapter may have beside its factors.

    Attributes:
        room: the bank's table for it, allocated by the `setting` of LoraConfig.
        what: its name in messages.
        unapplied: the reason of a graph's refusal; {} stands for the sites.
        training: what PEFT trains it by.
        refusal: why a site cannot have it, or None.
    """

    room: str
    setting: str
    what: str
    unapplied: str
    training: str
    refusal: Callable[[Site], str | None]


#: By the batches that a graph refuses for it (`Refusal.when`).
EXTRAS: Mapping[When, Extra] = {
    "dora": Extra(
        "gains", "use_dora=True", "DoRA", "DoRA cannot be applied at {}", "use_dora", dora_refusal
    ),
    "own": Extra(
        "own",
        "modules_to_save=...",
        "a weight of an adapter's own",
        "the weight that an adapter has of its own for {} cannot be applied",
        "the module in its target_modules or modules_to_save",
        own_refusal,
    ),
    "bias": Extra(
        "shifts",
        "lora_bias=True",
        "a bias of an adapter's",
        "the bias that an adapter adds at {} cannot be applied",
        "lora_bias and bias",
        bias_refusal,
    ),
}


def bias_of(site: Site) -> Tensor | None:
    """The base's current bias, a parameter or a buffer; None if there is none."""
    bias = getattr(site.module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None

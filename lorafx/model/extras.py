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
from lorafx.registry import lookup

#: Batches in which a graph refuses a site.
When = Literal["always", "mixed", "dora", "own", "bias"]
#: Kinds of modules that may have another weight for each row.
OWN_KINDS = ("linear", "embedding")


def own_refusal(site: Site) -> str | None:
    """Why an adapter cannot replace rows of the site's weight, or None where it can."""
    entry = site.eligible
    if site.expert_weight is not None:
        return "it holds routed experts"
    if entry.kind not in OWN_KINDS:
        return "only linears and embeddings have another weight for each row"
    if entry.inner:
        return "its forward does more than multiply by this weight"
    if entry.handler is not None:
        return "a registered handler says what its call computes, but not with another weight"
    if entry.sharding is not None:
        return "its weight is one rank's share"
    if len(site.parts) > 1:
        return "it packs several projections"
    if is_stored(site.module, entry):
        return "its weight is quantised"
    return None


def dora_refusal(site: Site) -> str | None:
    """Why DoRA adapters cannot have factors at `site`, if they cannot."""
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


def rows_asked(
    modules_to_save: targets.Entries, trainable_tokens: Mapping[str, int], paths: Sequence[str]
) -> int | None:
    """Rows that an adapter may replace at the module at `paths`, or around; None: all."""
    around = [above for path in paths for above in _with_parents(path)]
    if modules_to_save and targets.names(modules_to_save, around):
        return None
    rooms = (n for name, n in trainable_tokens.items() if targets.names((name,), paths))
    return max(rooms, default=0)


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def token_rooms(room: int | Mapping[str, int], model: nn.Module) -> dict[str, int]:
    """Room for trained tokens by module path: a number is for the input embedding; tied modules
    follow. ConfigError for no count, or where the model does not tell its input embedding."""
    if not room:
        return {}
    graph = ModuleGraph(model)
    if not isinstance(room, Mapping):
        embedding = _input_embedding(model)
        if embedding is None or not graph.has(embedding):
            raise ConfigError(
                f"LoraConfig(trainable_tokens={room!r}): {type(model).__name__} does not tell its "
                "input embedding; give {name of the module: number}"
            )
        room = {graph.paths(embedding)[0]: room}
    found: dict[str, int] = {}
    for name, count in room.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(
                f"LoraConfig(trainable_tokens=...): {name!r} has room for {count!r} rows; give a "
                "positive integer"
            )
        module = graph.find(name)
        same = [name] if module is None else [name, *tied_paths(graph, module)]
        for path in same:
            found[path] = max(count, found.get(path, 0))
    return found


def _input_embedding(module: nn.Module) -> nn.Module | None:
    ask = getattr(module, "get_input_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def is_input_embedding(graph: ModuleGraph, path: str, module: nn.Module) -> bool:
    """Whether `module` is the input embedding of the outermost module that has one."""
    parents = reversed([*_with_parents(path.rpartition(".")[0])])
    around = [graph.root, *map(graph.find, parents)]
    embeddings = (_input_embedding(parent) for parent in around if parent is not None)
    return next((found for found in embeddings if found is not None), None) is module


def tied_paths(graph: ModuleGraph, module: nn.Module) -> list[str]:
    entry = lookup(module)
    weight = None if entry is None else getattr(module, entry.weight, None)
    if weight is None:
        return []
    owners = graph.owners(weight)
    return [path for path, other, _ in owners if other is not module and lookup(other) is not None]


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
        room: the bank's table for it, which is there with the `setting` of LoraConfig.
        what: what messages call it.
        unapplied: what a graph that refuses it says, of the sites {}.
        training: PEFT's setting that gives an adapter some.
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
        "modules_to_save",
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
    """The base's present bias, a parameter or a buffer; None where there is none."""
    bias = getattr(site.module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None

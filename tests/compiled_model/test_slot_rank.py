"""Slots smaller than the largest rank: an adapter of a larger one takes several in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, check_mixed, random_base, save_adapter
from sums import SumCase
from toolchain import needs_compiler

import lorafx
from lorafx.adapter_store.names import one_name
from lorafx.errors import CapacityError, ConfigError

pytestmark = pytest.mark.any_sizes

RANKS = {"small 0": 2, "small 1": 3, "small 2": 4, "middle": 7, "large": 16}
SLOTS = 4
IDS = {"input_ids": torch.arange(24).view(4, 6)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Llama of one layer with adapters of unequal ranks, two of them on the embedding too."""
    base = random_base("llama")
    folder = tmp_path_factory.mktemp("ranks")
    folders: dict[str, Path] = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        targets = ["q_proj", "k_proj", "down_proj", *(["embed_tokens"] if seed % 2 else [])]
        folders[name] = save_adapter(base, folder / name, rank=rank, targets=targets, seed=seed)
    return Case(base, folders)


def compiled(case: Case, options: Any = REFERENCE, **config: Any) -> Any:
    """For batches of the sizes of `IDS`."""
    settings = {"max_adapters": SLOTS, "max_rank": 16, "slot_rank": 4, **config}
    return lorafx.compile(
        case.model(),
        lorafx.LoraConfig(**settings),
        adapters=case.folders,
        options=options,
        dynamic=False,
    )


@pytest.fixture(scope="module")
def served(case: Case) -> Any:
    """One compiled model for tests that leave its adapters as they are."""
    return compiled(case)


def batches() -> Iterator[Sequence[str | None]]:
    """The largest with as many small ones as there are other slots; then those of two slots."""
    yield ["large", "small 0", "small 1", "small 2"]
    yield ["middle", None, "small 2", "middle"]
    yield ["small 1", "large", "small 0", None]
    yield ["small 0", "middle", "small 0", "large"]


@pytest.mark.parametrize(
    "options",
    [REFERENCE, pytest.param({"lowering": "inductor"}, marks=needs_compiler)],
    ids=["reference", "generated kernels"],
)
@pytest.mark.usefixtures("node_by_node")
def test_mixed_batches_are_dense_merge_and_make_no_graph(
    case: Case, served: Any, options: Any
) -> None:
    cm = served if options is REFERENCE else compiled(case, options)
    evictions, before = cm.stats().evictions, None
    for names in batches():
        check_mixed(cm, case, names, IDS)
        before = cm.recompiles if before is None else before
        assert cm.recompiles == before
    assert cm.stats().evictions > evictions


def test_generate_with_a_cache(in_eager_mode: None, case: Case) -> None:
    names = ["large", None, "small 1", "small 0"]
    got = compiled(case).generate(**IDS, adapter_names=names, max_new_tokens=3, do_sample=False)
    for row, name in enumerate(names):
        own = {"input_ids": IDS["input_ids"][row : row + 1]}
        want = case.alone(name).generate(**own, max_new_tokens=3, do_sample=False)
        assert torch.equal(got[row : row + 1], want)


def test_memory_is_that_of_the_ranks(case: Case) -> None:
    """The rows of 64 adapters of rank 8 and one of rank 256."""

    def factors(**config: Any) -> int:
        groups = lorafx.compile(case.model(), lorafx.LoraConfig(**config))._session.program.groups
        return sum(own.untyped_storage().nbytes() for g in groups for own in (g.bank.A, g.bank.B))

    of_one = factors(max_adapters=1, max_rank=1, target_modules=["q_proj", "embed_tokens"])
    paid = factors(
        max_adapters=65, max_rank=256, slot_rank=8, target_modules=["q_proj", "embed_tokens"]
    )
    assert paid == (64 * 8 + 256) * of_one


def test_a_batch_that_does_not_fit_names_the_way_out(case: Case) -> None:
    cm = compiled(case, max_adapters=3)
    with pytest.raises(CapacityError, match=r"take 4 slots .*\(large 4, middle 2, small 0 1; "):
        cm(**IDS, adapter_names=["large", "middle", "small 0", None])
    check_mixed(cm, case, ["large", "middle", "large", None], IDS)


def test_waves(case: Case) -> None:
    cm = compiled(case, {**REFERENCE, "overflow": "waves"}, max_adapters=2)
    check_mixed(cm, case, ["large", "middle", "small 0", "small 1"], IDS)


def test_a_pinned_adapter_stays(case: Case) -> None:
    cm = compiled(case)
    cm.pin_adapter("middle")
    slot = cm._session.store.resident["middle"]
    for names in (["middle", "large", None, None], ["small 0", "large", "small 0", None]):
        check_mixed(cm, case, names, IDS)
        assert cm._session.store.resident["middle"] == slot


@pytest.mark.slow
def test_warmup_takes_no_more_slots_than_there_are(case: Case) -> None:
    """Of two slots a dummy takes both: afterwards calls with adapters capture nothing."""
    cm = compiled(case, max_adapters=2)
    cm.warmup(IDS, batch_sizes=(4,), generate=False)
    graphs = cm.recompiles
    check_mixed(cm, case, ["large", None, "small 0", "large"], IDS)
    assert cm.recompiles == graphs


def test_sums_take_the_slots_of_their_rank(case: Case) -> None:
    cm, merged = compiled(case), SumCase.of(case)
    both: Any = {"middle": 1.0, "small 2": 0.5}  # of rank 11, three of the four slots
    check_mixed(cm, merged, [both, "small 0", None, both], IDS)
    assert cm._session.store.resident.keys() == {"small 0", one_name(both, "adapter_names[0]")}
    check_mixed(cm, merged, ["middle", "small 0", None, "small 2"], IDS)


def test_a_slot_is_no_larger_than_the_largest_rank() -> None:
    with pytest.raises(ConfigError, match="slot_rank = 32 is over max_rank = 16"):
        lorafx.LoraConfig(slot_rank=32)
    with pytest.raises(ConfigError, match="slot_rank must be a positive integer"):
        lorafx.LoraConfig(slot_rank=0)

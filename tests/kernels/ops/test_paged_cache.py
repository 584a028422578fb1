"""`lorafx::paged_cache` does what the allocators of transformers' paged cache do."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from transformers import Gemma3TextConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.distributed import DistributedHelper

from lorafx import ConfigError
from lorafx.generation.continuous.pages import StepCache
from lorafx.kernels.ops.paged_attention import PAGED_CACHE

pytestmark = pytest.mark.quick

FULL, SLIDING, HEADS, WIDTH = 1, 0, 2, 6


@pytest.fixture
def cache():
    """A cache of two layers, the first of which sees a window of six tokens."""
    config = Gemma3TextConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="sdpa",
    )
    asked = ContinuousBatchingConfig(
        page_size=4, num_blocks=16, max_batch_tokens=16, max_requests_per_batch=4
    )
    asked.max_blocks_per_request, asked.max_memory_percent = 0, 0.1
    helper = DistributedHelper(device_mesh=None, cpu_group_timeout=None, tp_plan={})
    made = PagedAttentionCache(config, asked, torch.device("cpu"), helper, torch.float32)
    torch.manual_seed(0)
    made.cache_tensor.view(torch.float32).normal_()
    return made


def arguments(cache, layer, past, new):
    """Keys and values of `new` tokens of a request with `past` others, and the rows they go to."""
    allocator = cache.layer_to_allocator[layer]
    for _ in range(4):
        allocator.pool.allocate_sector(allocator.index)
    allocator.allocate_cache_to_request("r", 0, past + new)
    read = torch.tensor(allocator.get_read_indices("r", past, new))
    write = torch.tensor(allocator.get_write_indices("r", past, new))
    key, value = torch.randn(2, 1, HEADS, new, WIDTH)
    return key, value, read, write


@pytest.mark.parametrize("layer", [FULL, SLIDING])
@pytest.mark.parametrize(("past", "new"), [(0, 3), (5, 1), (3, 4), (2, 7)])
@pytest.mark.parametrize("reads", [True, False])
def test_as_the_allocator(cache, layer, past, new, reads):
    if not reads and past:
        pytest.skip("transformers reads where there is something to read")
    key, value, read, write = arguments(cache, layer, past, new)
    read = read if reads else read[:0]
    step = StepCache(cache).step([read] * 2, [write] * 2)
    step.pages = cache.cache_tensor.clone()
    got = step.update(key, value, layer, {})
    plain = [states.squeeze(0).transpose(0, 1) for states in (key, value)]
    want = cache.layer_to_allocator[layer].update(*plain, layer, read, write)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs.transpose(0, 1).unsqueeze(0))
    assert torch.equal(step.pages, cache.cache_tensor)


@pytest.mark.parametrize("layer", [FULL, SLIDING])
def test_opcheck(cache, layer):
    key, value, read, write = arguments(cache, layer, 3, 4)
    place = StepCache(cache).places[layer]
    pages = cache.cache_tensor.clone()
    where = place.first_key, place.first_value, place.sentinel, place.ring
    opcheck(PAGED_CACHE, (key, value, pages, read, write, *where))


def test_an_allocator_of_another_kind(cache):
    class Own(FullAttentionCacheAllocator):
        def update(self, *args, **kwargs):
            return super().update(*args, **kwargs)

    cache.layer_to_allocator[FULL].__class__ = Own
    with pytest.raises(ConfigError, match=r"layer 1 keeps its cache by a .*Own.*generate\(\)"):
        StepCache(cache)

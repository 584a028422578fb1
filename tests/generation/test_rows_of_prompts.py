"""Inside of `generate` each row has the adapter of the prompt that it comes from, wherever the code
that runs puts it; or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, Case, case_by_targets, random_base
from tiny import randomise
from torch import Tensor
from transformers import (
    DiaConfig,
    DiaForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    JanusConfig,
    JanusForConditionalGeneration,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lorafx
from lorafx.eager.following import running
from lorafx.errors import BatchError

pytestmark = pytest.mark.any_sizes

NAMES = ["a", None, "b"]
FIXED = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "max_new_tokens": 3}


def case_of(model: torch.nn.Module, folder: Any, **patterns: str) -> Case:
    model.eval().requires_grad_(False)
    randomise(model)
    return case_by_targets(model, folder, patterns)


def wanted(case: Case, inputs: dict[str, Tensor], names: Any, **kwargs: Any) -> list[Tensor]:
    """Of each row, alone, by its merged model; at least two are not the base's."""
    found, differ = [], 0
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        found.append(case.alone(name).generate(**one, **kwargs))
        differ += not torch.equal(found[-1], case.base.generate(**one, **kwargs))
    assert differ >= 2
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = random_base("llama")
    patterns = {"a": r".*(q_proj|down_proj|lm_head)", "b": r".*(v_proj|up_proj|lm_head)"}
    return case_by_targets(base, tmp_path_factory.mktemp("rows"), patterns)


@pytest.fixture(scope="module")
def served(llama):
    return llama.compile({"start": "eager"})


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def on_both_roads(request, llama, served):
    return served if request.param == "eager" else llama.compile()


def prompts(rows: int = 3, length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def steps(
    model: Any, ids: Tensor, change: Callable[[Tensor], Tensor] = lambda ids: ids, new: int = 2
) -> Tensor:
    """The prompts, changed, and what is generated for them, by code that transformers does not
    know."""
    ids, cache = change(ids), None
    for _ in range(new):
        output = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache)
        cache = output.past_key_values
        ids = torch.cat([ids, output.logits[:, -1].argmax(-1)[:, None]], 1)
    return ids


def custom(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda model, input_ids, **_: steps(model, input_ids, change)


def interleaved(ids: Tensor) -> Tensor:
    return torch.stack([ids, ids.flip(1)], 1).flatten(0, 1)


@pytest.mark.parametrize(
    ("change", "owners"),
    [
        (lambda ids: torch.cat([ids, ids.flip(1)]), [0, 1, 2, 0, 1, 2]),
        (interleaved, [0, 0, 1, 1, 2, 2]),
        (lambda ids: ids[torch.arange(len(ids)).roll(1)], [2, 0, 1]),
        (lambda ids: ids.flip(0), [2, 1, 0]),
        (lambda ids: ids[1:], [1, 2]),
        (lambda ids: ids[ids[:, 0].argsort()], None),
        (lambda ids: ids.repeat_interleave(2, 0), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["cat", "stacked", "indexed", "flipped", "dropped", "sorted", "repeated"],
)
def test_rows_that_a_custom_loop_stacks_or_moves_keep_their_prompts_adapters(
    llama, on_both_roads, change, owners
):
    ids = prompts()["input_ids"]
    if owners is None:
        owners = ids[:, 0].argsort().tolist()
    call = {**FIXED, "custom_generate": custom(change)}
    got = on_both_roads.generate(ids, **call, adapter_names=NAMES)
    start = change(ids)
    for row, owner in enumerate(owners):
        want = steps(llama.alone(NAMES[owner]), start[row : row + 1])
        assert torch.equal(got[row : row + 1], want), row
    if len(start) == 6:
        assert not torch.equal(got, steps(llama.base, start))


def test_rows_that_pass_through_lists_are_refused(served):
    def of_lists(ids: Tensor) -> Tensor:
        return torch.tensor(sorted(ids.tolist()))

    call = {**FIXED, "custom_generate": custom(of_lists)}
    inputs = prompts()["input_ids"]
    with pytest.raises(BatchError, match=r"it is not known from which prompts input_ids \(3, 5\)"):
        served.generate(inputs, **call, adapter_names=NAMES)
    for names in (["a"] * 3, ["a"]):  # nothing is to be proved
        served.generate(inputs[: len(names)], **call, adapter_names=names)


def test_rows_of_which_arguments_say_different_things_are_refused(served):
    def loop(model: Any, input_ids: Tensor, **_: Any) -> Any:
        cache = model(input_ids=input_ids).past_key_values
        return model(input_ids=input_ids[:, -1:].flip(0), past_key_values=cache).logits

    with pytest.raises(BatchError, match=r"name different prompts for a row: input_ids \[2, 1, 0"):
        served.generate(prompts()["input_ids"], **FIXED, custom_generate=loop, adapter_names=NAMES)


def test_rows_that_a_loop_drops_on_its_way(llama, served):
    """As soon as the second prompt's row has ended, its keys are dropped, too."""

    def loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        output = model(input_ids=input_ids)
        kept, cache = torch.arange(0, 3, 2), output.past_key_values
        tokens = output.logits[:, -1].argmax(-1)[kept]
        cache.batch_select_indices(kept)
        last = model(input_ids=tokens[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        return torch.stack([tokens, last], 1)

    ids = prompts()["input_ids"]
    got = served.generate(ids, **FIXED, custom_generate=loop, adapter_names=NAMES)
    for row, owner in enumerate((0, 2)):
        want = steps(llama.alone(NAMES[owner]), ids[owner : owner + 1])[:, -2:]
        assert torch.equal(got[row : row + 1], want)


@pytest.mark.parametrize(
    "on_both_roads", ["eager", pytest.param("compiled", marks=pytest.mark.slow)], indirect=True
)
def test_a_loop_of_its_own_around_that_of_transformers(llama, on_both_roads):
    """What a loop of transformers returned is followed where code goes on with it."""

    def twice(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        def go_on(ids: Tensor) -> Tensor:
            fixed = {**FIXED, "max_new_tokens": 2, "attention_mask": torch.ones_like(ids)}
            return GenerationMixin.generate(model, ids, **fixed)

        return go_on(go_on(input_ids).flip(0))

    ids = prompts()["input_ids"]
    got = on_both_roads.generate(ids, **FIXED, custom_generate=twice, adapter_names=NAMES)
    for row, owner in enumerate((2, 1, 0)):
        one = ids[owner : owner + 1]
        want = llama.alone(NAMES[owner]).generate(one, **{**FIXED, "max_new_tokens": 4})
        assert torch.equal(got[row : row + 1], want)


def test_guidance_by_negative_prompts(llama, served):
    """Its processor calls the model by itself, at each step."""
    inputs, negative = prompts(), prompts(4)["input_ids"][:3, :4]
    kwargs = {**FIXED, "guidance_scale": 2.0}
    for more in ({}, {"negative_prompt_ids": negative}):
        want = wanted(llama, {**inputs, **more}, NAMES, **kwargs)
        got = served.generate(**inputs, **more, **kwargs, adapter_names=NAMES)
        assert torch.equal(got, torch.cat(want))


def test_operators_are_followed_at_the_beginning_alone(served):
    """And under inference mode, whose tensors have no counts of writes."""

    modes: list[bool] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        modes.append(running() is not None)
        return scores

    with torch.inference_mode():
        served.generate(
            **prompts(),
            **{**FIXED, "max_new_tokens": 5},
            logits_processor=[look],
            adapter_names=NAMES,
        )
    assert modes == [True, False, False, False, False]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
        {"num_beams": 3, "num_beam_groups": 1, "use_cache": False},
        {"prefill_chunk_size": 2},
    ],
    ids=["lookup", "static-beams", "beams", "chunks"],
)
def test_transformers_own_loops(llama, served, kwargs):
    names = NAMES if "prompt_lookup_num_tokens" not in kwargs else ["a"]  # one prompt at a time
    inputs = {key: value[: len(names)] for key, value in prompts().items()}
    got = served.generate(**inputs, **FIXED, **kwargs, adapter_names=names)
    rows = [
        llama.alone(name).generate(
            **{key: value[row : row + 1] for key, value in inputs.items()}, **FIXED, **kwargs
        )
        for row, name in enumerate(names)
    ]
    assert torch.equal(got, torch.cat(rows))


def janus() -> torch.nn.Module:
    side = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 61, "intermediate_size": 24, **side}
    vision = {"image_size": 16, "patch_size": 4, "mlp_ratio": 2.0, "num_image_tokens": 16, **side}
    codes = {"embed_dim": 8, "num_embeddings": 32, "double_latent": False, "num_patches": 4}
    codes |= {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1]}
    codes |= {"num_res_blocks": 1, "image_token_embed_dim": 16, "num_hidden_layers": 1}
    config = JanusConfig(
        text_config={**text, "num_key_value_heads": 2},
        vision_config={**vision, "projection_dim": 16},
        vq_config={**codes, "projection_dim": 16},
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    return model


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_an_images_rows_with_and_without_its_prompt(tmp_path, start):
    """Janus stacks rows of which only the beginning of the prompt is left behind those with it, and
    calls parts of the model one by one."""
    case = case_of(
        janus(),
        tmp_path,
        a=r".*language_model.*(q_proj|down_proj)",
        b=r".*(language_model.*v_proj|generation_head.*|generation_aligner.*)",
    )
    kwargs = {"generation_mode": "image", "do_sample": False, "max_length": 60}
    kwargs |= {"bos_token_id": 1, "pad_token_id": 0}
    got = case.compile({"start": start}).generate(**prompts(), **kwargs, adapter_names=NAMES)
    assert torch.equal(got, torch.cat(wanted(case, prompts(), NAMES, **kwargs)))


def test_speech_with_guidance(tmp_path):
    """Dia's encoder takes zeros behind the prompts; the mask says whose they are, if there is
    one."""
    side = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    side |= {"num_key_value_heads": 2, "intermediate_size": 24}
    cross = {"cross_num_attention_heads": 2, "cross_num_key_value_heads": 2, "cross_head_dim": 8}
    config = DiaConfig(
        encoder_config={**side, "vocab_size": 61},
        decoder_config={**side, **cross, "cross_hidden_size": 16},
    )
    model = DiaForConditionalGeneration(config)
    case = case_of(model, tmp_path, a=r".*decoder.*(q_proj|down_proj)", b=r".*(v_proj|q_proj)")
    cm, inputs = case.compile({"start": "eager"}), prompts()
    kwargs = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    for scale in (None, 3.0):
        kwargs["guidance_scale"] = scale
        got = cm.generate(**inputs, **kwargs, adapter_names=NAMES)
        assert torch.equal(got, torch.cat(wanted(case, inputs, NAMES, **kwargs)))
    with pytest.raises(BatchError, match="no argument says from which prompt row 3 comes"):
        cm.generate(inputs["input_ids"], **kwargs, adapter_names=NAMES)
    cm.generate(inputs["input_ids"], **kwargs, adapter_names=["b"] * 3)


def test_music_of_several_codebooks(tmp_path):
    """A request has a row for each codebook in one argument, and one row in another. That is
    refused."""
    side = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MusicgenConfig(
        text_encoder={
            **{"model_type": "t5", "vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24},
            **{"num_layers": 1, "num_heads": 2},
        },
        audio_encoder={
            **{"model_type": "encodec", "hidden_size": 16, "num_filters": 4, "codebook_dim": 16},
            **{"upsampling_ratios": [4, 2], "codebook_size": 32, "target_bandwidths": [10.0]},
            **{"sampling_rate": 8000},
        },
        decoder={**side, "vocab_size": 32, "num_codebooks": 2, "pad_token_id": 32},
    )
    model = MusicgenForConditionalGeneration(config)
    model.generation_config = GenerationConfig(decoder_start_token_id=32, pad_token_id=32)
    case = case_of(model, tmp_path, a=r"decoder.*(q_proj|fc1)", b=r"text_encoder.*\.(q|wi)")
    cm = case.compile({"start": "eager"})
    for scale in (1.0, 3.0):
        kwargs = {"do_sample": False, "max_new_tokens": 4, "guidance_scale": scale}
        with pytest.raises(BatchError, match=r"by generate\(\) for 3 prompts"):
            cm.generate(**prompts(), **kwargs, adapter_names=NAMES)
        got = cm.generate(**prompts(), **kwargs, adapter_names=["a"] * 3)
        assert torch.equal(got, case.alone("a").generate(**prompts(), **kwargs))


@pytest.mark.usefixtures("road")
def test_long_speech_whose_rows_end_at_different_times(tmp_path):
    """Whisper goes on with the rows that have not ended, and may generate for some once more. What
    a row says depends on the others there, so all of them run on one merged model."""
    side = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    none = {"suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None}
    ends = {"pad_token_id": 50, "bos_token_id": 51, "eos_token_id": 50}
    ends |= {"decoder_start_token_id": 51, **none}
    config = WhisperConfig(
        **side, **ends, vocab_size=100, d_model=16, num_mel_bins=8, max_source_positions=20,
        max_target_positions=40,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    settings = GenerationConfig(**ends, max_length=20, return_timestamps=True)
    settings.no_timestamps_token_id, settings.is_multilingual = 60, False
    settings.max_initial_timestamp_index = 5
    model.generation_config = settings
    case = case_of(model, tmp_path, a=r".*decoder.*(q_proj|fc1)", b=r".*(v_proj|fc2)")
    roles = lorafx.LoraConfig(row_dims={"attention_mask": None}, max_adapters=2)
    cm = lorafx.compile(
        case.model(), roles, adapters=case.folders, options={**REFERENCE, "start": "eager"}
    )
    torch.manual_seed(0)
    inputs = {"input_features": torch.randn(3, 8, 160)}
    mask = torch.ones(3, 160, dtype=torch.long)
    mask[0, 50:] = mask[1, 90:] = 0
    kwargs = {"return_timestamps": True, "attention_mask": mask}
    got = cm.generate(**inputs, **kwargs, adapter_names=NAMES)
    base = case.base.generate(**inputs, **kwargs)
    for row, name in enumerate(NAMES):
        want = case.alone(name).generate(**inputs, **kwargs)[row]
        length = min(len(want), got.shape[1])
        assert torch.equal(got[row, :length], want[:length])
        assert (name is None) == torch.equal(want[:length], base[row, :length])
    retried = {"temperature": (0.0, 0.8), "logprob_threshold": -3.5}
    cm.generate(**inputs, **kwargs, **retried, adapter_names=NAMES)
    with pytest.raises(BatchError, match=r"LoraConfig\(row_dims="):
        case.compile({"start": "eager"}).generate(**inputs, **kwargs, adapter_names=NAMES)

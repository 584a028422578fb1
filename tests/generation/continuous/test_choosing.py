"""What requests ask of their tokens: each is answered as by a loop over its row alone."""

from __future__ import annotations

import copy
import math
import random
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from step_logits import answers, greedy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from waiting import LONG

import lorafx
from lorafx import ConfigError
from lorafx.generation.continuous.adapter_requests import SequenceOutput, fork_names

pytestmark = pytest.mark.usefixtures("earlier_objects_frozen", "in_eager_mode")
PAGES = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
CONFIG = ContinuousBatchingConfig(**PAGES, per_request_processors=True)
EOS = 2


def letters(*words: str) -> PreTrainedTokenizerFast:
    """Each letter is a token, from 4 on; 3 is a space, and what is below has no text. The `words`
    are the last of the 61 tokens."""
    vocabulary = ["<pad>", "<s>", "</s>", " ", *string.ascii_letters, *"0123456789"][:61]
    vocabulary[61 - len(words) :] = words
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


LETTERS = letters()


class Odd:
    """A grammar of odd tokens, `most` of them. It counts what it was given, as matchers do."""

    def __init__(self, most: int = 100) -> None:
        self.most, self.known = most, [*range(0)]

    def bitmask(self, generated: Sequence[int]) -> torch.Tensor:
        assert self.known == generated[: len(self.known)]
        self.known = [*generated]
        return torch.arange(59) % 2 == 1  # fewer than the model has

    def ended(self, generated: Sequence[int]) -> bool:
        return len(generated) >= self.most


class Raising(Odd):
    def bitmask(self, generated: Sequence[int]) -> torch.Tensor:
        if generated:
            raise RuntimeError("no such rule")
        return torch.ones(61, dtype=torch.bool)


class Nothing(Odd):
    def bitmask(self, generated: Sequence[int]) -> torch.Tensor:
        return torch.zeros(61, dtype=torch.bool)


class Alone(NamedTuple):
    """The answer to one sequence by itself; `logprobs` (tokens, vocabulary) are those of the
    model, `chosen` those of the tokens as they were chosen."""

    tokens: list[int]
    logprobs: torch.Tensor
    finish_reason: str
    stop_reason: int | str | None
    chosen: Sequence[float] = ()


def alone(
    case: Case,
    adapter: str | None,
    prompt: Sequence[int],
    asked: Mapping[str, Any],
    new: int = 6,
    sequence: int = 0,
) -> Alone:
    """What a loop over the row generates from the model with the adapter merged into it."""
    model: Any = case.alone(adapter)
    eos = [] if asked.get("ignore_eos") else [EOS]
    stops, ids = asked.get("stop", ()), asked.get("stop_token_ids", ())
    tokens: list[int] = []
    rows, shares = [], list[float]()
    while len(tokens) < new:
        with torch.no_grad():
            row = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
        rows.append(row.log_softmax(-1))
        row = changed(row.clone(), prompt, tokens, asked, [*eos, *ids])
        token, logprob = chosen(row, tokens, asked, sequence)
        tokens.append(token)
        shares.append(logprob)
        text, before = str(LETTERS.decode(tokens, True)), str(LETTERS.decode(tokens[:-1], True))
        found: list[Any] = [token for token in ids if token == tokens[-1]]
        if len(tokens) > asked.get("min_tokens", 0) and text != before:
            found += sorted(filter(text.endswith, stops), key=len, reverse=True)
        if found or tokens[-1] in eos:
            reason = None if tokens[-1] in eos else found[0]
            return Alone(tokens, torch.stack(rows), "stop", reason, shares)
    logprobs = torch.stack(rows) if rows else torch.zeros(0)
    return Alone(tokens, logprobs, "length", None, shares)


def changed(
    row: torch.Tensor,
    prompt: Sequence[int],
    tokens: Sequence[int],
    asked: Mapping[str, Any],
    ends: Sequence[int],
) -> torch.Tensor:
    for token, number in asked.get("logit_bias", {}).items():
        row[token] += number
    for token in range(len(row)):
        if token in prompt or token in tokens:
            penalty = asked.get("repetition_penalty", 1.0)
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= asked.get("frequency_penalty", 0.0) * tokens.count(token)
        row[token] -= asked.get("presence_penalty", 0.0) * (token in tokens)
    for word in asked.get("bad_words", ()):
        text = str(LETTERS.decode(tokens))
        if text.endswith(word[:-1]):
            row[LETTERS.encode(word)[-1]] = -torch.inf
    if len(tokens) < asked.get("min_tokens", 0):
        row[[*ends]] = -torch.inf
    if "allowed_token_ids" in asked:
        row[[i for i in range(len(row)) if i not in asked["allowed_token_ids"]]] = -torch.inf
    if "grammar" in asked:
        row[59:] = -torch.inf
        row[:59][~Odd().bitmask([])] = -torch.inf
    return row


def chosen(
    row: torch.Tensor, tokens: Sequence[int], asked: Mapping[str, Any], sequence: int
) -> tuple[int, float]:
    temperature = asked.get("temperature", 0.0)
    if not temperature:
        return int(row.argmax()), float(row.log_softmax(-1).amax())
    scores: Any = row[None]
    for cls, name, neutral in (
        (TopKLogitsWarper, "top_k", 0),
        (TopPLogitsWarper, "top_p", 1.0),
        (MinPLogitsWarper, "min_p", 0.0),
    ):
        if cls is TopKLogitsWarper:
            scores = TemperatureLogitsWarper(temperature)(row[None], scores)
        if asked.get(name, neutral) != neutral:
            scores = cls(asked[name])(row[None], scores)
    number = random.Random(f"{asked['seed'] + sequence} {len(tokens)}").random()
    total = 0.0
    for token, share in enumerate(scores[0].double().softmax(-1).tolist()):
        total += share
        if total > number:
            return token, math.log(share)
    raise AssertionError("shares are less than 1")


@pytest.fixture(scope="module")
def engine(llama: Case) -> Iterator[Any]:
    """One whose requests take the likeliest token unless they say otherwise."""
    cm = llama.compile({"start": "eager"})
    with cm.continuous_batching(drawing(cm), CONFIG, warmup=False, tokenizer=LETTERS) as engine:
        yield engine


def drawing(cm: Any) -> Any:
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.do_sample, generation.temperature, generation.eos_token_id = True, 0.0, EOS
    return generation


def check(case: Case, output: Any, want: Alone, asked: Mapping[str, Any], name: Any) -> None:
    assert isinstance(output, SequenceOutput)
    assert output.error is None
    got = (output.generated_tokens, output.finish_reason, output.stop_reason)
    assert got == (want.tokens, want.finish_reason, want.stop_reason)
    assert len(output.logprobs) == len(want.chosen) * bool(asked.get("return_logprobs"))
    for got_one, one in zip(output.logprobs, want.chosen, strict=False):
        assert abs(got_one - one) <= TOLERANCE * max(1, abs(one))
    count = asked.get("logprobs", 0 if asked.get("return_logprobs") else None)
    if count is not None:
        check_logprobs(output.token_logprobs, want.logprobs, want.tokens, count)
    else:
        assert output.token_logprobs == []
    if asked.get("prompt_logprobs") is not None:
        first, *others = output.prompt_logprobs
        assert first is None
        prompt = output.prompt_ids
        with torch.no_grad():
            logits = case.alone(name)(input_ids=torch.tensor([prompt]))["logits"][0, :-1]
        rows = logits.float().log_softmax(-1)
        check_logprobs(others, rows, prompt[1:], asked["prompt_logprobs"])
    else:
        assert output.prompt_logprobs == []


def check_logprobs(got: Any, rows: torch.Tensor, tokens: Sequence[int], count: int) -> None:
    assert [each.token for each in got] == [*tokens]
    for each, row in zip(got, rows, strict=True):
        assert abs(each.logprob - float(row[each.token])) <= TOLERANCE
        assert each.rank == int((row > row[each.token]).sum()) + 1
        values, ids = row.topk(count)
        assert [token for token, _ in each.top] == ids.tolist()
        close = [abs(a - b) for (_, a), b in zip(each.top, values.tolist(), strict=True)]
        assert max(close, default=0.0) <= TOLERANCE


token = st.integers(3, 60)
letter = st.sampled_from(string.ascii_letters)
FIELDS: dict[str, Any] = {
    "drawn": st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.7, 3.0]), "seed": st.integers(-5, 5)},
        optional={
            "top_k": st.integers(1, 8),
            "top_p": st.sampled_from([0.3, 0.8]),
            "min_p": st.sampled_from([0.05, 0.4]),
        },
    ),
    "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
    "frequency_penalty": st.sampled_from([-1.0, 1.5]),
    "repetition_penalty": st.sampled_from([0.5, 1.3, 5.0]),
    "logit_bias": st.dictionaries(token, st.sampled_from([-100.0, 1.0, 3.0]), max_size=4),
    "bad_words": st.lists(st.text(letter, min_size=1, max_size=2), max_size=30),
    "allowed_token_ids": st.sampled_from([[*range(2, 50)], [*range(9, 61)]]),
    "min_tokens": st.integers(0, 6),
    "stop": st.lists(st.text(letter, min_size=1, max_size=2), max_size=20),
    "stop_token_ids": st.lists(token, max_size=20),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 4),
    "return_logprobs": st.booleans(),
    "prompt_logprobs": st.integers(0, 4),
    "grammar": st.builds(Odd),
}


@st.composite
def requests(draw: Any) -> list[tuple[list[int], str | None, dict[str, Any]]]:
    found = []
    for _ in range(draw(st.integers(1, 7))):
        asked = draw(st.fixed_dictionaries({}, optional=FIELDS))
        asked |= asked.pop("drawn", {})
        shared = [*range(7, 16)] * draw(st.booleans())
        prompt = shared + draw(st.lists(token, min_size=1, max_size=8))
        found.append((prompt, draw(st.sampled_from([None, "a1", "a3", "a4"])), asked))
    return found


@settings(max_examples=10, derandomize=True)
@given(work=requests())
def test_a_mix_of_requests_is_answered_as_each_alone(llama: Case, engine: Any, work: Any) -> None:
    with engine.pause():
        names = [
            engine.add_request(prompt, adapter=name, max_new_tokens=6, **copy.deepcopy(asked))
            for prompt, name, asked in work
        ]
    outputs = answers(engine, names)
    for output, (prompt, name, asked) in zip(outputs.values(), work, strict=True):
        check(llama, output, alone(llama, name, prompt, asked), asked, name)


DRAWN: dict[str, Any] = {"temperature": 2.0, "seed": 5, "logprobs": 1}


@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_sequences_of_a_request(llama, engine, length) -> None:
    """Each has a seed of its own, and shares the prompt, of which pages may be known already."""
    prompt = [*range(20, 20 + length)]
    for name, more in (("a1", {}), ("a1", {}), (None, {"prompt_logprobs": 1})):
        asked = {**DRAWN, **more, "grammar": Odd()}
        first = engine.add_request(prompt, adapter=name, max_new_tokens=5, n=3, **asked)
        names = [first, *fork_names(first, 2)]
        outputs = answers(engine, names)
        for i, key in enumerate(names):
            want = alone(llama, name, prompt, asked, 5, sequence=i)
            check(llama, outputs[key], want, asked, name)
    assert engine.batch_processor.cache.pool.num_free_sectors > 0
    assert not engine._outputs._names


def test_draws_follow_the_model(llama, engine) -> None:
    name = engine.add_request([9, 8, 7], adapter="a1", max_new_tokens=1, n=1000, temperature=1.0)
    names = [name, *fork_names(name, 999)]
    free = answers(engine, names)
    seeded = engine.add_request(
        [9, 8, 7], "seeded", adapter="a1", max_new_tokens=1, n=1000, temperature=1.0, seed=0
    )
    outputs = answers(engine, [seeded, *fork_names(seeded, 999)])
    with torch.no_grad():
        shares = llama.alone("a1")(input_ids=torch.tensor([[9, 8, 7]]))["logits"][0, -1].softmax(-1)
    for found in (free, outputs):
        counts = torch.zeros(61)
        for output in found.values():
            counts[output.generated_tokens[0]] += 1
        assert (counts / 1000 - shares).abs().max() < 0.06


@pytest.mark.parametrize("per_request", [False, True])
def test_the_logprobs_of_a_configuration_are_those_of_each_request(llama, cm, per_request) -> None:
    generation = drawing(cm)
    generation.temperature, generation.top_k, generation.top_p = 0.8, 7, 0.9
    config = ContinuousBatchingConfig(
        **PAGES, return_logprobs=True, per_request_processors=per_request
    )
    prompts, names = [[3, 4], [5, 6, 7]], ["a1", None]
    outputs = cm.generate_batch(prompts, names, generation, config, max_new_tokens=9)
    for prompt, name, output in zip(prompts, names, outputs.values(), strict=True):
        tokens = output.generated_tokens
        assert len(output.logprobs) == len(output.token_logprobs) == len(tokens) > 0
        with torch.no_grad():
            logits = llama.alone(name)(input_ids=torch.tensor([[*prompt, *tokens]]))["logits"]
        for row, token, as_drawn, raw in zip(
            logits[0, len(prompt) - 1 :],
            tokens,
            output.logprobs,
            output.token_logprobs,
            strict=False,
        ):
            assert abs(raw.logprob - float(row.log_softmax(-1)[token])) <= TOLERANCE
            scores: Any = TemperatureLogitsWarper(0.8)(row[None], row[None])
            for warper in (TopKLogitsWarper(7), TopPLogitsWarper(0.9)):
                scores = warper(row[None], scores)
            assert abs(as_drawn - float(scores[0].log_softmax(-1)[token])) <= TOLERANCE


def test_requests_that_are_begun_again(llama, cm) -> None:
    """The cache holds a few of them; what they have is kept, also what sequences have drawn."""
    small = ContinuousBatchingConfig(**{**PAGES, "num_blocks": 14}, per_request_processors=True)
    asked = {
        **DRAWN,
        "prompt_logprobs": 1,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "min_tokens": 9,
    }
    with cm.continuous_batching(drawing(cm), small, warmup=False, tokenizer=LETTERS) as engine:
        begun_again = 0
        offload = engine._processor.offloading_manager.offload_requests

        def counting() -> bool:
            nonlocal begun_again
            before = len(engine._processor.scheduler.waiting_requests)
            done = offload()
            begun_again += len(engine._processor.scheduler.waiting_requests) - before
            return bool(done)

        engine._processor.offloading_manager.offload_requests = counting
        work = []
        with engine.pause():
            for i in range(5):
                prompt, name = [*range(4 + i, 13 + i)], ("a1", None)[i % 2]
                grammar = Odd()
                key = engine.add_request(
                    prompt, adapter=name, max_new_tokens=12, n=2, grammar=grammar, **asked
                )
                work.append((key, prompt, name))
        names = [name for key, _, _ in work for name in (key, *fork_names(key, 1))]
        outputs = answers(engine, names)
    assert begun_again > 2
    for key, prompt, adapter in work:
        for i, name in enumerate((key, *fork_names(key, 1))):
            want = alone(llama, adapter, prompt, {**asked, "grammar": None}, 12, sequence=i)
            check(llama, outputs[name], want, asked, adapter)


def test_a_prompt_is_scored_without_generating(llama, engine) -> None:
    """Also where its pages are known, in chunks, and beside prompts that nobody scores; by the
    graphs of other steps."""
    prompt = [*range(5, 45)]
    answers(engine, [engine.add_request(prompt, adapter=None, max_new_tokens=2)])
    graphs = len(engine.forwards.session.records)
    for name in ("a1", "a1", None):
        with engine.pause():
            beside = engine.add_request(prompt, adapter=name, max_new_tokens=3)
            key = engine.add_request(prompt, adapter=name, max_new_tokens=0, prompt_logprobs=2)
        outputs = answers(engine, [beside, key])
        none = Alone([], torch.zeros(0), "length", None)
        check(llama, outputs[key], none, {"prompt_logprobs": 2}, name)
        assert [*prompt, *outputs[beside].generated_tokens] == greedy(llama, name, prompt, 3)
    assert len(engine.forwards.session.records) == graphs
    one = engine.add_request([5], adapter="a1", max_new_tokens=0, prompt_logprobs=2)
    assert answers(engine, [one])[one].prompt_logprobs == [None]


def test_a_prompt_is_scored_by_a_model_that_gives_all_logits(llama) -> None:
    model: Any = llama.model()
    model._supports_logits_to_keep = lambda: False
    cm = lorafx.compile(model, llama.folders, options=REFERENCE)
    with cm.continuous_batching(drawing(cm), CONFIG, warmup=False) as engine:
        prompt, asked = [*range(5, 30)], {"prompt_logprobs": 1, "logprobs": 0}
        with engine.pause():
            names = {
                engine.add_request(prompt, adapter=name, max_new_tokens=2, **asked): name
                for name in ("a1", None)
            }
        for key, output in answers(engine, [*names]).items():
            name = names[key]
            check(llama, output, alone(llama, name, prompt, asked, 2), asked, name)


def test_a_stop_ends_a_sequence_in_the_step_in_which_it_is_complete(llama, engine) -> None:
    prompt = [9, 8, 7]
    tokens = alone(llama, "a1", prompt, {"ignore_eos": True}, 12).tokens
    text = str(LETTERS.decode(tokens, True))
    for asked, count, reason in (
        ({"stop": text[2:5]}, 5, text[2:5]),
        ({"stop": ["?", text[2:5], text[3:5]]}, 5, text[2:5]),  # the one that begins first
        ({"stop_token_ids": [tokens[3]]}, tokens.index(tokens[3]) + 1, tokens[3]),
        ({"stop": "</s>", "logit_bias": {EOS: 100.0}}, 1, "</s>"),  # a token without text
    ):
        engine.add_request(
            prompt, adapter="a1", max_new_tokens=12, ignore_eos=True, streaming=True, **asked
        )
        pieces = []
        while not pieces or not pieces[-1].is_finished():
            pieces.append(engine.get_result(timeout=LONG))
        assert [len(piece.generated_tokens) for piece in pieces] == [*range(1, count + 1)]
        assert {piece.finish_reason for piece in pieces[:-1]} <= {None}
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", reason)
        processor = engine.batch_processor
        assert all(not own.block_table for own in processor.cache.cache_allocators.values())


def test_of_stops_within_one_token_the_first_counts(cm) -> None:
    tokenizer = letters("bcxb")
    asked = {"logit_bias": {60: 100.0}, "max_new_tokens": 3}
    with cm.continuous_batching(drawing(cm), CONFIG, warmup=False, tokenizer=tokenizer) as engine:
        for stop, reason in ((["b", "c"], "b"), (["x", "cx"], "cx"), (["bc", "b"], "bc")):
            key = engine.add_request([9, 8], adapter="a1", stop=stop, **asked)
            output = answers(engine, [key])[key]
            assert (output.generated_tokens, output.stop_reason) == ([60], reason)


def test_a_grammar_ends_its_sequence(engine) -> None:
    key = engine.add_request([9, 8], adapter="a1", max_new_tokens=9, grammar=Odd(3))
    output = answers(engine, [key])[key]
    assert (len(output.generated_tokens), output.finish_reason) == (3, "stop")
    assert output.stop_reason is None


def test_a_request_that_leaves_no_token_fails_alone(llama, engine) -> None:
    with engine.pause():
        bad = {
            engine.add_request([3, 4], adapter="a1", max_new_tokens=4, **asked): why
            for asked, why in (
                ({"grammar": Raising()}, "its grammar raised RuntimeError: no such rule"),
                ({"grammar": Nothing()}, "leave no token"),
                ({"grammar": Nothing(), "seed": 1, "temperature": 1.0}, "leave no token"),
                ({"bad_words": [*LETTERS.get_vocab()]}, "leave no token"),
                ({"allowed_token_ids": [EOS], "min_tokens": 1}, "leave no token"),
                ({"allowed_token_ids": [60], "grammar": Odd()}, "leave no token"),
            )
        }
        fine = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=4, logprobs=0)
        drawn = engine.add_request([3, 4, 5], adapter="a3", max_new_tokens=4, **DRAWN)
    outputs = answers(engine, [*bad, fine, drawn])
    for key, why in bad.items():
        assert why in outputs[key].error
        assert outputs[key].finish_reason is None
    want = alone(llama, "a1", [3, 4, 5], {}, 4)
    check(llama, outputs[fine], want, {"logprobs": 0}, "a1")
    check(llama, outputs[drawn], alone(llama, "a3", [3, 4, 5], DRAWN, 4), DRAWN, "a3")
    assert engine.unhealthy() is None


def test_an_adapter_that_overflows_fails_its_own_requests(llama, cm, tmp_path) -> None:
    """Also those whose prompts are scored, and what is asked of others is answered beside them."""
    shutil.copytree(llama.folders["a2"], tmp_path / "huge")
    asked = {**DRAWN, "prompt_logprobs": 0}
    weights = tmp_path / "huge" / "adapter_model.safetensors"
    save_file({name: t * 1e30 for name, t in load_file(weights).items()}, weights)
    cm.load_adapter(tmp_path / "huge", "huge")
    with cm.continuous_batching(drawing(cm), CONFIG, warmup=False, tokenizer=LETTERS) as engine:
        with engine.pause():
            names = ("a1", "huge", "a3", "huge", None)  # of which several parts are served
            work = [
                (engine.add_request([3 + i, 6, 7], adapter=name, max_new_tokens=i, **asked), name)
                for i, name in enumerate(names)
            ]
        outputs = answers(engine, [key for key, _ in work])
    for i, (key, name) in enumerate(work):
        if name == "huge":
            assert "not finite" in outputs[key].error
        else:
            want = alone(llama, name, [3 + i, 6, 7], asked, i)
            check(llama, outputs[key], want, asked, name)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"n": 0}, "n is an integer from 1 to 1024; got 0"),
        ({"seed": 0.5}, "seed is an integer"),
        ({"min_p": 1.5}, "min_p is a number from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty is a number from -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty is a number"),
        ({"repetition_penalty": 0}, "repetition_penalty is a number from 0.01"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias holds token ids"),
        ({"logit_bias": {61: 1.0}}, "logit_bias holds 61 to 61, but the model has tokens 0 to 60"),
        ({"logit_bias": {5: 101}}, "logit_bias is a number from -100 to 100"),
        ({"logit_bias": [5]}, "logit_bias has a number for each"),
        ({"bad_words": ["a", ""]}, "bad_words is a list of strings, none of them empty"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [61]}, "allowed_token_ids holds 61 to 61"),
        ({"allowed_token_ids": "a"}, "allowed_token_ids holds token ids"),
        ({"min_tokens": -1}, "min_tokens is an integer from 0"),
        ({"stop": [5]}, "stop is a list of strings"),
        ({"stop_token_ids": 5}, "stop_token_ids holds token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids holds token ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids holds -1 to -1"),
        ({"logprobs": True}, "logprobs is an integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is an integer from 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_it_is_queued(engine, asked, says) -> None:
    with pytest.raises(ConfigError, match=says):
        engine.add_request([3, 4], adapter="a1", **asked)
    assert not engine._outputs._names


def test_an_engine_without_a_tokenizer_that_draws_nothing(llama, cm) -> None:
    """It serves what needs neither, and steps in which nobody asks skip the stage."""
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.eos_token_id = EOS
    config = ContinuousBatchingConfig(**PAGES)
    with cm.continuous_batching(generation, config, warmup=False) as engine:
        for name in ("stop", "bad_words"):
            with pytest.raises(
                ConfigError, match=rf"{name} needs the model's tokenizer.*tokenizer="
            ):
                engine.add_request([3, 4], **{name: "a"})
        asked: dict[str, Any] = {"repetition_penalty": 5.0, "logprobs": 2}
        key = engine.add_request([3, 4, 5], adapter="a1", max_new_tokens=5, **asked)
        output = answers(engine, [key])[key]
        check(llama, output, alone(llama, "a1", [3, 4, 5], asked, 5), asked, "a1")
        engine.add_request([3, 4, 5], "plain", adapter="a1", max_new_tokens=5)
        answers(engine, ["plain"])
        assert not engine.logit_processor.do_processing
    prompts = cm.generate_batch(
        [[3, 4], [5]], ["a1", None], generation, config, max_new_tokens=2, n=2, logprobs=0
    )
    assert [len(output.token_logprobs) for output in prompts.values()] == [2, 2, 2, 2]


def test_parameters_that_ask_for_nothing(engine) -> None:
    """`None` and neutral values are as if left out, so that steps skip the stage."""
    asked: dict[str, Any] = {"min_p": 0, "stop": [], "logit_bias": {}, "seed": None, "n": None}
    with engine.pause():
        key = engine.add_request([3, 4], adapter="a1", max_new_tokens=2, **asked)
        (state,) = engine.input_queue.queue
        assert state.parameters is state.sampling is None
    assert answers(engine, [key])[key].finish_reason in ("length", "stop")

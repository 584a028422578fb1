"""Tokens that are guessed ahead and verified: each answer is the one without them."""

from __future__ import annotations

import copy
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, random_base
from step_logits import answers
from tiny_models import FAMILIES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from waiting import wait_until

import lorafx
from lorafx import ConfigError
from lorafx.generation.continuous.adapter_requests import account_of, fork_names
from lorafx.generation.continuous.drafts import Proposer, looked_up

pytestmark = [pytest.mark.any_sizes, pytest.mark.usefixtures("earlier_objects_frozen")]
eagerly = pytest.mark.usefixtures("in_eager_mode")
PAGES = {"page_size": 4, "num_blocks": 128, "max_batch_tokens": 48}
CONFIG = ContinuousBatchingConfig(**PAGES, per_request_processors=True)
WORK = [([7, 8, 9] * 4, "a1"), ([*range(9, 29)], None), ([5, 5, 5, 5], "a3"), ([4, 6], "a1")]


class Guesses(Proposer):
    """Proposes what `sequences` (by adapter and prompt) go on with, of which tokens are wrong at
    random. Where they are not known, all are wrong."""

    def __init__(self, sequences: Mapping[Any, Sequence[int]], wrong: float) -> None:
        self.sequences, self.wrong, self.random = sequences, wrong, random.Random(0)
        self.farthest = 0

    def propose(self, asked: Any, active: Any) -> list[list[int]]:
        return [self._guess(state, count) for state, count in asked]

    def _guess(self, state: Any, count: int) -> list[int]:
        prompt = (*state.initial_tokens[: state.prompt_length],)
        known = self.sequences.get((account_of(state), prompt), ())
        at = len(prompt) + len(state.generated)
        self.farthest = max(self.farthest, at + count)
        draft = [*known[at : at + count]] or [3] * count
        return [3 + i if self.random.random() < self.wrong else t for i, t in enumerate(draft)]


def greedy(case: Case, name: str | None, prompt: Sequence[int], new: int) -> list[int]:
    """The prompt, and the likeliest tokens of the row alone by the merged model."""
    tokens, model = [*prompt], case.alone(name)
    with torch.no_grad():
        for _ in range(new):
            logits = model(input_ids=torch.tensor([tokens]))["logits"]
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def truth(case: Case, work: Any, new: int) -> dict[Any, list[int]]:
    return {
        (name or "__base__", (*prompt,)): greedy(case, name, prompt, new) for prompt, name in work
    }


def added(engine: Any, work: Any, new: int) -> list[str]:
    """The names of these requests, of which every second one asks for log-probabilities."""
    return [
        engine.add_request(
            p, adapter=a, max_new_tokens=new, ignore_eos=True, logprobs=None if i % 2 else 0
        )
        for i, (p, a) in enumerate(work)
    ]


def check_tokens(case: Case, engine: Any, work: Any, new: int = 12) -> None:
    with engine.pause():
        ids = added(engine, work, new)
    check_outputs(case, work, answers(engine, ids), new)


def check_outputs(case: Case, work: Any, outputs: Mapping[str, Any], new: int) -> None:
    for (prompt, name), output in zip(work, outputs.values(), strict=True):
        assert output.error is None, output.error
        tokens = [*prompt, *output.generated_tokens]
        assert tokens == greedy(case, name, prompt, new)
        with torch.no_grad():
            logits = case.alone(name)(input_ids=torch.tensor([tokens]))["logits"][0]
        rows = logits[len(prompt) - 1 :].log_softmax(-1)
        for told, row in zip(output.token_logprobs, rows, strict=False):
            assert close([told.logprob], [float(row[told.token])])


def test_a_prompt_is_looked_up_as_transformers_does() -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(2, 14))]
        count, longest = draw.randrange(1, 5), draw.randrange(1, 4)
        theirs = PromptLookupCandidateGenerator(
            num_output_tokens=count, max_matching_ngram_size=longest, max_length=100
        )
        (want,) = theirs.get_candidates(torch.tensor([tokens]))[0].tolist()
        assert [*looked_up(tokens, count, longest)] == want[len(tokens) :]
    assert looked_up([258, 1], 3, 2) == ()  # a byte of the first token is the second one


@pytest.fixture(scope="module")
def compiled(llama: Case) -> Any:
    return llama.compile({"start": "eager"})


def drawing(cm: Any) -> Any:
    generation = copy.deepcopy(cm._orig_mod.generation_config)
    generation.do_sample, generation.temperature, generation.eos_token_id = True, 0.0, None
    return generation


LETTERS = ["<pad>", "<s>", "</s>", " ", *string.ascii_letters, *"0123456789"][:61]


def tokenizer() -> PreTrainedTokenizerFast:
    """Each letter is a token, from 4 on."""
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def engines(compiled: Any) -> Iterator[tuple[Any, Any]]:
    """One without drafts, and one with those that a test gives it."""
    settings: dict[str, Any] = {"warmup": False, "tokenizer": tokenizer()}
    plain = compiled.continuous_batching(drawing(compiled), CONFIG, **settings)
    drafting = compiled.continuous_batching(
        drawing(compiled), CONFIG, prompt_lookup_num_tokens=4, **settings
    )
    with plain as without, drafting as with_drafts:
        yield without, with_drafts


@pytest.fixture
def drafting(engines: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def of(proposer: Any) -> Any:
        if proposer is not None:
            monkeypatch.setattr(engines[1].drafts, "proposer", proposer)
        return engines[1]

    return of


def test_sequences_are_those_without_drafts(llama) -> None:
    """By two adapters and the base in one step, beside prompts in chunks and requests without a
    draft. Nothing is compiled for it."""
    cm = llama.compile()
    check_sequences(llama, cm)


@pytest.mark.usefixtures("road")
@eagerly
def test_windows_have_what_rejected_tokens_took_from_them(eight_of, tmp_path) -> None:
    case = eight_of("gemma3", tmp_path)
    assert case.base.config.sliding_window < 12
    check_sequences(case, case.compile({"start": "eager"}))


def check_sequences(case: Case, cm: Any, new: int = 24) -> None:
    sequences = truth(case, WORK, new)
    guesses = Guesses({key: sequences[key] for key in [*sequences][:3]}, wrong=0.3)
    config = ContinuousBatchingConfig(**{**PAGES, "max_batch_tokens": 24})
    with cm.continuous_batching(None, config, prompt_lookup_num_tokens=5) as engine:
        graphs, drafts = cm.recompiles, engine.drafts
        check_tokens(case, engine, WORK, new)
        drafts.proposer = guesses
        for i in range(3):
            check_tokens(case, engine, WORK[i:], new)
        assert 0 < drafts.accepted < drafts.proposed
        check_tokens(case, engine, WORK[:1], new)  # alone in its steps
    assert cm.recompiles == graphs


@eagerly
def test_what_was_rejected_is_in_no_page_that_others_find(llama, drafting) -> None:
    """A request is cancelled in the step whose rejected token was the last of a page."""
    prompt = [*range(30, 41)]
    sequence = greedy(llama, "a1", prompt, 10)

    class Cancelling(Guesses):
        def propose(self, asked: Any, active: Any) -> list[list[int]]:
            for state, _ in asked:
                if state.request_id == "first" and len(state.generated) == 4:
                    engine.cancel_request("first")
            return super().propose(asked, active)

    engine = drafting(Cancelling({}, wrong=1.0))
    engine.add_request(prompt, "first", adapter="a1", max_new_tokens=30)
    wait_until(lambda: not engine.busy)
    check_tokens(llama, engine, [(sequence[:18], "a1")], 3)


class Grammar:
    """Odd tokens, `most` of them; raises where it has `bad` of them."""

    def __init__(self, most: int = 100, bad: int = 100) -> None:
        self.most, self.bad = most, bad

    def bitmask(self, generated: Sequence[int]) -> torch.Tensor:
        if len(generated) >= self.bad:
            raise RuntimeError("no such rule")
        return torch.arange(61) % 2 == 1

    def ended(self, generated: Sequence[int]) -> bool:
        return len(generated) >= self.most


ASKED: dict[str, dict[str, Any]] = {
    "max": {"max_new_tokens": 7},
    "eos": {"eos_token_id": "fourth"},
    "stop": {"stop": "text"},
    "stop token": {"stop_token_ids": ["fourth"]},
    "late stop": {"stop_token_ids": ["fourth"], "min_tokens": 8},
    "grammar": {"grammar": Grammar(9)},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "logprobs": {"logprobs": 3, "return_logprobs": True, "prompt_logprobs": 1},
    "seed": {"seed": 3, "temperature": 1.5, "top_k": 9, "return_logprobs": True},
    "several": {"seed": 3, "temperature": 1.0, "n": 3, "top_p": 0.9},
}


@eagerly
@pytest.mark.parametrize("name", ASKED)
def test_what_requests_ask_of_tokens_holds_within_a_draft(engines, drafting, name) -> None:
    """Each output, of which a stream has all, is that of an engine without drafts."""
    prompt, asked, plain = [7, 8, 9, 30], dict(ASKED[name]), engines[0]
    free = plain.add_request(prompt, adapter="a1", max_new_tokens=30)
    tokens = answers(plain, [free])[free].generated_tokens
    if asked.get("stop") == "text":
        asked["stop"] = "".join(LETTERS[t] for t in tokens[3:5])
    for key in {"eos_token_id", "stop_token_ids"} & {*asked}:
        asked[key] = [tokens[3]]
    asked = {"max_new_tokens": 14, **asked}
    want = everything(plain, prompt, asked)
    longest = max((outputs[-1].generated_tokens for outputs in want.values()), key=len)
    known = {("a1", (*prompt,)): [*prompt, *longest, 5, 5, 5, 5]}
    for wrong in (0.0, 0.3):
        engine = drafting(Guesses(known, wrong))
        before = engine.drafts.accepted
        check_same(everything(engine, prompt, asked), want)
        assert engine.drafts.accepted > before + (1 if wrong == 0 else -1)


def check_same(got: Mapping[int, Any], want: Mapping[int, Any]) -> None:
    assert {*got} == {*want}
    for key, outputs in got.items():
        assert len(outputs) == len(want[key])  # one a token
        for output, expected in zip(outputs, want[key], strict=True):
            for what in ("generated_tokens", "finish_reason", "stop_reason", "error"):
                assert getattr(output, what) == getattr(expected, what), what
            assert close(output.logprobs, expected.logprobs)
            for what in ("token_logprobs", "prompt_logprobs"):
                pairs = zip(getattr(output, what), getattr(expected, what), strict=True)
                for token, expected_token in pairs:
                    assert (token is None) == (expected_token is None)
                    if token is not None:
                        assert (token.token, token.rank) == expected_token[::2]
                        assert close([token.logprob], [expected_token.logprob])
                        assert [t for t, _ in token.top] == [t for t, _ in expected_token.top]


def everything(engine: Any, prompt: list[int], asked: Mapping[str, Any]) -> dict[int, list[Any]]:
    """All outputs of each sequence of a request, by its number."""
    first = engine.add_request(prompt, adapter="a1", streaming=True, **asked)
    names = [first, *fork_names(first, asked.get("n", 1) - 1)]
    found: dict[str, list[Any]] = {name: [] for name in names}
    while not all(outputs and outputs[-1].is_finished() for outputs in found.values()):
        output = engine.get_result(timeout=100)
        found[output.request_id].append(output)
    return {number: found[name] for number, name in enumerate(names)}


def close(got: Sequence[float], want: Sequence[float]) -> bool:
    return len(got) == len(want) and all(
        abs(a - b) <= TOLERANCE * max(1, abs(b)) for a, b in zip(got, want, strict=True)
    )


@eagerly
@pytest.mark.parametrize("right", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drawn_tokens_have_the_distribution_of_the_model(llama, drafting, right) -> None:
    """Three tokens in a row, by a draft of a likely sequence, or of an unlikely one, by chi²."""
    prompt, count, sampling = [9, 8, 7], 1024, {"temperature": 1.5, "top_k": 3}
    torch.manual_seed(0)
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *known] for known in shares])
            rows = llama.alone("a1")(input_ids=ids)["logits"][:, -1] / 1.5
        for (known, share), row in zip(shares.items(), rows, strict=True):
            values, tokens = row.topk(3)
            for token, part in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
                longer[(*known, token)] = share * part
        shares = longer
    order = sorted(shares, key=lambda known: shares[known])
    guess = order[-1] if right else order[0]
    engine = drafting(Guesses({("a1", (*prompt,)): [*prompt, *guess]}, wrong=0.0))
    before = engine.drafts.accepted
    found: Counter[tuple[int, ...]] = Counter()
    name = engine.add_request(prompt, adapter="a1", max_new_tokens=3, n=count, **sampling)
    outputs = answers(engine, [name, *fork_names(name, count - 1)])
    found.update((*output.generated_tokens,) for output in outputs.values())
    assert engine.drafts.accepted > before
    assert {*found} <= {*shares}
    chi = sum((found[known] - count * p) ** 2 / (count * p) for known, p in shares.items())
    assert chi < 59  # p = 0.0001 at 26 degrees of freedom


@eagerly
def test_a_request_that_fails_within_a_draft_fails_alone(llama, engines, drafting) -> None:
    sequences = truth(llama, WORK, 12)
    odd = engines[0].add_request([11, 9], adapter="a1", grammar=Grammar(5))
    tokens = answers(engines[0], [odd])[odd].generated_tokens
    engine = drafting(Guesses({**sequences, ("a1", (11, 9)): [11, 9, *tokens]}, wrong=0.0))
    with engine.pause():
        bad = engine.add_request([11, 9], adapter="a1", grammar=Grammar(bad=3))
        ids = added(engine, WORK, 12)
    outputs = answers(engine, [bad, *ids])
    failed = outputs.pop(bad)
    assert "its grammar raised RuntimeError: no such rule" in failed.error
    assert failed.generated_tokens == tokens[:3]
    check_outputs(llama, WORK, outputs, 12)


@eagerly
def test_an_adapter_is_replaced_while_drafts_are_verified(llama, compiled, drafting) -> None:
    engine = drafting(Guesses(truth(llama, WORK, 40), wrong=0.3))
    try:
        with engine.pause():
            ids = added(engine, WORK, 40)
        compiled.load_adapter(llama.folders["a2"], "a1")
        (after,) = added(engine, [([4, 6], "a1")], 12)
        outputs = answers(engine, [*ids, after])
    finally:
        compiled.load_adapter(llama.folders["a1"], "a1")
    check_outputs(llama, [([4, 6], "a2")], {after: outputs.pop(after)}, 12)
    check_outputs(llama, WORK, outputs, 40)


@eagerly
@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_a_small_cache_and_few_tokens_a_step(llama, compiled, scheduler) -> None:
    """Requests are begun again, and drafts are cut or left out where they do not fit."""
    config = ContinuousBatchingConfig(
        page_size=4, num_blocks=16, max_batch_tokens=14, scheduler_type=scheduler
    )
    work = [([*range(4 + i, 12 + i)], ("a1", None, "a3")[i % 3]) for i in range(6)]
    sequences = truth(llama, work, 16)
    with compiled.continuous_batching(
        None, config, warmup=False, prompt_lookup_num_tokens=6
    ) as engine:
        engine.drafts.proposer = Guesses(sequences, wrong=0.2)
        check_tokens(llama, engine, work, 16)
        assert engine.drafts.accepted > 0
        assert engine.cache_usage() == 0


@pytest.mark.slow
@eagerly
def test_a_draft_ends_where_longrope_changes_all_rotations(eight_of, tmp_path) -> None:
    """A draft beyond that position would have the tokens before it rotated by the longer factors,
    as no step without it does."""
    rope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20},
        **{"short_factor": [1.0] * 3, "long_factor": [2.0, 3.0, 4.0]},
    }
    case = eight_of("llama", tmp_path, rope_parameters=rope, max_position_embeddings=64)
    cm, answers = case.compile({"start": "eager"}), []
    for guessed in (None, 6):
        with cm.continuous_batching(
            None, CONFIG, warmup=False, prompt_lookup_num_tokens=guessed
        ) as engine:
            if guessed:
                told = {("a1", (*WORK[0][0],)): [*WORK[0][0], *answers[0]]}
                engine.drafts.proposer = Guesses(told, wrong=0.0)
            name = engine.add_request(WORK[0][0], adapter="a1", max_new_tokens=24, ignore_eos=True)
            answers.append(engine.collected([name])[name].generated_tokens)
            assert not guessed or engine.drafts.accepted > 6
    assert answers[0] == answers[1]


@eagerly
def test_a_draft_ends_with_the_positions_of_the_model(eight_of, tmp_path) -> None:
    case = eight_of("llama", tmp_path, num_hidden_layers=1, max_position_embeddings=24)
    guesses = Guesses(truth(case, WORK[:1], 30), wrong=0.0)
    with case.compile({"start": "eager"}).continuous_batching(
        None, CONFIG, warmup=False, prompt_lookup_num_tokens=6
    ) as engine:
        engine.drafts.proposer = guesses
        check_tokens(case, engine, WORK[:1], 30)
        assert engine.drafts.accepted > 6
    assert guesses.farthest == 24


@eagerly
@pytest.mark.parametrize("kind", ["compiled", "plain", "eager attention"])
def test_a_draft_model(llama, compiled, kind, tmp_path) -> None:
    """With adapters of its own by which it guesses all, or without, when it guesses some of the
    base's; in chunks, and where requests come and go."""
    draft: Any = llama.model()
    if kind == "eager attention":
        draft.set_attn_implementation("eager")
    if kind == "compiled":
        own = {name: llama.folders[name] for name in ("a1", "a3")}
        draft = lorafx.compile(draft, own, options={**REFERENCE, "start": "eager"})
    work = [*WORK, ([*range(3, 60)], None), ([8, 8, 3], "a2")]
    before = draft.config._attn_implementation
    with compiled.continuous_batching(
        None, CONFIG, assistant_model=draft, num_assistant_tokens=4
    ) as engine:
        drafts = engine.drafts
        check_tokens(llama, engine, work, 12)
        assert 0 < drafts.accepted < drafts.proposed  # a2 is none of the draft's adapters
        drafts.accepted = drafts.proposed = 0
        names = (None, "a1", "a3") if kind == "compiled" else (None, None, None)
        check_tokens(llama, engine, [([4, 6], names[i % 3]) for i in range(6)], 16)
        assert drafts.accepted == drafts.proposed > 60
        assert len(drafts.proposer._drafting) <= 6
    assert draft.config._attn_implementation == before


@eagerly
def test_a_draft_that_fails_is_told_and_left_out(llama, compiled, caplog) -> None:
    draft: Any = llama.model()
    with compiled.continuous_batching(None, CONFIG, assistant_model=draft) as engine:
        check_tokens(llama, engine, WORK[:2], 6)
        draft.lm_head = None
        check_tokens(llama, engine, WORK, 6)
    (record,) = [r for r in caplog.records if r.name.startswith("lorafx")]
    assert "the draft failed" in record.getMessage()
    assert record.exc_info is not None


@eagerly
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"assistant_model": "other"}, "assistant_model has 50 tokens and the model 61"),
        ({"assistant_model": "bert"}, "is a causal language model.*got BertForMaskedLM"),
        ({"assistant_model": "t5"}, "is a causal language model.*got T5ForConditionalGeneration"),
        ({"assistant_model": "name"}, "assistant_model is a model of transformers.*got str"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens is of an assistant_model"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is an integer from 1"),
        ({"assistant_model": "same", "num_assistant_tokens": 0}, "num_assistant_tokens is an"),
        ({"assistant_model": "same", "prompt_lookup_num_tokens": 3}, "two ways to guess"),
    ],
    ids=str,
)
def test_drafts_that_cannot_be_are_refused(llama, compiled, arguments, says) -> None:
    given: dict[str, Any] = dict(arguments)
    made = {
        **{name: FAMILIES[name].build for name in ("bert", "t5")},
        **{"other": lambda: random_base("llama", vocab_size=50), "same": llama.model},
    }
    if given.get("assistant_model") in made:
        given["assistant_model"] = made[given["assistant_model"]]()
    with (
        pytest.raises(ConfigError, match=says),
        compiled.continuous_batching(None, CONFIG, warmup=False, **given),
    ):
        raise AssertionError("it began")


@eagerly
def test_a_generation_config_asks_for_prompt_lookup(llama, compiled) -> None:
    generation = GenerationConfig(prompt_lookup_num_tokens=3, do_sample=False)
    with compiled.continuous_batching(generation, CONFIG, warmup=False) as engine:
        check_tokens(llama, engine, WORK, 20)
        assert engine.drafts.accepted > 0

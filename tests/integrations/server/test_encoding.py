"""Encoders: vectors and classes by the request's own adapter, in calls that all requests share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from dense_merge import TOLERANCE, build_case, error
from served import Files, ask, client_of, serving, word_tokenizer, write_files
from sums import SumCase
from tiny_models import FAMILIES
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize
from transformers import BertForSequenceClassification, BertModel, BertTokenizer, RobertaModel
from waiting import until

from lorafx.errors import ConfigError, LorafxError, TargetError
from lorafx.integrations.server import encoding
from lorafx.integrations.server.encoding import EncoderBatches, Pooling, _Row
from lorafx.integrations.server.generating import ServedModel
from lorafx.integrations.server.routes import build_app
from lorafx.integrations.server.settings import Settings

PATH = "/v1/embeddings"
INPUTS = {"a1": "w9 w12 w30 w31 w8 w9", "a2": "w9", None: "w8 w7 w9 w9", "a3": "w11 w12 w13"}
SIZES = {
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0},
}


def written(folder: Path, model: type, **config: Any) -> Files:
    """A tiny encoder of this class with adapters a0 to a4 on disk."""
    settings = SIZES | config
    family = replace(
        FAMILIES["bert"], build=lambda **_: model(model.config_class(**settings)), config={}
    )
    case = build_case(family, folder / "adapters")
    base: Any = case.base
    tokenizer = word_tokenizer(SIZES["vocab_size"])
    base.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return Files(case, tokenizer, folder / "tiny", folder / "adapters")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return written(tmp_path_factory.mktemp("encoder"), BertModel)


@pytest.fixture(scope="module")
def server(files) -> Iterator[Any]:
    with serving(files, max_adapters=3, batch_window=50, max_batch_tokens=64) as server:
        yield server


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Iterator[tuple[Files, Any]]:
    folder = tmp_path_factory.mktemp("classifier")
    labels = {0: "low", 1: "high", 2: "none"}
    files = written(folder, BertForSequenceClassification, id2label=labels)
    with serving(files, batch_window=50) as server:
        yield files, server


def vector(files: Files, adapter: str | None, words: str, pooling: str = "mean") -> torch.Tensor:
    """What sentence-transformers makes of the merged model's states."""
    ids = torch.tensor([files.tokenizer(words)["input_ids"]])
    with torch.no_grad():
        states = files.case.alone(adapter)(input_ids=ids).last_hidden_state[0]
    ways = {"mean": states.mean(0), "cls": states[0], "last": states[-1], "max": states.amax(0)}
    return normalize(ways[pooling], dim=0)


def gathered(server: Any, *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    """The answers to requests that come at the same time."""

    async def all_of_them() -> list[Any]:
        async with client_of(server) as client:
            return await asyncio.gather(*(client.post(path, json=body) for path, body in requests))

    return asyncio.run(all_of_them())


def asking(adapter: str | None, asked: Any, **fields: Any) -> dict[str, Any]:
    return {"model": f"tiny:{adapter}" if adapter else "tiny", "input": asked, **fields}


@contextmanager
def company(server: Any, count: int, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In the block a call waits for so many rows, whatever its window, and then for that."""

    async def sleep(seconds: float) -> None:
        await until(lambda: len(server.engine._waiting) == count)
        then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
        yield


@contextmanager
def calls_of(server: Any) -> Iterator[list[list[_Row]]]:
    """The rows of each call in the block."""
    batches, calls = server.engine, []
    compute = batches._compute

    def noted(rows: list[_Row]) -> torch.Tensor:
        calls.append([*rows])
        return compute(rows)

    batches._compute = noted
    try:
        yield calls
    finally:
        batches._compute = compute


def test_requests_of_all_adapters_share_a_call(files, server):
    with calls_of(server) as calls, company(server, len(INPUTS)):
        got = gathered(server, *((PATH, asking(a, words)) for a, words in INPUTS.items()))
    rows = [(row.adapter, len(row.tokens)) for call in calls for row in call]
    assert sorted(map(str, rows)) == sorted(
        str((a, len(words.split()) + 1)) for a, words in INPUTS.items()
    )
    assert len(calls) < len(INPUTS)
    for answer, (adapter, words) in zip(got, INPUTS.items(), strict=True):
        assert answer.status_code == 200, answer.text
        body = answer.json()
        want = vector(files, adapter, words)
        assert error(torch.tensor(body["data"][0]["embedding"]), want) <= TOLERANCE
        count = len(words.split()) + 1
        assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert error(vector(files, None, words), want) > 100 * TOLERANCE or adapter is None
    assert (
        'lorafx_requests_total{adapter="a1",status="200"} 1.0'
        in ask(server, "GET", "/metrics").text
    )
    assert ask(server, "GET", "/health").json()["status"] == "ok"


def test_several_inputs_and_forms_of_them(files, server):
    words = [*INPUTS.values()]
    ids = [files.tokenizer(text)["input_ids"] for text in words]
    texts, tokens, single, pooled = gathered(
        server,
        (PATH, asking("a1", words)),
        (PATH, asking("a1", ids)),
        (PATH, asking("a1", ids[0])),
        ("/pooling", asking("a1", words, use_activation=False)),
    )
    found = [entry["embedding"] for entry in texts.json()["data"]]
    assert [entry["index"] for entry in texts.json()["data"]] == [0, 1, 2, 3]
    for got, text in zip(found, words, strict=True):
        assert error(torch.tensor(got), vector(files, "a1", text)) <= TOLERANCE
    by_ids = torch.tensor([entry["embedding"] for entry in tokens.json()["data"]])
    assert error(by_ids, torch.tensor(found)) <= TOLERANCE
    assert single.json()["data"][0]["embedding"] == pytest.approx(found[0], abs=1e-6)
    raw = torch.tensor([entry["data"] for entry in pooled.json()["data"]])
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    assert error(normalize(raw), torch.tensor(found)) <= TOLERANCE


def test_fields_of_other_servers_that_choose_an_adapter(files, server):
    answer = ask(server, "POST", PATH, **asking(None, "w9 w12"), lora_name="a2").json()
    got = torch.tensor(answer["data"][0]["embedding"])
    assert error(got, vector(files, "a2", "w9 w12")) <= TOLERANCE
    assert error(got, vector(files, None, "w9 w12")) > 100 * TOLERANCE
    refused = ask(server, "POST", PATH, **asking(None, "w9 w12"), adapters=["a2"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapters")


def test_the_client_of_openai(files, server):
    """It asks for base64."""

    async def talk() -> Any:
        async with client_of(server) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
            return await client.embeddings.create(model="tiny:a2", input=["w9 w12"])

    got = torch.tensor(asyncio.run(talk()).data[0].embedding)
    assert error(got, vector(files, "a2", "w9 w12")) <= TOLERANCE


def test_inputs_that_are_too_long(files, server):
    long = "w9 " * 40
    refused, cut, short = gathered(
        server,
        (PATH, asking("a1", long)),
        (PATH, asking("a1", long, truncate_prompt_tokens=-1)),
        (PATH, asking("a1", long, truncate_prompt_tokens=3)),
    )
    assert (refused.status_code, "truncate_prompt_tokens" in refused.text) == (400, True)
    assert cut.json()["usage"]["prompt_tokens"] == SIZES["max_position_embeddings"]
    got = torch.tensor(short.json()["data"][0]["embedding"])
    assert error(got, vector(files, "a1", "w9 w9")) <= TOLERANCE


def test_positions_that_begin_behind_the_padding_index(tmp_path):
    """RoBERTa's tables of positions have rows for the padding and for those before it."""
    with serving(written(tmp_path, RobertaModel, pad_token_id=1)) as server:
        long = asking("a1", "w9 " * 40, truncate_prompt_tokens=-1)
        answer = ask(server, "POST", PATH, **long)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == SIZES["max_position_embeddings"] - 2


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        (PATH, asking("a9", "w9"), 404, "nearest"),
        (PATH, asking("a1", []), 400, "`input`"),
        (PATH, asking("a1", [1, 99]), 400, "`input`"),
        (PATH, asking("a1", ["w9", ""], add_special_tokens=False), 400, "an input is empty"),
        (PATH, asking("a1", "w9", dimensions=8), 400, "`dimensions`"),
        (PATH, asking("a1", "w9", encoding_format="bytes"), 400, "`encoding_format`"),
        (PATH, asking("a1", "w9", stream=True), 400, "`stream`"),
        (PATH, {"model": "tiny"}, 400, "`input` is missing"),
        ("/classify", asking("a1", "w9"), 400, "/v1/embeddings"),
        ("/pooling", asking("a1", "w9", task="classify"), 400, "/v1/embeddings"),
        ("/v1/completions", {"model": "tiny", "prompt": "w9"}, 404, "encodes, and /v1/completions"),
    ],
)
def test_what_is_refused(server, path, body, status, word):
    answer = ask(server, "POST", path, **body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]


def test_an_adapter_that_goes_fails_alone(files, server):
    """It is unloaded while its request waits for company."""
    asked = [(PATH, asking(name, "w9 w12")) for name in ("a4", "a2")]
    with company(server, 2, lambda: server.compiled.unload_adapter("a4")):
        gone, other = gathered(server, *asked)
    assert (gone.status_code, other.status_code) == (404, 200)
    got = torch.tensor(other.json()["data"][0]["embedding"])
    assert error(got, vector(files, "a2", "w9 w12")) <= TOLERANCE


def test_an_input_that_the_model_refuses_fails_alone(files, server):
    """Also among others of its adapter: with more tokens than there are positions."""
    batches, inputs = server.engine, {"w9 w12 " * 6: "a2", "w8 " * 14: "a2"}
    tokens = [files.tokenizer(words)["input_ids"] for words in inputs]

    async def talk() -> Any:
        asked = [*zip(tokens, inputs.values(), strict=True), ([9] * 17, "a2")]
        return await asyncio.gather(
            *(batches.vectors([(ids, None)], adapter) for ids, adapter in asked),
            return_exceptions=True,
        )

    with calls_of(server) as calls:
        *answers, failure = asyncio.run(talk())
    assert isinstance(failure, LorafxError)
    assert len(calls[0]) == 3
    for (answer,), (words, adapter) in zip(answers, inputs.items(), strict=True):
        assert error(normalize(answer.numbers, dim=0), vector(files, adapter, words)) <= TOLERANCE


def test_a_text_that_is_cut_keeps_the_special_tokens_at_its_end(files, server):
    tokenizer = word_tokenizer(SIZES["vocab_size"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    settings = Settings(model=str(files.model), adapters=files.adapters)
    served = ServedModel(server.compiled, server.engine, tokenizer, settings)
    ending = server._replace(app=build_app(served))
    words = "w9 w8 w7 w11 w12"
    cut, bare, only, ids = gathered(
        ending,
        (PATH, asking("a1", words, truncate_prompt_tokens=4)),
        (PATH, asking("a1", words, truncate_prompt_tokens=4, add_special_tokens=False)),
        (PATH, asking("a1", "", truncate_prompt_tokens=1)),
        (PATH, asking("a1", [1, 9, 8, 7, 2], truncate_prompt_tokens=4)),
    )
    wanted = {"w9 w8 </s>": cut, "w9 w8 w7 w11": bare, "</s>": only, "w9 w8 w7": ids}
    for text, answer in wanted.items():
        got = torch.tensor(answer.json()["data"][0]["embedding"])
        prompt = files.tokenizer(text, add_special_tokens=answer in (cut, ids))["input_ids"]
        with torch.no_grad():
            model: Any = files.case.alone("a1")
            states = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
        assert error(got, normalize(states.mean(0), dim=0)) <= TOLERANCE, text


def test_versions_in_answers(files, server, monkeypatch):
    """They are those that computed the vector, also when an adapter is replaced meanwhile."""
    compiled, batches = server.compiled, server.engine
    before = compiled.adapter_versions["a1"]
    asked = [(PATH, asking("a1", "w9 w12")), ("/pooling", asking("a1", ["w9"]))]
    for answer in gathered(server, *asked):
        assert answer.json()["adapter_version"] == before
    (base,) = gathered(server, (PATH, asking(None, "w9")))
    assert (base.json()["adapter_version"], base.json()["weights_version"]) == (None, 0)
    versions, left = batches._versions, [True]

    def replaced() -> Any:
        found = versions()
        if left and left.pop():
            compiled.load_adapter(files.adapters / "a2", "a1")
        return found

    monkeypatch.setattr(batches, "_versions", replaced)
    try:
        (answer,) = gathered(server, asked[0])
        body = answer.json()
        assert body["adapter_version"] == compiled.adapter_versions["a1"] > before
        want = vector(files, "a2", "w9 w12")
        assert error(torch.tensor(body["data"][0]["embedding"]), want) <= TOLERANCE
    finally:
        compiled.load_adapter(files.adapters / "a1", "a1")


def test_a_paused_encoder(files, server):
    """Inputs wait for /resume."""
    control = server.control

    async def talk() -> Any:
        async with client_of(server) as client:
            await control.pause("keep", reset=True)
            later = asyncio.create_task(client.post(PATH, json=asking("a2", "w9 w12")))
            await until(lambda: control._closed._waiters)
            assert not later.done()
            await control.resume()
            return await later

    answer = asyncio.run(talk())
    got = torch.tensor(answer.json()["data"][0]["embedding"])
    assert error(got, vector(files, "a2", "w9 w12")) <= TOLERANCE


@pytest.mark.parametrize("most", [16, 64, 10_000])
def test_calls_by_tokens(server, files, most):
    """A call has few pads, and as many tokens as are allowed; the oldest row is in the next one."""
    settings = Settings(model=str(files.model), adapters=files.adapters, max_batch_tokens=most)
    batches = EncoderBatches(server.compiled, Pooling("mean"), settings, 0)
    lengths = [3, 50, 4, 4, 90, 7, 50, 3, 6, 55, 1]

    async def split() -> list[list[int]]:
        loop = asyncio.get_running_loop()
        batches._waiting = [_Row([1] * n, None, loop.create_future()) for n in lengths]
        left = batches._waiting[5]
        left.result.cancel()
        calls = []
        while batches._waiting:
            oldest = next(row for row in batches._waiting if not row.result.done())
            rows = batches._next()
            assert oldest in rows
            calls.append([len(row.tokens) for row in rows])
        return calls

    calls = asyncio.run(split())
    assert sorted(n for call in calls for n in call) == sorted(n for n in lengths if n != 7)
    for call in calls:
        assert len(call) == 1 or max(call) * len(call) <= min(most, 2 * sum(call))
    assert len(calls) < len(lengths) - 1


@pytest.mark.parametrize("mode", ["mean", "cls", "last", "max"])
def test_poolings(files, server, mode):
    given = {"model": str(files.model), "adapters": files.adapters, "pooling": mode}
    pooling = Pooling.of(Settings(**given), causal=False)
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for got, row, length in zip(pooling(states, mask), states, (4, 2), strict=True):
        ways = {"mean": row[:length].mean(0), "cls": row[0], "max": row[:length].amax(0)}
        torch.testing.assert_close(got, {**ways, "last": row[length - 1]}[mode])


@pytest.mark.parametrize(
    ("modules", "config", "wanted"),
    [
        ("Transformer Pooling", {"pooling_mode_cls_token": True}, ("cls", False)),
        ("Transformer Pooling Normalize", {"pooling_mode_mean_tokens": True}, ("mean", True)),
        ("Transformer Pooling", {"pooling_mode_lasttoken": True}, ("lasttoken", False)),
        ("Transformer Pooling Normalize", {"pooling_mode": "max"}, ("max", True)),
        ("Transformer Pooling", {"pooling_mode": "weightedmean"}, "weightedmean"),
        ("Transformer Pooling", {"pooling_mode": ["cls", "mean"]}, "cls+mean"),
        ("Transformer Pooling Dense", {"pooling_mode": "mean"}, "Dense is not served"),
    ],
)
def test_the_files_of_sentence_transformers(files, tmp_path, modules, config, wanted):
    (tmp_path / "config.json").write_text((files.model / "config.json").read_text())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    listed = [
        {"path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules.split())
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    settings = Settings(model=str(tmp_path), adapters=files.adapters)
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted.replace("+", r"\+")):
            Pooling.of(settings, causal=False)
    else:
        assert Pooling.of(settings, causal=True) == Pooling(*wanted)


def test_an_adapter_of_another_model_is_named_at_the_start(files, tmp_path):
    other = replace(files, adapters=write_files(tmp_path).adapters)
    wanted = "target_modules entry '.*' of the adapter 'a.' names no module of BertModel"
    with pytest.raises(TargetError, match=wanted), serving(other):
        pass


def test_without_such_files_the_model_says(files):
    settings = Settings(model=str(files.model), adapters=files.adapters)
    assert Pooling.of(settings, causal=True) == ("lasttoken", True)
    assert Pooling.of(settings, causal=False) == ("mean", True)


def test_classes(classifier):
    files, server = classifier
    got = gathered(server, *(("/classify", asking(a, words)) for a, words in INPUTS.items()))
    for answer, (adapter, words) in zip(got, INPUTS.items(), strict=True):
        (entry,) = answer.json()["data"]
        ids = torch.tensor([files.tokenizer(words)["input_ids"]])
        with torch.no_grad():
            logits = files.case.alone(adapter)(input_ids=ids).logits[0]
        assert error(torch.tensor(entry["probs"]), logits.softmax(0)) <= TOLERANCE
        assert entry["label"] == ["low", "high", "none"][int(logits.argmax())]
        assert entry["num_classes"] == 3
    raw, pooled, refused = gathered(
        server,
        ("/classify", asking(adapter, words, use_activation=False)),
        ("/pooling", asking(adapter, words)),
        (PATH, asking(adapter, words)),
    )
    assert error(torch.tensor(raw.json()["data"][0]["probs"]), logits) <= TOLERANCE
    assert pooled.json()["data"][0]["data"] == pytest.approx(entry["probs"], abs=1e-6)
    assert (refused.status_code, "/classify" in refused.text) == (400, True)


def test_many_clients_at_once(files, server):
    words = ["w9", "w9 w12 w8", "w30 w31 w9 w8 w7"]
    asked = [(a, w) for a in ("a1", "a2", "a3", None) for w in words] * 4
    got = gathered(server, *((PATH, asking(a, w)) for a, w in asked))
    want = {(a, w): vector(files, a, w) for a, w in asked}
    for answer, key in zip(got, asked, strict=True):
        found = torch.tensor(answer.json()["data"][0]["embedding"])
        assert error(found, want[key]) <= TOLERANCE


SCORED = {"text_1": "w9 w12 w30", "text_2": ["w9 w12", "w8 w31 w7 w30", "w11"]}
RANKED = {"query": SCORED["text_1"], "documents": SCORED["text_2"]}


def scored(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, **(fields if "text_1" in fields else SCORED | fields)}


@pytest.mark.parametrize("adapter", [None, "a2"])
def test_the_cosine_of_pairs(files, server, adapter):
    model = f"tiny:{adapter}" if adapter else "tiny"
    first, *others = (
        vector(files, adapter, words) for words in [SCORED["text_1"], *RANKED["documents"]]
    )
    want = torch.stack(others) @ first
    one, both, swapped, *ranked = gathered(
        server,
        ("/score", scored(model)),
        ("/v1/score", scored(model, text_1=[SCORED["text_1"]] * 3, text_2=SCORED["text_2"])),
        ("/score", scored(model, text_1=SCORED["text_2"][1], text_2=SCORED["text_1"])),
        ("/rerank", {"model": model, **RANKED}),
        ("/v1/rerank", {"model": model, **RANKED, "top_n": 2}),
        ("/v2/rerank", {"model": model, **RANKED, "return_documents": False}),
    )
    for answer in (one, both):
        found = answer.json()["data"]
        assert [(e["index"], e["object"]) for e in found] == [(i, "score") for i in range(3)]
        assert error(torch.tensor([e["score"] for e in found]), want) <= TOLERANCE
    assert swapped.json()["data"][0]["score"] == pytest.approx(float(want[1]), abs=1e-5)
    assert one.json()["usage"]["prompt_tokens"] == 4 + 3 + 5 + 2
    order = want.argsort(descending=True).tolist()
    for answer, count in zip(ranked, (3, 2, 3), strict=True):
        found = answer.json()["results"]
        assert [entry["index"] for entry in found] == order[:count]
        got = torch.tensor([entry["relevance_score"] for entry in found])
        assert error(got, want[order[:count]]) <= TOLERANCE
    assert ranked[0].json()["results"][0]["document"] == {"text": RANKED["documents"][order[0]]}
    assert "document" not in ranked[2].json()["results"][0]


@pytest.fixture(scope="module")
def crossing(tmp_path_factory) -> Iterator[tuple[Files, Any]]:
    """A cross-encoder, with BERT's tokenizer, whose tokens of a pair have types."""
    files = written(
        tmp_path_factory.mktemp("crossing"), BertForSequenceClassification, num_labels=1
    )
    tokens = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files.tokenizer = BertTokenizer(files.tokenizer.get_vocab(), mask_token="<unk>", **tokens)
    files.tokenizer.save_pretrained(files.model)
    with serving(files, batch_window=50) as server:
        yield files, server


def logit_of_pair(files: Files, adapter: str | None, one: list[int], other: list[int]) -> float:
    ids = [1, *one, 2, *other, 2]
    types = [0] * (len(one) + 2) + [1] * (len(other) + 1)
    with torch.no_grad():
        model: Any = files.case.alone(adapter)
        output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    return float(output.logits)


def test_pairs_of_a_cross_encoder(crossing):
    files, server = crossing
    names, documents = ("a1", None, "a2"), SCORED["text_2"]
    *answers, classes, ranked = gathered(
        server,
        *(("/score", scored(f"tiny:{a}" if a else "tiny", use_activation=False)) for a in names),
        ("/classify", asking("a1", "w9 w12")),  # whose tokens have no types
        ("/rerank", {"model": "tiny:a1", **RANKED}),
    )

    def ids(words: str) -> list[int]:
        return files.tokenizer(words, add_special_tokens=False)["input_ids"]

    for adapter, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200, answer.text
        got = torch.tensor([entry["score"] for entry in answer.json()["data"]])
        pairs = [(ids(SCORED["text_1"]), ids(text)) for text in documents]
        want = torch.tensor([logit_of_pair(files, adapter, *pair) for pair in pairs])
        assert error(got, want) <= TOLERANCE
        if adapter == "a1":
            for entry in ranked.json()["results"]:
                share = float(want[entry["index"]].sigmoid())
                assert entry["relevance_score"] == pytest.approx(share, abs=1e-5)
    with torch.no_grad():
        model: Any = files.case.alone("a1")
        logits = model(input_ids=torch.tensor([[1, *ids("w9 w12"), 2]])).logits[0]
    assert error(torch.tensor(classes.json()["data"][0]["probs"]), logits.sigmoid()) <= TOLERANCE


def test_a_pair_that_is_cut(crossing):
    """It loses the last tokens of the second text."""
    files, server = crossing
    pair = {"text_1": "w9 w12", "text_2": " ".join(f"w{i}" for i in range(8, 30))}
    refused, cut, short, none = gathered(
        server,
        ("/score", scored("tiny:a1", **pair)),
        *(
            ("/score", scored("tiny:a1", **pair, use_activation=False, truncate_prompt_tokens=n))
            for n in (-1, 7, 4)
        ),
    )
    assert (refused.status_code, "truncate_prompt_tokens" in refused.text) == (400, True)
    for answer, count in ((cut, 16 - 5), (short, 2), (none, 0)):
        want = logit_of_pair(files, "a1", [9, 12], [*range(8, 8 + count)])
        assert answer.json()["data"][0]["score"] == pytest.approx(want, abs=1e-5)


def test_a_cross_encoder_of_logits(crossing, monkeypatch):
    """Sentence-transformers writes its activation into the model's configuration."""
    _, server = crossing
    said = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config = server.compiled._orig_mod.config
    monkeypatch.setattr(config, "sentence_transformers", said, raising=False)
    paths = [("/score", scored("tiny", **raw)) for raw in ({}, {"use_activation": False})]
    plain, raw = (
        torch.tensor([entry["score"] for entry in answer.json()["data"]])
        for answer in gathered(server, *paths)
    )
    assert error(plain, raw) <= TOLERANCE


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/score", scored("tiny:a9"), 404, "nearest"),
        ("/score", {"model": "tiny", "text_1": "w9"}, 400, "`text_2` is missing"),
        ("/score", scored("tiny", text_1=["w9", "w8"], text_2=["w9"]), 400, "one or as many"),
        ("/score", scored("tiny", text_1="w9", text_2=[]), 400, "at least one"),
        ("/score", scored("tiny", text_1="w9", text_2=[[9]]), 400, "valid string"),
        ("/score", scored("tiny", text_1="w9", text_2="w9 " * 40), 400, "`truncate_prompt_tokens`"),
        ("/rerank", {"model": "tiny", **RANKED, "top_n": -1}, 400, "`top_n`"),
        (
            "/rerank",
            {"model": "tiny", **RANKED, "max_tokens_per_doc": 9},
            400,
            "`max_tokens_per_doc`",
        ),
    ],
)
def test_pairs_that_are_refused(server, path, body, status, word):
    answer = ask(server, "POST", path, **body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]["message"]


def test_classes_score_no_pairs(classifier):
    answer = ask(classifier[1], "POST", "/score", **scored("tiny"))
    assert (answer.status_code, "3 labels" in answer.text) == (400, True)


def test_a_sum_of_adapters_beside_others(files: Files, server: Any) -> None:
    files = replace(files, case=SumCase.of(files.case))
    scales: Any = {"a0": 0.5, "a2": -2.0}
    lora = [{"name": name, "scale": scale} for name, scale in scales.items()]
    bodies = [asking(None, "w9 w12", lora=lora), asking("a1", "w9"), asking(None, "w9 w12")]
    answers = gathered(server, *((PATH, body) for body in bodies))
    asked = (scales, "w9 w12"), ("a1", "w9"), (None, "w9 w12")
    for answer, (name, words) in zip(answers, asked, strict=True):
        got = torch.tensor(answer.json()["data"][0]["embedding"])
        assert error(got, vector(files, name, words)) <= TOLERANCE

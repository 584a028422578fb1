"""Each field of OpenAI's client and of vLLM's server, asked for by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import logging
from itertools import chain
from typing import Any

import openai
import pytest
import torch
from served import anew, ask, client_of, events, plain, question

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "w9 w31 w8"


def talk(server, function):
    """What `function` returns of OpenAI's client."""

    async def run():
        async with client_of(server) as http:
            return await function(
                openai.AsyncOpenAI(
                    base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
                )
            )

    return asyncio.run(run())


def complete(server, prompt: Any = PROMPT, model: str = "tiny:a2", max_tokens=8, **fields: Any):
    """A completion; a stream is a list of its chunks. What is no argument of the client's is sent
    in the body."""

    async def call(client):
        known = openai.resources.completions.AsyncCompletions.create.__wrapped__.__kwdefaults__
        named = {name: value for name, value in fields.items() if name in known}
        others = {name: value for name, value in fields.items() if name not in named}
        answer = await client.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, **named, extra_body=others
        )
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return talk(server, call)


def chat(server, words: str = PROMPT, model: str = "tiny:a2", **fields: Any):
    async def call(client):
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": words}], **fields
        )
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return talk(server, call)


def scores(files, adapter: str | None, ids: list[int]) -> torch.Tensor:
    """The log-probabilities (tokens, vocabulary) of what follows each token of a sequence."""
    with torch.no_grad():
        return files.case.alone(adapter)(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.fixture
def prompt_ids(files):
    return list(files.tokenizer(PROMPT)["input_ids"])


@pytest.fixture
def greedy(server):
    """The words of a long answer, of which no two are alike next to each other."""
    return complete(server).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("included", [False, True])
def test_stop(server, greedy, stream, included):
    words = greedy.split()
    stop = f"{words[2][1:]} {words[3][:2]}"  # begins within one token and ends within the next
    before = greedy[: greedy.index(stop)]
    fields = {"stop": ["never", stop], "include_stop_str_in_output": included, "stream": stream}
    answer = complete(server, **fields)
    chunks = answer if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == before + stop * included
    last = chunks[-1].choices[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    if stream:
        assert (
            "".join(c.choices[0].text for c in complete(server, stop=stop, stream=True)) == before
        )


def test_stop_token_ids(files, server, greedy):
    word = greedy.split()[2]
    (token,) = files.tokenizer(word, add_special_tokens=False)["input_ids"]
    (choice,) = complete(server, stop_token_ids=[token]).choices
    assert choice.text == greedy[: greedy.index(word)].rstrip()
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    (choice,) = complete(server, stop_token_ids=[token], include_stop_str_in_output=True).choices
    assert choice.text == greedy[: greedy.index(word) + len(word)]


def test_stop_in_a_message(server):
    message = chat(server, max_tokens=8).choices[0].message.content
    stop = message.split()[3]
    before = message[: message.index(stop)]
    answer = chat(server, max_tokens=8, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
    chunks = chat(server, max_tokens=8, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before


@pytest.mark.parametrize("stream", [False, True])
def test_several_sequences_with_a_seed(server, stream):
    drawn = {"temperature": 5.0, "stream": stream}

    def texts(**fields):
        answer = complete(server, **drawn, **fields)
        said: dict[int, str] = {}
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:
                said[choice.index] = said.get(choice.index, "") + choice.text
        return [said[index] for index in sorted(said)]

    several = texts(n=3, best_of=3, seed=7)
    assert len(set(several)) == 3
    assert several == [texts(seed=seed)[0] for seed in (7, 8, 9)]


def test_usage_counts_a_prompt_once(server, prompt_ids):
    usage = complete(server, n=3, max_tokens=4, ignore_eos=True).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt_ids), 12)
    assert usage.total_tokens == len(prompt_ids) + 12


def test_several_messages(server):
    choices = chat(server, n=2, max_tokens=5).choices
    assert [choice.index for choice in choices] == [0, 1]
    assert choices[0].message.content == choices[1].message.content  # the likeliest tokens


@pytest.mark.parametrize("adapter", [None, "a1", "a2"])
def test_logprobs_of_a_completion(files, server, prompt_ids, adapter):
    model = "tiny" if adapter is None else f"tiny:{adapter}"
    (choice,) = complete(server, model=model, logprobs=3, return_token_ids=True).choices
    found, ids = choice.logprobs, choice.token_ids
    want = scores(files, adapter, prompt_ids + ids)[len(prompt_ids) - 1 :]
    for place, token in enumerate(ids):
        assert found.tokens[place] == files.tokenizer.decode([token])
        assert found.token_logprobs[place] == pytest.approx(float(want[place, token]), abs=1e-4)
        top = want[place].topk(3)
        names = {files.tokenizer.decode([i]): float(v) for v, i in zip(*top, strict=True)}
        assert found.top_logprobs[place] == pytest.approx(names, abs=1e-4)
        shown = "" if token in files.tokenizer.all_special_ids else found.tokens[place]
        assert choice.text[found.text_offset[place] :].lstrip().startswith(shown)
    chunks = complete(server, model=model, logprobs=3, stream=True)
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        pieces = (getattr(chunk.choices[0].logprobs, field) for chunk in chunks)
        assert [*chain.from_iterable(pieces)] == getattr(found, field)


def test_logprobs_of_a_message(files, server):
    answer = chat(server, max_tokens=5, logprobs=True, top_logprobs=2)
    ids = files.chat_ids(PROMPT)
    content = answer.choices[0].logprobs.content
    tokens = [files.tokenizer.convert_tokens_to_ids(entry.token) for entry in content]
    want = scores(files, "a2", ids + tokens)[len(ids) - 1 :]
    for place, entry in enumerate(content):
        assert entry.logprob == pytest.approx(float(want[place, tokens[place]]), abs=1e-4)
        assert bytes(entry.bytes).decode() == entry.token
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            want[place].topk(2).values.tolist(), abs=1e-4
        )
    chunks = chat(server, max_tokens=5, logprobs=True, top_logprobs=2, stream=True)
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
    assert [entry for logprobs in streamed for entry in logprobs.content] == content


@pytest.mark.parametrize("adapter", [None, "a0", "a3"])
def test_echo_scores_prompts(files, server, adapter):
    """What evaluation harnesses ask: several prompts as token ids, and no answer."""
    asked = [list(files.tokenizer(words)["input_ids"]) for words in ("w9 w31 w8", "w12 w9")]
    model = "tiny" if adapter is None else f"tiny:{adapter}"
    for most in (0, 1):
        answer = complete(server, asked, model, echo=True, max_tokens=most, logprobs=1)
        for choice, ids in zip(answer.choices, asked, strict=True):
            found = choice.logprobs
            assert len(found.tokens) == len(ids) + most
            assert found.token_logprobs[0] is found.top_logprobs[0] is None
            want = scores(files, adapter, ids)
            for place in range(1, len(ids)):
                likely = float(want[place - 1].max())
                here = float(want[place - 1, ids[place]])
                assert found.token_logprobs[place] == pytest.approx(here, abs=1e-4)
                assert max(found.top_logprobs[place].values()) == pytest.approx(likely, abs=1e-4)
        assert answer.usage.completion_tokens == 2 * most


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server, greedy, stream):
    answer = complete(server, echo=True, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in (answer if stream else [answer]))
    assert text == PROMPT + greedy


def test_prompt_logprobs(files, server, prompt_ids):
    (choice,) = complete(server, prompt_logprobs=2, max_tokens=1).choices
    first, *found = choice.prompt_logprobs
    assert first is None
    want = scores(files, "a2", prompt_ids)
    for place, entries in enumerate(found):
        token = str(prompt_ids[place + 1])
        value = want[place, prompt_ids[place + 1]]
        assert entries[token]["logprob"] == pytest.approx(float(value), abs=1e-4)
        assert entries[token]["rank"] == int((want[place] > value).sum()) + 1
        assert len(entries) == (2 if entries[token]["rank"] <= 2 else 3)
    message = ask(server, "POST", CHAT, model="tiny", **question(CHAT, "w9", 1, prompt_logprobs=0))
    assert len(message.json()["prompt_logprobs"]) == len(files.chat_ids("w9"))


@pytest.mark.parametrize(("most", "asked"), [(25, 25), (-1, 61), (-1, 99)])
def test_as_many_logprobs_as_the_server_allows(files, server, prompt_ids, most, asked):
    served = anew(server, files, max_logprobs=most)
    body = {"model": "tiny:a2", **question(COMPLETIONS, PROMPT, 1), "prompt_logprobs": asked}
    answer = ask(served, "POST", COMPLETIONS, **body).json()
    _, *found = answer["choices"][0]["prompt_logprobs"]
    want = scores(files, "a2", prompt_ids)
    for place, entries in enumerate(found):
        assert min(asked, want.shape[1]) <= len(entries) <= asked + 1
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(want[place, int(token)]), abs=1e-4)
    if most > 0:
        refused = ask(served, "POST", COMPLETIONS, **{**body, "prompt_logprobs": asked + 1})
        assert (refused.status_code, "at most 25" in refused.text) == (400, True)


def test_prompts(files, server, prompt_ids, greedy):
    """Strings, token ids, and lists of them."""
    one = [choice.text for choice in complete(server, prompt_ids).choices]
    assert one == [greedy]
    several = complete(server, [PROMPT, "w12"], n=2).choices
    assert [choice.index for choice in several] == [0, 1, 2, 3]
    other = complete(server, "w12").choices[0].text
    assert [choice.text for choice in several] == [greedy, greedy, other, other]
    empty = complete(server, ["", prompt_ids[:1]]).choices  # a prompt begins with <s>
    assert complete(server, "").choices[0].text == empty[0].text == empty[1].text
    mixed = complete(server, [prompt_ids, prompt_ids[:2]]).choices
    assert [mixed[0].text, len(mixed)] == [greedy, 2]


@pytest.mark.parametrize("prompt", [[], [[]], [3, "w9"], 7, [1 << 20], [-1], {"a": 1}, ["w9", 3]])
def test_prompts_that_are_none(server, prompt):
    answer = ask(server, "POST", COMPLETIONS, model="tiny", prompt=prompt)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "prompt"


#: Fields that the engine takes, with a value that changes the answer.
CHOOSING = [
    {"temperature": 3.0, "seed": 5},
    {"temperature": 3.0, "seed": 5, "top_k": 3},
    {"temperature": 3.0, "seed": 5, "top_p": 0.3},
    {"temperature": 3.0, "seed": 5, "min_p": 0.9},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2.0},
    {"repetition_penalty": 5.0},
    {"logit_bias": {"40": 100}},
    {"bad_words": ["w40", "w11"]},
    {"allowed_token_ids": [41, 42, 43]},
    {"min_tokens": 3, "logit_bias": {"2": 100}},
    {"ignore_eos": True, "logit_bias": {"2": 100}},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
@pytest.mark.parametrize("fields", CHOOSING, ids=lambda fields: " ".join(fields))
def test_fields_of_the_engine(files, server, path, fields):
    """An answer is what the engine generates with the same arguments."""
    ids = files.chat_ids(PROMPT) if path != COMPLETIONS else files.tokenizer(PROMPT)["input_ids"]
    engine = server.engine
    bias = {int(token): number for token, number in fields.get("logit_bias", {}).items()}
    asked = {**fields, "logit_bias": bias} if bias else fields
    names = [
        engine.add_request(list(ids), adapter="a2", max_new_tokens=6, **arguments)
        for arguments in ({"temperature": 0.0, **asked}, {"temperature": 0.0})
    ]
    want, without = (output.generated_tokens for output in engine.collected(names).values())
    answer = ask(server, "POST", path, model="tiny:a2", **question(path, PROMPT, 6, **fields))
    assert answer.status_code == 200, answer.text
    assert plain(path, answer.json()) == files.tokenizer.decode(want, skip_special_tokens=True)
    assert answer.json()["model"] == "tiny:a2"
    assert want != without


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_end_of_a_stream(server, path):
    for asked in (None, {"include_usage": True}):
        body = question(path, PROMPT, 5, stream=True, stream_options=asked)
        text = ask(server, "POST", path, model="tiny:a2", **body).text
        assert text.endswith("data: [DONE]\n\n")
        chunks = events(text)
        prefix = "chatcmpl-" if path == CHAT else "cmpl-"
        assert all(chunk["id"].startswith(prefix) for chunk in chunks)
        assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1
        counted = [chunk for chunk in chunks if chunk.get("usage")]
        if asked is None:
            assert not counted
            continue
        assert counted == chunks[-1:]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    asked = {"include_usage": True, "continuous_usage_stats": True}
    body = question(path, PROMPT, 5, stream=True, stream_options=asked)
    chunks = events(ask(server, "POST", path, model="tiny:a2", **body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_a_completion_has_sixteen_tokens_unless_it_says_otherwise(server):
    body = {"model": "tiny:a2", "prompt": PROMPT, "ignore_eos": True}
    answer = ask(server, "POST", COMPLETIONS, **body).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    room = ask(
        server,
        "POST",
        CHAT,
        model="tiny:a2",
        ignore_eos=True,
        messages=question(CHAT, PROMPT, 1)["messages"],
    )
    assert room.json()["usage"]["total_tokens"] > 40


def test_bare_names_of_adapters(server, greedy):
    for stream in (False, True):
        answer = complete(server, model="a2", stream=stream)
        chunks = answer if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == greedy
        assert chunks[0].model == "a2"
    listed = [entry["id"] for entry in ask(server, "GET", "/v1/models").json()["data"]]
    assert {"tiny", "tiny:a2"} <= {*listed}
    for name in (*listed, "a2"):
        entry = ask(server, "GET", f"/v1/models/{name}").json()
        assert entry["id"] == name
    assert talk(server, lambda client: client.models.retrieve("tiny:a2")).parent == "tiny"
    assert ask(server, "GET", "/v1/models/tiny:zz").status_code == 404


def test_an_adapter_with_the_name_of_the_base(files, server):
    server.compiled.load_adapter(files.case.folders["a1"], "tiny")
    try:
        bare, full = (complete(server, model=m).choices[0].text for m in ("tiny", "tiny:tiny"))
        assert full == complete(server, model="a1").choices[0].text != bare
        assert bare.split() == files.text(None, files.tokenizer(PROMPT)["input_ids"], 8).split()
        listed = [entry["id"] for entry in ask(server, "GET", "/v1/models").json()["data"]]
        assert listed.count("tiny") == 1
    finally:
        server.compiled.unload_adapter("tiny")


def test_small_routes(files, server, prompt_ids):
    import lorafx

    assert ask(server, "GET", "/version").json() == {"version": lorafx.__version__}
    for method in ("GET", "POST"):
        assert ask(server, method, "/ping").json() == {"status": "ok"}
    assert "swagger" in ask(server, "GET", "/docs").text
    assert COMPLETIONS in ask(server, "GET", "/openapi.json").json()["paths"]
    tokens = ask(server, "POST", "/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert tokens["tokens"] == prompt_ids
    assert tokens["count"] == len(prompt_ids)
    assert tokens["token_strs"] == ["<s>", *PROMPT.split()]
    assert tokens["max_model_len"] == files.case.base.config.max_position_embeddings
    bare = ask(server, "POST", "/tokenize", prompt=PROMPT, add_special_tokens=False).json()
    assert bare["tokens"] == prompt_ids[1:]
    messages = question(CHAT, "w9", 1)["messages"]
    of_chat = ask(server, "POST", "/tokenize", model="a1", messages=messages).json()
    assert of_chat["tokens"] == files.chat_ids("w9")
    back = ask(server, "POST", "/detokenize", model="tiny", tokens=prompt_ids[1:]).json()
    assert back == {"prompt": PROMPT}
    assert ask(server, "POST", "/detokenize", tokens=["w9"]).status_code == 400
    assert ask(server, "POST", "/tokenize", prompt=["w9", "w8"]).status_code == 400


def test_unknown_fields_are_logged_once(server, caplog):
    with caplog.at_level(logging.WARNING, "lorafx"):
        for _ in range(2):
            assert complete(server, surprise={"a": 1}, user="me").choices
    assert [r.message for r in caplog.records if "surprise" in r.message] == [
        "the field 'surprise' of requests is not known, and is ignored"
    ]
    assert not any("user" in record.message for record in caplog.records)


def test_an_answer_is_valid_json(server):
    """Logprobs of tokens that cannot come are numbers, too."""
    answer = ask(
        server,
        "POST",
        COMPLETIONS,
        model="tiny",
        prompt="w9",
        max_tokens=2,
        logprobs=20,
        logit_bias={"9": -100},
        temperature=0,
    )
    json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/v1/messages"])
def test_the_last_tokens_of_a_prompt(files, server, path):
    """An answer is that to these tokens, also where a longer prompt has left its pages."""
    words = " ".join(f"w{i}" for i in range(8, 40))
    full = files.tokenizer(words)["input_ids"] if path == COMPLETIONS else files.chat_ids(words)
    for kept in (1, 20, len(full), 500):
        fields = {"truncate_prompt_tokens": kept, "temperature": 0}
        body = question(path, words, 6, **fields)
        answer = ask(server, "POST", path, model="tiny:a2", **body)
        assert answer.status_code == 200, answer.text
        want = complete(server, list(full)[-kept:], max_tokens=6, temperature=0)
        assert plain(path, answer.json()) == want.choices[0].text
        usage = answer.json()["usage"]
        assert want.usage.prompt_tokens in usage.values(), usage
        if path in (CHAT, COMPLETIONS):
            tokens = ask(server, "POST", "/tokenize", model="tiny:a2", **body).json()["tokens"]
            assert tokens == list(full)[-kept:]


def test_the_logprobs_of_a_prompt_that_is_cut(server, prompt_ids):
    fields = {"echo": True, "logprobs": 2, "max_tokens": 3}
    cut = complete(server, truncate_prompt_tokens=2, **fields).choices[0]
    want = complete(server, prompt_ids[-2:], **fields).choices[0]
    assert cut.text == want.text
    assert cut.logprobs == want.logprobs
    nothing = ask(server, "POST", COMPLETIONS, model="tiny", prompt="w9", truncate_prompt_tokens=0)
    assert (nothing.status_code, "no tokens" in nothing.text) == (400, True)


@pytest.mark.parametrize("room", [0, 5, 10**9])
def test_a_prompt_that_is_cut_to_what_fits(server, room):
    """It leaves room for the answer."""
    most = ask(server, "GET", "/v1/models").json()["data"][0]["max_model_len"]
    asked = {"truncate_prompt_tokens": -1, "max_tokens": room, "ignore_eos": True}
    usage = complete(server, [9] * (most + 3), echo=not room, **asked).usage
    assert usage.prompt_tokens == max(1, most - room)
    assert usage.completion_tokens == min(room, most - 1)

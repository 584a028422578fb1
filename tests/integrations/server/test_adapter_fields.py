"""Fields by which other servers choose an adapter: its answer, or a 400 that names `model`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from served import ask, ids_of, plain, question
from sums import SumCase

from lorafx.model.keywords import ELSEWHERE

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
#: TGI's and LoRAX's, SGLang's, vLLM's, llama.cpp's.
NAMING = ("adapter_id", "adapter_name", "lora_name", "lora_path", "adapter", "lora")


@pytest.mark.parametrize(
    ("path", "field"),
    [(PATHS[1], field) for field in NAMING] + [(path, NAMING[0]) for path in PATHS],
)
def test_the_name_of_an_adapter_is_served(files, server, path, field) -> None:
    ids = ids_of(files, path, "w9 w31")
    want = {name: files.text(name, ids, 6) for name in (None, "a1", "a2")}
    assert len(set(want.values())) == 3
    for model, name, adapter in (
        ("tiny", "a1", "a1"),
        ("tiny", "tiny:a2", "a2"),
        ("tiny:a2", "a2", "a2"),
        ("tiny", "tiny", None),
        ("tiny", None, None),
        ("tiny:a1", "", "a1"),
    ):
        body = question(path, "w9 w31", 6, **{field: name})
        answer = ask(server, "POST", path, model=model, **body)
        assert answer.status_code == 200, answer.text
        assert plain(path, answer.json()).strip() == want[adapter], (model, name)


REFUSED = [
    *((field, value) for field in NAMING for value in (0, True, ["a1"], {"id": 0}, "a9", "/x/a1")),
    ("lora", [{"id": 0, "scale": 1.0}]),
    ("adapters", ["a1"]),
    ("adapters", "a1"),
    ("lora_request", {"lora_name": "a1", "lora_int_id": 1, "lora_path": "a1"}),
    ("adapter_source", "hub"),
    ("adapter_names", ["a1"]),
    ("adapter_ids", ["a1"]),
    ("adapter_nmaes", ["a1"]),
    ("lora_scale", 0.5),
    ("adapter_slots", [0]),
    ("adapter_parameters", {"ids": ["a1", "a2"]}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_names_no_adapter_is_refused(server, field, value) -> None:
    answer = ask(
        server, "POST", PATHS[1], model="tiny", **question(PATHS[1], "w9", 2, **{field: value})
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert f"`{field}`" in error["message"]
    assert "`model`" in error["message"]


@pytest.mark.parametrize("path", [*PATHS, "/tokenize"])
def test_every_route_refuses_every_field(server, path) -> None:
    for field in ELSEWHERE:
        body = question(PATHS[1] if path == "/tokenize" else path, "w9", 2, **{field: 3})
        answer = ask(server, "POST", path, model="tiny", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    answer = ask(server, "POST", "/detokenize", tokens=[9], adapter_id="a9")
    assert answer.status_code == 400


def test_two_adapters_for_one_request(server) -> None:
    for fields in ({"model": "tiny:a1", "lora_name": "a2"}, {"model": "a1", "adapter_id": "tiny"}):
        answer = ask(server, "POST", PATHS[1], **fields, **question(PATHS[1], "w9", 2))
        assert answer.status_code == 400
        assert "two models for one request" in answer.json()["error"]["message"]
    fields = {"adapter_id": "a1", "lora_name": "a2"}
    answer = ask(server, "POST", PATHS[1], model="tiny", **fields, **question(PATHS[1], "w9", 2))
    assert answer.json()["error"]["param"] == "lora_name"


def asked(server, path, scales, **fields):
    lora = [{"name": name, "scale": scale} for name, scale in scales]
    body = question(path, "w9 w31", 6, lora=lora, **fields)
    return ask(server, "POST", path, **{"model": "tiny"} | body)


@pytest.mark.parametrize("path", PATHS)
def test_a_sum_of_adapters_as_llama_cpp_takes_it(files, server, path) -> None:
    case, ids = SumCase.of(files.case), ids_of(files, path, "w9 w31")
    for scales in ({"a0": 0.5, "a2": -3.0}, {"a1": 2.5}, {"tiny:a1": 1.0}, {"a2": 0.0}):
        answer = asked(server, path, scales.items())
        assert answer.status_code == 200, answer.text
        plainly = {name.removeprefix("tiny:"): scale for name, scale in scales.items()}
        want = replace(files, case=case).text(plainly, ids, 6)
        assert plain(path, answer.json()).strip() == want, scales
    metrics = ask(server, "GET", "/metrics").text
    assert 'lorafx_tokens_total{adapter="__sums__"}' in metrics
    assert "·" not in metrics


@pytest.mark.parametrize(
    ("scales", "fields", "said"),
    [
        ([("a1", "1")], {}, "'a1' the weight '1'"),
        ([("a1", True)], {}, "'a1' the weight True"),
        ([("a1", 1e400)], {}, "'a1' the weight inf"),
        ([("a1", 1e300)], {}, "beyond the range of float32"),
        ([("a9", 1.0)], {}, "no adapter of this server"),
        ([("tiny", 1.0)], {}, "gives the base model a weight"),
        ([("a1", 1.0), ("a1", 2.0)], {}, "with a name once"),
        ([("a1", 1.0), ("tiny:a1", 2.0)], {}, "in it twice"),
        ([("a1", 1.0)], {"model": "tiny:a2"}, "'a2' is asked for, too"),
        ([(f"a{n}", 1.0) for n in range(4)], {}, "--max-rank"),
    ],
)
def test_what_is_no_sum_of_adapters(server, scales, fields, said) -> None:
    answer = asked(server, PATHS[1], scales, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "lora"
    assert said in error["message"]

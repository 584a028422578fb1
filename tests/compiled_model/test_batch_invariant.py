"""Options(batch_invariant=True): a request has the same bits in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, build_case, case_by_targets, check_mixed, random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from step_logits import StepLogits, answers
from tiny_models import FAMILIES, VOCAB
from toolchain import needs_compiler
from torch import Tensor
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx
from lorafx.errors import CaptureError, ConfigError

pytestmark = [needs_compiler, pytest.mark.any_sizes, pytest.mark.one_road]

SAME = {"batch_invariant": True}
LENGTH = 19
#: Requests' adapters, of which a batch may have any.
NAMES = ("a0", None, "a1", "a2", "a3")


class Served:
    """A compiled model of a family, and the logits of requests by themselves."""

    def __init__(self, family: str, dtype: torch.dtype, folder: Path, **sizes: Any) -> None:
        self.case = build_case(family, folder, **sizes)
        model = self.case.model().to(dtype)
        self.cm: Any = lorafx.compile(model, self.case.folders, options=SAME)
        torch.manual_seed(1)
        self.prompts = torch.randint(3, VOCAB, (64, LENGTH))
        self._alone: dict[tuple[int, str | None], Tensor] = {}

    def logits(self, ids: Tensor, names: list[str | None], **others: Any) -> Tensor:
        found: Tensor = self.cm(input_ids=ids, adapter_names=names, **others)["logits"]
        return found

    def alone(self, prompt: int, name: str | None) -> Tensor:
        key = prompt, name
        if key not in self._alone:
            self._alone[key] = self.logits(self.prompts[prompt : prompt + 1], [name])[0]
        return self._alone[key]


#: The second takes six minutes of CPU time. Bits of bfloat16 and of windows are quickly shown by
#: the kernels' own tests (tests/kernels/cpu: test_dense, test_dense_attention, test_attention).
SERVED = [
    ("llama", torch.float32),
    pytest.param(("gemma3", torch.bfloat16), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SERVED, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Wider than the other tiny models: a product of a vendor adds in more than one order, and no
    size is a whole number of vectors."""
    sizes: dict[str, Any] = {"hidden_size": 136, "intermediate_size": 300, "num_hidden_layers": 1}
    family, dtype = request.param
    if family == "gemma3":
        sizes |= {"head_dim": 34, "layer_types": ["sliding_attention"]}
    return Served(family, dtype, tmp_path_factory.mktemp(family), **sizes)


def test_bits_in_batches(served: Served) -> None:
    """Prompts of 19 tokens: from 4 requests on, a vendor's product would compute the rows."""
    torch.manual_seed(2)
    for size in (2, 3, 17, 64):
        order = torch.randperm(64)[:size]
        names = [NAMES[int(torch.randint(len(NAMES), ()))] for _ in range(size)]
        got = served.logits(served.prompts[order], names)
        for row in range(min(size, 8)):
            assert torch.equal(got[row], served.alone(int(order[row]), names[row]))


@settings(max_examples=20)
@given(
    requests=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(NAMES)), min_size=1, max_size=9)
)
def test_bits_in_any_mix(served: Served, requests: list[tuple[int, str | None]]) -> None:
    prompts, names = zip(*requests, strict=True)
    got = served.logits(served.prompts[list(prompts)], [*names])
    graphs = served.cm.recompiles
    for row, request in enumerate(requests):
        assert torch.equal(got[row], served.alone(*request))
    assert served.cm.recompiles - graphs <= 1  # that of one request, where no test was before


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_bits_of_chunks_and_padding(served: Served, rows: int) -> None:
    """The prompt in chunks, down to a token; beside padding on either side."""
    names = [*NAMES[:rows]]
    past, parts = None, []
    for begin, end in ((0, 7), (7, 12), (12, 13), (13, 14), (14, LENGTH)):
        out = served.cm(
            input_ids=served.prompts[:rows, begin:end],
            adapter_names=names,
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        parts.append(out.logits)
    ids = served.prompts[:rows]
    for left, right in ((5, 0), (0, 6)):
        padded = torch.nn.functional.pad(ids, (left, right), value=1)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        got = served.logits(padded, names, attention_mask=mask, position_ids=places)
        parts_of = [torch.cat(parts, 1), got[:, left : left + LENGTH]]
        for row in range(rows):
            for found in parts_of:
                assert torch.equal(found[row], served.alone(row, names[row]))


@pytest.mark.slow
def test_bits_of_generate(served: Served) -> None:
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    more = {"output_logits": True, "return_dict_in_generate": True}

    def run(rows: slice) -> Any:
        names = [NAMES[row % 5] for row in range(64)][rows]
        ids = served.prompts[rows, :9]
        mask = torch.ones_like(ids)
        return served.cm.generate(ids, attention_mask=mask, adapter_names=names, **fixed, **more)

    together = run(slice(0, 7))
    for row in (0, 1, 5):
        single = run(slice(row, row + 1))
        assert torch.equal(together.sequences[row], single.sequences[0])
        for many, one in zip(together.logits, single.logits, strict=True):
            assert torch.equal(many[row], one[0])


@pytest.mark.slow
def test_bits_of_the_engine(served: Served) -> None:
    """What the engine samples from, in chunks of prompts beside other requests, is what a forward
    of the request alone gives; and so are its log-probabilities."""
    config = ContinuousBatchingConfig(
        page_size=4, num_blocks=128, max_batch_tokens=13, return_logprobs=True
    )
    work = [(served.prompts[row, : 5 + row % 14].tolist(), NAMES[row % 5]) for row in range(9)]
    with served.cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            ids = [engine.add_request(p, adapter=a, max_new_tokens=4) for p, a in work]
        outputs = answers(engine, ids)
    for name, (prompt, adapter) in zip(ids, work, strict=True):
        output = outputs[name]
        assert output.error is None, output.error
        new = output.generated_tokens
        whole = served.logits(torch.tensor([[*prompt, *new[:-1]]]), [adapter])[0]
        want = whole[len(prompt) - 1 :]
        assert torch.equal(torch.stack(seen.rows[name]), want)
        wanted = want.float().log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
        assert torch.equal(torch.tensor(output.logprobs), wanted)


def test_answers_are_those_of_merged_weights(served: Served) -> None:
    if served.cm.dtype != torch.float32:
        pytest.skip("the oracle has float32")
    for rows in (5, 1):  # by the graphs of the tests above
        inputs = {"input_ids": served.prompts[:rows]}
        check_mixed(served.cm, served.case, [*NAMES[:rows]], inputs)


@pytest.mark.slow
def test_without_the_option_bits_differ(served: Served) -> None:
    """A forward of 76 rows is another product's than one of 19."""
    if served.cm.dtype != torch.float32:
        pytest.skip("one is enough")
    cm: Any = lorafx.compile(
        served.case.model(), served.case.folders, options={"start": "compiled"}
    )
    few, many = (
        cm(input_ids=served.prompts[:rows], adapter_names=["a1"] * rows).logits for rows in (2, 4)
    )
    assert not torch.equal(few, many[:2])
    assert torch.allclose(few, many[:2], atol=1e-4)


# What cannot hold
@pytest.mark.parametrize(
    ("option", "value"),
    [("lowering", "reference"), ("lowering", "triton"), ("start", "eager"), ("base_graphs", True)],
)
def test_options_that_do_not_go_together(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} = {value!r}.*batch_invariant") as raised:
        lorafx.Options(batch_invariant=True, **{option: value})
    assert raised.value.settings


def test_fixed_sizes_are_refused(llama: Case) -> None:
    with pytest.raises(ConfigError, match="dynamic=True"):
        lorafx.compile(llama.model(), llama.folders, options=SAME, dynamic=False)


def test_operators_are_refused_by_name(tmp_path: Path) -> None:
    """Before anything runs: attention by torch's products."""
    base = random_base("llama", attn_implementation="eager", num_hidden_layers=1)
    case = case_by_targets(base, tmp_path / "eager", {"a": ["q_proj"]})
    cm = lorafx.compile(base, case.folders, options=SAME)
    with pytest.raises(CaptureError, match=r"aten.bmm.*self_attn.*set_attn_implementation"):
        cm(torch.tensor([[3, 4]]), adapter_names=["a"])


@pytest.mark.slow
def test_other_operators_are_refused_by_name(tmp_path: Path) -> None:
    """Weights of adapters' own, and weights that lie column by column."""
    case = build_case("llama", tmp_path / "llama", num_hidden_layers=1)
    room = lorafx.LoraConfig(trainable_tokens=2)
    cm = lorafx.compile(case.base, room, adapters={"a0": case.folders["a0"]}, options=SAME)
    with pytest.raises(CaptureError, match=r"lorafx.own_embedding.*[Ll]eave the option out"):
        cm(torch.tensor([[3, 4]]), adapter_names=["a0"])
    cm.detach()
    case = build_case(FAMILIES["gpt2"], tmp_path / "gpt2", n_layer=1)
    cm = lorafx.compile(case.base, case.folders, options=SAME)
    with pytest.raises(CaptureError, match=r"aten.addmm.*c_attn.*[Ll]eave the option out"):
        cm(torch.tensor([[3, 4]]), adapter_names=["a0"])

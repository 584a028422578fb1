"""The logits of every step of an engine of continuous batching, and what they have to be."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from dense_merge import TOLERANCE, Case, error
from tiny_models import LLAMA_SIZES, VOCAB, Family
from torch import Tensor
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from waiting import LONG

from lorafx.generation.continuous.adapter_requests import account_of


def decoder(name: str, targets: Sequence[Any], **sizes: Any) -> Family:
    """A small decoder of transformers, `<name>ForCausalLM`, whose adapters have these targets."""

    def make(**changes: Any) -> Any:
        config = getattr(transformers, f"{name}Config")(
            **{"vocab_size": VOCAB, **LLAMA_SIZES, **sizes, **changes}
        )
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return Family(make, tuple(targets))


class StepLogits:
    """Stands between an engine and its forward, and keeps each new token's logits.

    `rows`: name of a request -> the logits (vocabulary,) of its new tokens, in order.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.forward = engine._forward
        self.rows: dict[str, list[Tensor]] = {}
        self.steps: list[int] = []  # tokens of each
        engine._forward = self

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.forward._supports_logits_to_keep())

    def __call__(self, **batch: Any) -> Any:
        output = self.forward(**batch)
        self.steps.append(batch["input_ids"].shape[1])
        logits = output.logits[0]
        if "logits_to_keep" not in batch:
            logits = logits[batch["logits_indices"]]
        new = [future for future in self.engine._requests_of_step() if future.has_new_token]
        for future, row in zip(new, logits, strict=False):
            self.rows.setdefault(future.state.request_id, []).append(row.clone())
        return output


class StepCounts(StepLogits):
    """Also counts by adapter the "tokens" of each step, and the sequences "running" and "waiting"
    meanwhile."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.counts: list[dict[str, Counter[str]]] = []

    def __call__(self, **batch: Any) -> Any:
        tokens: Counter[str] = Counter()
        for future in self.engine._requests_of_step():
            tokens[account_of(future.state)] += future.query_length
        by_state = self.engine.sequences().items()
        counts = {state: Counter(map(account_of, found)) for state, found in by_state}
        self.counts.append({"tokens": tokens, **counts})
        return super().__call__(**batch)

    def most(self, adapter: str) -> int:
        """The most sequences of an adapter that ran in one step."""
        return max(counts["running"][adapter] for counts in self.counts)


def check_logits(
    case: Case, seen: StepLogits, outputs: Mapping[str, Any], adapters: Mapping[str, str | None]
) -> None:
    """Every token of every request was chosen from the logits of the request alone, by the model
    with its adapter merged into a copy."""
    for name, output in outputs.items():
        assert output.error is None, output.error
        prompt, generated = output.prompt_ids, output.generated_tokens
        ids = torch.tensor([[*prompt, *generated[:-1]]])
        with torch.no_grad():
            want = case.alone(adapters[name])(input_ids=ids)["logits"][0, len(prompt) - 1 :]
        got = torch.stack(seen.rows[name])
        assert got.shape == want.shape, name
        assert error(got, want) <= TOLERANCE, name


def serve_checked(
    case: Case,
    cm: Any,
    work: Sequence[tuple[Sequence[int], str | None]],
    config: ContinuousBatchingConfig,
    new: int = 4,
) -> None:
    """`check_logits` for requests (prompt, adapter) that are added at once."""
    with cm.continuous_batching(None, config, warmup=False) as engine:
        seen = StepLogits(engine)
        with engine.pause():
            ids = [engine.add_request([*p], adapter=a, max_new_tokens=new) for p, a in work]
        outputs = answers(engine, ids)
    check_logits(case, seen, outputs, dict(zip(ids, (a for _, a in work), strict=True)))


def check_three_requests(case: Case, cm: Any) -> None:
    """`check_logits` for two adapters and the base, in chunks and pages of few tokens; nothing is
    compiled once the engine has started."""
    config = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=12)
    work = [([*range(3, 20)], "a0"), ([7, 8], None), ([*range(9, 18)], "a1")]
    with cm.continuous_batching(None, config) as engine:
        graphs = cm.recompiles
        seen = StepLogits(engine)
        ids = [engine.add_request(p, adapter=a, max_new_tokens=3) for p, a in work]
        outputs = answers(engine, ids)
    check_logits(case, seen, outputs, dict(zip(ids, (w[1] for w in work), strict=True)))
    assert cm.recompiles == graphs


def greedy(case: Case, adapter: str | None, prompt: Sequence[int], new: int) -> list[int]:
    """The prompt, and what the model with the adapter merged generates for it alone."""
    with torch.no_grad():
        tokens = case.alone(adapter).generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False
        )
    return list(tokens[0].tolist())


def answers(engine: Any, ids: Sequence[str]) -> dict[str, Any]:
    """The finished outputs of these requests, in their order."""
    found: dict[str, Any] = {}
    end = time.monotonic() + LONG
    while not set(ids) <= set(found):
        if time.monotonic() > end:  # else the end of the engine's block would wait for ever
            status = engine.background_thread_status
            status.request_stop(status.HARD_STOP, 0)
            raise AssertionError(f"no answer to {sorted(set(ids) - set(found))}")
        output = engine.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
        assert output is not None or engine.is_running(), "the engine stopped"
    return {name: found[name] for name in ids}

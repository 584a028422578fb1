"""Requests of an engine that have inputs beside their tokens, such as images and sounds.

transformers' paged cache knows tokens only: not the positions, masks and features that images
bring. Such a request is answered in a thread of its own, one after another, by calls of `generate`
that each make one token and keep the cache. Between them the engine's steps go on. Tokens are
chosen, told and ended as in steps:

    logits (1, V) of the last token  →  Choosing  →  the token  →  an output
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestStatus

from lorafx.generation.continuous.adapter_requests import AdapterRequest, EngineOutputs, account_of
from lorafx.generation.continuous.choosing import Choosing, drawn_tokens, shares_of
from lorafx.generation.continuous.failures import client_errors
from lorafx.generation.generate import CompiledGenerate
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.requests import Requests


class RequestsWithInputs:
    """Answers them in the order in which they come; `parked` returns when the engine may go on.

    Attributes:
        waiting, running: the requests that have not begun, and the one that has, by name.
    """

    def __init__(
        self,
        forwards: CompiledForwards,
        tokenizer: Any,
        outputs: EngineOutputs,
        parked: Callable[[], None],
    ) -> None:
        self._forwards, self._outputs, self._parked = forwards, outputs, parked
        self._generate = CompiledGenerate(forwards)
        self._failed: dict[str, Exception] = {}
        step: Any = SimpleNamespace(failed=self._failed)
        self._choosing = Choosing(step, tokenizer)
        self._thread = ThreadPoolExecutor(1, "lorafx-inputs")
        self.waiting: dict[str, AdapterRequest] = {}
        self.running: dict[str, AdapterRequest] = {}

    def add(self, states: Sequence[AdapterRequest], inputs: Mapping[str, Tensor]) -> None:
        """Queue sequences of one request, whose `inputs` are those of the model's `generate`."""
        for state in states:
            self.waiting[state.request_id] = state
            self._thread.submit(self._answer, state, inputs)

    def cancel(self, name: str) -> bool:
        """Cancel a request before its next token. Returns False if it is none of these."""
        state = self.waiting.pop(name, None)
        if state is not None:
            self._outputs.cancelled(state)
        return state is not None or self.running.pop(name, None) is not None

    def stop(self, *, hard: bool, timeout: float | None) -> None:
        """Return when all have been answered. If `hard`, or after `timeout` seconds, they are
        cancelled."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while names := [*self.waiting, *self.running]:
            for name in names if hard or time.monotonic() > end else ():
                self.cancel(name)
            time.sleep(0.005)

    def _answer(self, state: AdapterRequest, inputs: Mapping[str, Tensor]) -> None:
        name = state.request_id
        # Before it is no longer waiting: whoever counts both never finds it in neither.
        self.running[name] = state
        if self.waiting.pop(name, None) is None:
            self.running.pop(name, None)
            return
        state.status = RequestStatus.DECODING
        try:
            ended, count = False, len(state.initial_tokens)
            while not ended:
                self._parked()
                if name not in self.running:
                    self._outputs.cancelled(state)
                    return
                logits, inputs = self._forward(state, inputs)
                token = self._chosen(state, logits)
                self._forwards.session.counts.tokens[account_of(state)] += count
                inputs, count = _with_token(inputs, token), 1
                ended = state.update_and_check_completion(token, None)
                if ended:
                    self.running.pop(name, None)
                if ended or state.streaming:
                    self._outputs.deliver(state.to_generation_output())
        except Exception as error:
            self.running.pop(name, None)
            self._outputs.fail_and_deliver(state, client_errors({name: error})[name])

    def _forward(
        self, state: AdapterRequest, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The logits (1, V) of the next token, and the inputs of the call after this one without
        that token: what was encoded is in the cache."""
        forwards, hold = self._forwards, state.hold

        def find() -> Callable[..., Any]:
            forwards.check_attached()
            return partial(self._generate.generate, **inputs, **_ONE_TOKEN)

        requests = Requests((None if hold is None else hold.name,), uniform=True)
        output = forwards.session.call(find, requests)
        logits = output.logits[0].float()
        if not logits.amax().isfinite():
            raise FloatingPointError("the logits of its next token are not finite")
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return logits, {**kept, "past_key_values": output.past_key_values}

    def _chosen(self, state: AdapterRequest, logits: Tensor) -> int:
        choosing: Any = self._choosing
        choosing.begin([SimpleNamespace(state=state, has_new_token=True)])
        logits = choosing(None, logits)
        if state.sampling is None:
            token, shares = logits.argmax(-1), logits.softmax(-1)
        else:
            shares = shares_of(logits, [state.sampling])
            token = drawn_tokens(choosing, [0], shares)
        choosing.end(token.tolist(), shares[:, token[0]].log().tolist())
        if self._failed:
            raise self._failed.pop(state.request_id)
        return int(token)


#: Arguments of `generate`: the logits of one more token, before anything is done to them.
_ONE_TOKEN: Mapping[str, Any] = {
    **{"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "pad_token_id": 0},
    "return_dict_in_generate": True,
    "output_logits": True,
    "use_cache": True,
    "prompt_lookup_num_tokens": None,  # a draft would stay in the cache
}


def _with_token(inputs: Mapping[str, Any], token: int) -> dict[str, Any]:
    """The inputs with one more token in each tensor of `input_ids` and `attention_mask` (1, T)."""
    more = {"input_ids": token, "attention_mask": 1}
    columns = {
        name: torch.cat([inputs[name], inputs[name].new_full((1, 1), value)], 1)
        for name, value in more.items()
    }
    return {**inputs, **columns}

"""transformers' continuous batching with an adapter for each request.

One file: its methods override those of one class of transformers, and share its attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
)
from transformers.modeling_utils import PreTrainedModel

from lorafx.adapter_store.names import BASE, SUMS, AdapterName, one_name
from lorafx.adapter_store.stored import Hold
from lorafx.errors import BatchError, CaptureError, ConfigError, LorafxError
from lorafx.generation.alora import invocation_columns, warn_absent
from lorafx.generation.continuous.adapter_requests import (
    AdapterPages,
    AdapterRequest,
    EngineOutputs,
    fork_names,
    weights_now,
)
from lorafx.generation.continuous.assistant import Assistant
from lorafx.generation.continuous.attention import EngineAttention
from lorafx.generation.continuous.choosing import Choosing, ChoosingRunner
from lorafx.generation.continuous.drafts import Drafts, PromptLookup, checked_count
from lorafx.generation.continuous.failures import StepHealth, client_errors
from lorafx.generation.continuous.packed_call import PackedForward
from lorafx.generation.continuous.parameters import (
    NOTHING,
    ArgumentError,
    Grammar,
    Sampling,
    TokenParameters,
    checked_number,
    checked_parameters,
    checked_prompt,
    checked_sampling,
    ends_of,
    vocabulary_of,
)
from lorafx.generation.continuous.scheduling import FullCache, all_pinned, within_slots
from lorafx.generation.continuous.shares import Share, Shares
from lorafx.generation.continuous.with_inputs import RequestsWithInputs
from lorafx.model.keywords import refuse_slips
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.gates import refuse_routes
from lorafx.runtime.kinds import CALLS

_COMPILED = "lorafx compiles the model itself"
_PADDED = "only CUDA graphs and compilation by the engine pad"
#: Fields of a configuration that are refused -> the reason.
_REFUSED: Mapping[str, str] = {
    "use_cuda_graph": (
        "a replayed graph runs nothing on the host, where the slot of each token is written and "
        "mixes are refused"
    ),
    "use_async_batching": "a step that fails in parts is known only when it has ended",
    "varlen_compile_config": _COMPILED,
    "decode_compile_config": _COMPILED,
    "default_compile_level": _COMPILED,
    "q_padding_interval_size": _PADDED,
    "kv_padding_interval_size": _PADDED,
}
#: How a request names its adapter.
_WAYS = {"adapter": 'adapter="sql", or None for the base'}
#: Stands for the default adapter, set by `set_adapter`.
DEFAULT: Any = object()


class AdapterBatchingManager(ContinuousBatchingManager):
    """transformers' manager for a compiled model; see its documentation for what is not said here.

    Raises:
        ConfigError: the engine cannot serve the model, or the configuration asks for something that
            is refused (docs/continuous_batching.md).
    """

    def __init__(
        self,
        forwards: CompiledForwards,
        generation_config: GenerationConfig | None = None,
        config: ContinuousBatchingConfig | None = None,
        tokenizer: Any = None,
        shares: Mapping[str | None, Share] | None = None,
        assistant_model: CompiledForwards | PreTrainedModel | None = None,
        num_assistant_tokens: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if forwards.session.program.is_placed:
            raise ConfigError(
                "continuous batching serves no model that ranks share: its thread's steps, calls "
                "and loads would come in another order on each rank, and ranks wait for one "
                "another in each; call generate() on all ranks"
            )
        self.forwards = forwards
        self._tokenizer = tokenizer
        self._shares = Shares()
        if not isinstance(shares, Mapping | None):
            raise ConfigError(f"shares is a mapping of names to shares; got {shares!r:.80}")
        for name, share in (shares or {}).items():
            if name is not None and name != SUMS:
                forwards.session.store.check_known(name)
            self.set_share(name, share)
        model: Any = forwards.model
        defaults = generation_config or getattr(model, "generation_config", None)
        if defaults is None:
            raise ConfigError(
                f"{type(model).__name__} has no generation_config, so it cannot generate; give a "
                "generative model of transformers"
            )
        config = ContinuousBatchingConfig() if config is None else config
        served = served_config(config)
        draft, looked_up = assistant_model, prompt_lookup_num_tokens
        guessed = checked_count(model, draft, num_assistant_tokens, looked_up, defaults)
        per_request = bool(defaults.do_sample and served.per_request_processors)
        self._tells_logprobs = config.return_logprobs
        self._attention = EngineAttention(forwards.session)
        try:
            with _errors_of_engine(model):
                super().__init__(
                    model=model,
                    generation_config=_tempered(defaults) if per_request else defaults,
                    continuous_batching_config=served,
                    **kwargs,
                )
            #: The drafts of its steps; None if it has none.
            self.drafts = _drafts(model, draft, guessed, config, defaults)
        except BaseException:
            self._attention.give_back()
            raise
        self.generation_config = defaults
        #: How requests draw that do not say it; None if they have no choice.
        self._sampling: Sampling | None = None
        processors = self.logit_processor.logits_processor
        if per_request:
            given = {name: getattr(defaults, name) for name in Sampling._fields}
            given = {name: value for name, value in given.items() if value is not None}
            self._sampling = Sampling(**given)
            processors[:] = [
                p for p in processors if not isinstance(p, ContinuousBatchingLogitsProcessor)
            ]
        self._processes = bool(processors)
        #: The process in which the engine's thread runs.
        self._process: int | None = None
        #: The thread's `batch_processor`, which transformers may remove while the thread runs.
        self._processor: Any = None
        self._packed = PackedForward(forwards, self._requests_of_step)
        self._forward: Any = self._packed
        self._choosing = Choosing(self._packed, tokenizer)
        processors.insert(0, self._choosing)
        self._outputs = self.output_router = EngineOutputs()
        self._with_inputs = RequestsWithInputs(forwards, tokenizer, self._outputs, self._parked)
        self.health = StepHealth()
        #: Whether the thread begins with steps, for whose graphs to be compiled while requests are
        #: answered eagerly. They run there, since torch's settings, on which graphs depend, are a
        #: thread's own.
        self.compiles_beside = False

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = False) -> None:
        self._attention.take()

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter: AdapterName | Hold = DEFAULT,
        n: int | None = None,
        ignore_eos: bool = False,
        return_logprobs: bool | None = None,
        grammar: Grammar | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        **parameters: Any,
    ) -> str:
        """Queue a request, and return its name.

        Args:
            adapter: the request's adapter; None or "__base__" is the base model, and a mapping of
                names to weights a sum, as in a call of the compiled model. The default is that of
                `set_adapter`. The request keeps the version that is loaded now, or that a `Hold`
                keeps: replacing or unloading the adapter later has no effect on it. An aLoRA
                adapter begins at the last occurrence of its invocation tokens in the prompt.
            n: the number of sequences, which share the pages of the prompt; None for that of the
                engine's GenerationConfig. The first has the request's name, the others those of
                `fork_names`, and each has its own outputs.
            ignore_eos: generate `max_new_tokens` tokens unless a stop comes.
            return_logprobs: tell the log-probability of each token: `logprobs` as it was chosen,
                `token_logprobs` by the model's logits. None for what the configuration says.
            grammar: which tokens may come (`Grammar`).
            inputs: those of `generate` for this prompt if there are more than its tokens: what a
                processor returns, with `input_ids` and `attention_mask` (1, T). Such a request is
                answered by `generate` beside the steps, and takes turns with others of its kind.
            parameters: how tokens are chosen, when they end, and what the outputs tell of them
                (docs/continuous_batching.md): `temperature`, `top_k`, `top_p` and `min_p`, if the
                engine samples and was given `per_request_processors=True`; `seed`,
                `presence_penalty`, `frequency_penalty`, `repetition_penalty`, `logit_bias`,
                `bad_words`, `allowed_token_ids`, `min_tokens`, `stop`, `stop_token_ids`,
                `logprobs`, `prompt_logprobs`.
            The other arguments are transformers'. With `max_new_tokens=0` nothing is generated.

        Raises:
            UnknownAdapterError: no adapter of this name is loaded.
            CapacityError: every slot is pinned to another adapter, or a call would refuse the sum.
            ConfigError: `adapter` is no name, a call would refuse the sum, or no token can be
                generated with the value of another argument.
            BatchError: the engine is stopping, has failed, or runs in the process that this one was
                forked from; the model was detached; a request of this name is running; or
                `input_ids` are not token ids of the model, or empty.
        """
        reason = self._why_no_requests()
        if reason is not None:
            cause = self.background_thread_status.fatal_error
            why = reason if cause is None else f"{reason} {type(cause).__name__}: {cause}"
            raise BatchError(f"the request was not queued. {why}") from cause
        refuse_slips(parameters, self.add_request, ways=_WAYS)
        if request_id is not None and not isinstance(request_id, str):
            raise ConfigError(f"request_id is a string; got {request_id!r}")
        if not isinstance(ignore_eos, bool):
            raise ConfigError(f"ignore_eos is true or false; got {ignore_eos!r:.80}")
        config, size = self.generation_config, vocabulary_of(self.forwards.model)
        if max_new_tokens is None:
            max_new_tokens = config.max_new_tokens
        else:
            max_new_tokens = checked_number("max_new_tokens", max_new_tokens)
        ends = ends_of(config.eos_token_id if eos_token_id is None else eos_token_id)
        ends = [] if ignore_eos else ends
        count = self.num_return_sequences if n is None else checked_number("n", n)
        sampled = {name: parameters.pop(name) for name in Sampling._fields if name in parameters}
        sampling = checked_sampling(sampled, self._sampling)
        asked = checked_parameters(parameters, self._tokenizer, size, ends)
        if self._tells_logprobs if return_logprobs is None else return_logprobs:
            asked = dataclasses.replace(asked, return_logprobs=True, logprobs=asked.logprobs or 0)
        prompt = checked_prompt(self.forwards.model, input_ids)
        if asked.prompt_logprobs is not None and max(prompt) >= size:
            raise ArgumentError(
                "prompt_logprobs",
                f"has no place: the model has no logits of token {max(prompt)}, which is in the "
                "prompt; leave it out",
            )
        hold, begins = self._hold_adapter(adapter, prompt)
        if inputs is not None:
            self._check_inputs(inputs, prompt, hold, asked)
        request_id = self._register_name(request_id, count)
        state = AdapterRequest(
            request_id=request_id,
            initial_tokens=prompt,
            num_children=count - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            streaming=streaming,
            hold=hold,
            weights=weights_now(self.forwards.session),
            begins=begins,
            family=(request_id, *fork_names(request_id, count - 1)),
            sampling=sampling,
            parameters=None if grammar is None and asked == NOTHING else asked,
            grammar=grammar,
            prompt_logprobs=[] if asked.prompt_logprobs is None else [None],
        )
        if inputs is not None:
            self._with_inputs.add(state.apart(), inputs)
            return request_id
        try:
            for sequence in state.apart() if len(prompt) == 1 else (state,):
                self.input_queue.put(sequence, block=True, timeout=10)
        except BaseException:
            self._outputs.remove(state.family)
            raise
        self._wake_up_loop.set()
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """Cancel a request before its next token."""
        if not self._with_inputs.cancel(request_id):
            super().cancel_request(request_id)

    def set_share(self, name: str | None, share: Share | None) -> None:
        """Give all versions of an adapter this share from the next step on, or, with None, take it
        back. None or "__base__" names the base model, "__sums__" all sums together. The adapter may
        be loaded later, since requests may come as soon as it is. Raises ConfigError if the share,
        or the name, cannot be one."""
        self._shares.give(name, share)

    def collected(
        self, requests: Sequence[str], n: int | None = None
    ) -> dict[str, GenerationOutput]:
        """The outputs of these requests, of `n` sequences each, by name, and before each those of
        its forks. Waits for them. Raises BatchError if the engine stops before they have ended."""
        count = (self.num_return_sequences if n is None else n) - 1
        names = [name for request in requests for name in (*fork_names(request, count), request)]
        outputs: dict[str, GenerationOutput] = {}
        while len(outputs) < len(names):
            output = self.get_result(timeout=1)
            if output is not None and output.is_finished():
                outputs[output.request_id] = output
            elif output is None and not self.is_running():
                cause = self.background_thread_status.fatal_error
                raise BatchError(
                    f"the engine stopped with {len(names) - len(outputs)} of {len(names)} requests "
                    f"unanswered: {cause}"
                ) from cause
        return {name: outputs[name] for name in names}

    def start(self) -> None:
        """Start the engine's thread. Raises ConfigError if transformers has no paged cache for the
        model."""
        if self.batch_processor is None:  # here and not in the thread, where errors are lost
            self.batch_processor = self._create_batch_processor()
        self._process = os.getpid()
        super().start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Stop the engine as transformers does. After `timeout` seconds running requests fail."""
        thread, status = self._generation_thread, self.background_thread_status
        if thread is not None and not status.is_pause_requested(local=True):
            began = time.monotonic()
            self._with_inputs.stop(hard=hard_stop, timeout=timeout)
            if timeout is not None:
                timeout = max(0.0, timeout - (time.monotonic() - began))
            how = status.HARD_STOP if hard_stop else status.FLUSH_AND_STOP
            status.request_stop(how, self.distributed_helper.global_rank)
            self._wake_up_loop.set()  # transformers lets an idle thread wait for 0.1 s
            if block and timeout is not None and not hard_stop:
                thread.join(timeout)
                hard_stop, timeout = thread.is_alive(), None
        super().stop(block, timeout, keep_for_next_session, hard_stop)
        self._attention.give_back()
        if not keep_for_next_session:
            self._free()

    def destroy(self) -> None:
        """End the engine as transformers does, and give back the model's attention."""
        super().destroy()
        self._attention.give_back()
        self._free()

    def _free(self) -> None:
        if not self.is_running():
            self._processor = self.batch_processor = None
            self._packed.pages = None
            if self.drafts is not None:
                self.drafts.proposer.end()

    def unhealthy(self) -> str | None:
        """Why the engine is not expected to serve requests: it takes none, or its last steps have
        all failed; None otherwise. An engine whose steps fail still takes requests, and is healthy
        again after a step that succeeds."""
        return self._why_no_requests() or self.health.reason()

    def sequences(self) -> dict[str, list[RequestState]]:
        """The sequences that are "running", and those "waiting" for their first step."""
        scheduler = None if self._processor is None else self._processor.scheduler
        with self.input_queue.mutex:
            waiting = [*self.input_queue.queue]
        waiting += self._with_inputs.waiting.copy().values()
        running: list[Any] = [*self._with_inputs.running.copy().values()]
        if scheduler is None:
            return {"running": running, "waiting": waiting}
        waiting += scheduler.waiting_requests.values()
        return {"running": [*running, *scheduler.active_requests.values()], "waiting": waiting}

    @property
    def busy(self) -> bool:
        """Whether it has sequences that have not ended."""
        return bool(self._outputs.names)

    def drain(self, *, abort: bool = False) -> None:
        """Return when all sequences have ended. With `abort` they end now: their last outputs have
        what was generated so far, and the finish reason "abort". Not for a paused engine."""
        while self.is_running() and (names := self._outputs.names):
            self._outputs.aborted = names if abort else set()
            for name in self._outputs.aborted:  # again if it was on its way to the engine's thread
                self.cancel_request(name)
            time.sleep(0.005)

    def reset_pages(self) -> bool:
        """Forget the pages that are kept for later requests to find. Returns whether that was done:
        not while there are sequences, which may share them."""
        with self.pause():
            idle = not self.busy
            if idle:
                self._processor.cache.reset()
            return idle

    def cache_usage(self) -> float:
        """The share of the cache that running sequences take."""
        return 0.0 if self._processor is None else float(self._processor.cache.usage)

    def warmup(self) -> None:
        """Capture the graphs of the engine's steps, of several tokens and of one. Raises what
        `start` raises."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        session, steps = self.forwards.session, partial(self._run_steps, self.batch_processor, 1)
        with session.lock:
            session.note(session.running._replace(warming=True), steps)
        if self.drafts is not None:
            self.drafts.proposer.warmup()
        self.warmed_up = True

    @torch.no_grad()
    def _run_steps(self, processor: ContinuousBatchProcessor, times: int) -> None:
        """Run steps of several tokens and of one."""
        runner, several = processor.model_runner, min(4, processor.max_batch_tokens)
        for tokens in (*dict.fromkeys((several, 1)),) * times:
            runner.run_one_warmup(self._forward, num_q_tokens=tokens, max_kv_read=tokens % 4)
        processor.cache.reset()

    def _why_no_requests(self) -> str | None:
        if self._process not in (None, os.getpid()):
            return (
                "The engine's thread runs in the process that this one was forked from; start an "
                "engine here, by continuous_batching()"
            )
        try:
            self.forwards.check_attached()
        except CaptureError as error:
            return str(error)
        return self.background_thread_status.can_accept_new_requests()

    def _hold_adapter(
        self, adapter: AdapterName | Hold, prompt: list[int]
    ) -> tuple[Hold | None, int]:
        """A hold of the adapter, and the token of the prompt at which it begins; the base, after a
        warning, if an aLoRA adapter never does."""
        session = self.forwards.session
        hold = adapter if isinstance(adapter, Hold) else None
        if hold is None:
            name = session.default if adapter is DEFAULT else one_name(adapter, "adapter")
            if name is None or name == BASE:
                return None, 0
            refuse_routes([name])
            hold = session.store.hold(name)
        name, pinned = hold.name, session.store.pinned
        if pinned and name not in pinned and not session.store.fits(frozenset({name})):
            raise all_pinned(name, len(pinned))
        if not hold.stored.invocation:
            return hold, 0
        (column,) = invocation_columns(torch.tensor([prompt]), hold.stored.invocation)
        if column is None:
            warn_absent(str(hold.stored.name), hold.stored.invocation)
            return None, 0
        return hold, column

    def _check_inputs(
        self,
        inputs: Mapping[str, Any],
        prompt: list[int],
        hold: Hold | None,
        asked: TokenParameters,
    ) -> None:
        """Raise ConfigError if a request with these inputs would be answered otherwise than one
        without."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.tolist() != [prompt]:
            raise ArgumentError("inputs", "has the prompt as `input_ids` (1, T)")
        if asked.prompt_logprobs is not None:
            raise ArgumentError("prompt_logprobs", "is for prompts of tokens alone; leave it out")
        if hold is not None and hold.stored.invocation:
            raise ArgumentError("inputs", f"is not for the aLoRA adapter {hold.name!r:.80}")
        if self.generation_config.do_sample and self._sampling is None:
            raise ArgumentError(
                "inputs", "needs an engine with per_request_processors=True where it samples"
            )

    def _parked(self) -> None:
        """Return when no pause keeps the engine's thread."""
        status = self.background_thread_status
        while status.is_pause_requested() and self.is_running():
            time.sleep(0.005)

    def _register_name(self, request_id: str | None, count: int) -> str:
        """Register a request of `count` sequences under this name, or a new one, which is returned.
        Raises BatchError if a running request has the name."""
        while True:
            name = request_id
            if name is None:
                with self._request_lock:
                    name = f"req_{self._request_counter}"
                    self._request_counter += 1
            if self._outputs.begin(name, count - 1):
                return name
            if request_id is not None:
                raise BatchError(f"a request named {request_id!r} is under way; give another name")

    def _fail(self, state: RequestState, error: LorafxError) -> None:
        """End a request that is not in the step with an error."""
        processor, name = self._processor, state.request_id
        scheduler = processor.scheduler
        processor._handle_request_error(error, state)
        processor.offloading_manager.free_request_cpu_cache(state)
        if scheduler.waiting_requests.pop(name, None) is not None:
            scheduler.waiting_requests_order.remove(name)
        scheduler.finish_request(name)
        scheduler.block_new_requests = False

    def _requests_of_step(self) -> list[FutureRequestState]:
        return list(self._processor.inputs_and_outputs.requests_in_batch)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        former = self.batch_processor
        with _errors_of_engine(self.model):
            if self.drafts is not None:
                self.drafts.proposer.begin()  # before the engine's cache takes the free memory
            processor = super()._create_batch_processor()
        if processor is not former:
            self._processor = processor
            scheduler: Any = processor.scheduler
            session, cancelled = self.forwards.session, self._outputs.cancelled
            scheduler.begin(session, self._fail, cancelled, self._shares, self.drafts)
            if self.drafts is not None:
                self.drafts.begin(processor)
            # transformers offers no way to choose these classes.
            cache: Any = processor.cache
            cache.__class__ = AdapterPages
            cache.waiting = lambda request_id: scheduler.waiting_requests.get(request_id)
            cache.session = self.forwards.session
            offloading: Any = processor.offloading_manager
            offloading.__class__ = FullCache
            offloading.fail = self._fail
            runner: Any = processor.model_runner
            runner.__class__ = ChoosingRunner
            runner.choosing = self._choosing
            runner.do_sample = processor.do_sample and self._sampling is None
        elif self.compiles_beside:  # the thread begins, and has written all of its large tensors
            self._run_steps(processor, CALLS)
        return processor

    def _generation_step(self) -> None:
        processor, packed, drafts = self._processor, self._packed, self.drafts
        step = processor.inputs_and_outputs
        batch = step.requests_in_batch
        packed.drafts = {} if drafts is None else drafts.begin_step(step)
        self._choose(step, partial(processor._generation_step, self._forward))
        if drafts is not None and packed.drafts:
            drafts.verify(batch, processor, packed, self._choose)

    def _choose(self, step: ContinuousBatchingIOs, run: Callable[[], None]) -> None:
        """Call `run`, which chooses tokens of the step's requests, and end those that fail."""
        packed = self._packed
        asked = self._choosing.begin(step.requests_in_batch)
        self.logit_processor.do_processing = self._processes or asked
        try:
            run()
            self._choosing.score_prompts()
        except torch.AcceleratorError:
            raise  # the device is lost, so the engine ends with this error
        except Exception as error:
            # Only the requests of this step fail.
            names = [future.state.request_id for future in step.requests_in_batch]
            failed = {name: packed.failed.get(name, error) for name in names}
        else:
            failed = packed.failed
        packed.failed = {}
        if len(failed) == len(step.requests_in_batch):
            self.health.nobody_served(step.requests_in_batch, failed)
        else:
            self.health.succeeded()
        if failed:
            self._end_failed(step, failed)

    def _end_failed(self, step: ContinuousBatchingIOs, failed: Mapping[str, Exception]) -> None:
        """End the failed requests of the step. The others keep their new tokens."""
        processor = self._processor
        scheduler = processor.scheduler
        errors = client_errors(failed)
        served: list[FutureRequestState] = []
        columns: list[int] = []  # of their new tokens in `output_ids`
        column = 0
        for future in step.requests_in_batch:
            state = future.state
            error = errors.get(state.request_id)
            if error is None:
                served.append(future)
                columns += [column] * future.has_new_token
            else:
                processor._handle_request_error(error, state)
                scheduler.finish_request(state.request_id)
                forks = [other for other in scheduler._requests_to_fork if other is not state]
                scheduler._requests_to_fork = forks
            column += future.has_new_token
        step.output_ids[:, : len(columns)] = step.output_ids[:, columns]
        step.requests_in_batch = served
        scheduler.block_new_requests = False


@contextmanager
def _errors_of_engine(model: Any) -> Iterator[None]:
    """Raises ConfigError for a ValueError of transformers while it makes its engine."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(
            f"transformers' engine cannot make a paged cache for {type(model).__name__}: {error}. "
            "Change the ContinuousBatchingConfig if it is about sizes; otherwise call generate()"
        ) from error


def _drafts(
    model: Any,
    draft: CompiledForwards | PreTrainedModel | None,
    count: int | None,
    config: ContinuousBatchingConfig,
    defaults: GenerationConfig,
) -> Drafts | None:
    """The drafts of an engine. The cache of a draft model has as many pages as the engine's, or if
    the configuration does not say it a tenth of the memory."""
    if count is None:
        return None
    if draft is None:
        return Drafts(PromptLookup(defaults.max_matching_ngram_size or 2), count, model)
    tokens = min(config.max_batch_tokens or 2048, 2048)  # which bound a mask
    share = config.max_memory_percent
    if config.num_blocks is None:
        share = (share or 0.9) / 10
    config = dataclasses.replace(config, max_batch_tokens=tokens, max_memory_percent=share)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    if isinstance(draft, CompiledForwards):
        engine = AdapterBatchingManager(draft, greedy, config)
        assistant = Assistant(engine, engine._forward, draft.session)
        return Drafts(assistant, count, model, draft.model)
    plain: Any = draft
    with _errors_of_engine(plain):
        its_engine = ContinuousBatchingManager(plain, greedy, served_config(config))
    return Drafts(Assistant(its_engine, plain, None), count, model, plain)


def _tempered(config: GenerationConfig) -> GenerationConfig:
    """`config` with no way of drawing but a temperature, whose processor transformers leaves memory
    for."""
    changed = copy.deepcopy(config)
    changed.update(temperature=2.0, top_k=None, top_p=None, min_p=None)
    return changed


def served_config(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """The configuration with everything switched off that is not served. Raises ConfigError if the
    configuration asks for it."""
    for name, why in _REFUSED.items():
        value = getattr(config, name)
        if value and value != (False, False):
            raise ConfigError(
                f"ContinuousBatchingConfig({name}={value!r}) is not served with adapters: {why}. "
                f"Leave {name} out"
            )
    return dataclasses.replace(
        config,
        use_cuda_graph=False,
        use_async_batching=False,
        return_logprobs=False,
        auto_switch_to_flash=False,
        scheduler_type=within_slots(config.scheduler_type),
    )
